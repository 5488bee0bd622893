"""Spaces against dense matrices and closed forms; replicate and reduce against their serial meaning."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from solvers.errors import GliodeError
from solvers.spaces import (
    Communicator,
    DepthSobolev,
    Diagonal,
    Euclidean,
    GramSpace,
    Product,
    Space,
    reduce,
    replicate,
)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def sparse_space(n: int = 7) -> tuple[GramSpace, np.ndarray]:
    """A GramSpace whose callables leave torch, as those of PETSc do, and its matrix."""
    matrix = scipy.sparse.diags([-np.ones(n - 1), 3 + np.arange(n) / n, -np.ones(n - 1)], [-1, 0, 1]).tocsc()
    factor = scipy.sparse.linalg.splu(matrix)
    buffer = np.empty(n)

    def apply(a: Tensor) -> Tensor:
        buffer[:] = matrix @ a.numpy()
        return torch.from_numpy(buffer)  # the same memory each time

    return GramSpace(n, apply, lambda d: torch.from_numpy(factor.solve(d.numpy()))), matrix.toarray()


def all_spaces() -> list[Space]:
    times = torch.tensor([0.0, 0.3, 0.5, 1.1, 2.0])
    gram, _ = sparse_space()
    depth = DepthSobolev(times, (2, 3), 0.4)
    scaled = Euclidean(3, torch.tensor([0.1, 1.0, 20.0]))
    lumped = Diagonal(torch.tensor([0.5, 2.0, 1.5]).double())
    product = Product({"field": gram, "w": depth, "scalars": scaled})
    return [Euclidean(4), scaled, gram, lumped, depth, product]


@pytest.mark.parametrize("space", all_spaces(), ids=lambda s: type(s).__name__)
def test_riesz_and_gram_are_inverse_and_belong_to_the_inner_product(space: Space) -> None:
    a, b, dual = random(*space.shape), random(*space.shape), random(*space.shape)
    assert space.zeros().shape == a.shape
    torch.testing.assert_close(space.riesz(space.gram(a)), a)
    assert space.inner(a, b) == pytest.approx(space.inner(b, a))
    assert space.inner(space.riesz(dual), b) == pytest.approx(space.pair(dual, b))
    assert space.norm(a) == pytest.approx(math.sqrt(space.inner(a, a)))
    assert space.dual_norm(dual) == pytest.approx(space.norm(space.riesz(dual)))
    assert space.inner(a, a) > 0


@pytest.mark.parametrize("space", all_spaces(), ids=lambda s: type(s).__name__)
def test_gram_and_riesz_are_on_the_tape_in_both_modes_to_second_order(space: Space) -> None:
    a = random(*space.shape).requires_grad_()
    for f in (lambda x: space.gram(x) * x, lambda x: space.riesz(x) * x, lambda x: space.pairing(x.sin(), x)):
        assert gradcheck(f, (a,), check_forward_ad=True)
        assert gradgradcheck(f, (a,), check_fwd_over_rev=True, check_rev_over_rev=True)


def test_euclidean_scale_is_a_standard_deviation() -> None:
    space = Euclidean(2, torch.tensor([0.5, 10.0]))
    assert space.norm(torch.tensor([0.5, 0.0], dtype=torch.float64)) == pytest.approx(1.0)
    dual = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert space.riesz(dual).tolist() == pytest.approx([0.25, 100.0])


def test_gram_space_returns_copies_of_a_reused_buffer() -> None:
    space, matrix = sparse_space()
    a, b = random(7), random(7)
    first = space.gram(a)
    space.gram(b)
    np.testing.assert_allclose(first.numpy(), matrix @ a.numpy())


def dense_sobolev(times: np.ndarray, length: float) -> np.ndarray:
    """int phi_i phi_j + length^2 phi_i' phi_j' by two-point Gauss quadrature of hat functions."""
    n = len(times)
    gram = np.zeros((n, n))
    for left, right in pairwise(times):
        for x in (-1 / math.sqrt(3), 1 / math.sqrt(3)):
            t = (left + right) / 2 + x * (right - left) / 2
            weight = (right - left) / 2
            hats = np.array([np.interp(t, times, np.eye(n)[i]) for i in range(n)])
            slopes = np.array(
                [(np.interp(right, times, e) - np.interp(left, times, e)) / (right - left) for e in np.eye(n)]
            )
            gram += weight * (np.outer(hats, hats) + length**2 * np.outer(slopes, slopes))
    return gram


@pytest.mark.parametrize("length", [0.0, 0.05, 3.0])
def test_depth_sobolev_is_the_finite_element_problem(length: float) -> None:
    times = np.sort(np.random.default_rng(1).uniform(0, 4, 12))
    space, gram = DepthSobolev(torch.from_numpy(times), (3, 2), length), dense_sobolev(times, length)
    dual = random(12, 3, 2)
    expected = np.linalg.solve(gram, dual.numpy().reshape(12, 6)).reshape(12, 3, 2)
    np.testing.assert_allclose(space.riesz(dual).numpy(), expected, rtol=1e-10, atol=1e-12)
    expected = (gram @ dual.numpy().reshape(12, 6)).reshape(12, 3, 2)
    np.testing.assert_allclose(space.gram(dual).numpy(), expected, rtol=1e-12, atol=1e-13)


def test_depth_sobolev_converges_to_the_boundary_value_problem_with_natural_ends() -> None:
    """(1 - l^2 d2/dt2) g = cos(pi t / T), g' = 0 at both ends: g = cos(pi t / T) / (1 + (l pi / T)^2)."""
    depth, length, errors = 2.0, 0.7, []
    for n in (21, 41):
        t = torch.linspace(0, depth, n, dtype=torch.float64)
        load = DepthSobolev(t, (), 0.0).gram(torch.cos(math.pi * t / depth))  # int f phi_i
        exact = torch.cos(math.pi * t / depth) / (1 + (length * math.pi / depth) ** 2)
        errors.append(float((DepthSobolev(t, (), length).riesz(load) - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


def test_depth_sobolev_works_in_single_precision() -> None:
    space = DepthSobolev(torch.linspace(0, 1, 5), (2,), 0.3)
    a = random(5, 2).float()
    assert space.riesz(space.gram(a)).dtype == torch.float32
    torch.testing.assert_close(space.riesz(space.gram(a)), a, rtol=1e-4, atol=1e-5)


def test_product_packs_unpacks_and_adds_up() -> None:
    field, _ = sparse_space()
    scalars = Euclidean(2, torch.tensor([2.0, 4.0]))
    space = Product({"log D": scalars, "rho": field})
    parts = {"rho": random(7), "log D": random(2)}
    m = space.pack(parts)
    torch.testing.assert_close(m, torch.cat([parts["log D"], parts["rho"]]))
    assert space.unpack(m)["rho"].data_ptr() == m[2:].data_ptr()
    total = scalars.inner(parts["log D"], parts["log D"]) + field.inner(parts["rho"], parts["rho"])
    assert space.inner(m, m) == pytest.approx(total)
    assert space.scaling() is None
    both = Product({"a": scalars, "b": Euclidean(1)}).scaling()
    assert both is not None and both.tolist() == [2.0, 4.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Euclidean(2, torch.tensor([1.0, 0.0])), "positive"),
        (lambda: Euclidean(3, torch.ones(2)), "2 entries for 3"),
        (lambda: DepthSobolev(torch.tensor([0.0, 0.0, 1.0]), (), 1.0), "increasing"),
        (lambda: DepthSobolev(torch.tensor([0.0, 1.0]), (), -1.0), "not negative"),
        (lambda: Product({}), "at least one"),
        (lambda: Product({"a": Euclidean(1)}).pack({"b": torch.ones(1)}), "needs"),
        (lambda: Product({"a": Euclidean(1)}).pack({"a": torch.ones(2)}), "'a' has shape"),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(GliodeError, match=message):
        make()


def test_replicate_and_reduce_are_nothing_in_serial() -> None:
    x = random(3)
    assert replicate(x, None) is x and reduce(x, None) is x


@pytest.mark.mpi
def test_a_replicated_scalar_in_a_distributed_sum_has_the_serial_derivatives() -> None:
    """f(p) = (sum_i sin(p_1 x_i) exp(p_2 x_i))^2 with x_i spread over the ranks."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    mine = x[comm.rank :: comm.size]
    p0 = torch.tensor([0.7, -0.4], dtype=torch.float64)
    d = torch.tensor([0.3, 1.1], dtype=torch.float64)

    def f(p: Tensor, x: Tensor, comm: Communicator | None) -> Tensor:
        q = replicate(p, comm)
        return reduce((torch.sin(q[0] * x) * torch.exp(q[1] * x)).sum(), comm) ** 2 + p[0] * p[1]

    def derivatives(x: Tensor, comm: Communicator | None) -> list[Tensor]:
        p = p0.clone().requires_grad_()
        value = f(p, x, comm)
        (gradient,) = torch.autograd.grad(value, p, create_graph=True)
        (second,) = torch.autograd.grad(gradient, p, d)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(p, d)
            out = f(dual, x, comm)
            tangent = forward_ad.unpack_dual(out).tangent
            (over,) = torch.autograd.grad(out, dual, create_graph=True)
            forward_over_reverse = forward_ad.unpack_dual(over).tangent
        (reverse_over_forward,) = torch.autograd.grad(tangent, p)
        return [
            t.detach() for t in (value, gradient, second, tangent, forward_over_reverse, reverse_over_forward)
        ]

    for parallel, serial in zip(derivatives(mine, comm), derivatives(x, None), strict=True):
        torch.testing.assert_close(parallel, serial, rtol=1e-12, atol=1e-12)


@pytest.mark.mpi
def test_distributed_fields_pair_and_differentiate_as_in_serial() -> None:
    """A product of a distributed field and replicated scalars; R = 1/2 ||m||^2 with gradient G m."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    whole, weight = (
        torch.linspace(-1, 2, 10, dtype=torch.float64),
        torch.linspace(1, 3, 10, dtype=torch.float64),
    )
    own = slice(comm.rank, None, comm.size)

    def space(weight: Tensor, comm: Communicator | None) -> Product:
        field = GramSpace(len(weight), lambda a: weight * a, lambda d: d / weight, comm)
        return Product({"field": field, "scalars": Euclidean(2, 0.5)})

    scalars = torch.tensor([0.2, -0.9], dtype=torch.float64)
    serial, parallel = space(weight, None), space(weight[own], comm)
    a, b = torch.cat([whole, scalars]), torch.cat([whole[own], scalars]).requires_grad_()
    assert parallel.inner(b, b) == pytest.approx(serial.inner(a, a), rel=1e-14)
    (gradient,) = torch.autograd.grad(0.5 * parallel.pairing(parallel.gram(b), b), b)
    torch.testing.assert_close(gradient, parallel.gram(b.detach()))
    assert parallel.dual_norm(gradient) == pytest.approx(serial.norm(a), rel=1e-14)


def test_a_diagonal_metric_states_its_scaling_and_refuses_weights_without_one() -> None:
    space, a = Diagonal(torch.tensor([0.5, 2.0]).double()), torch.tensor([2.0, 3.0]).double()
    assert space.inner(a, a) == pytest.approx(0.5 * 4 + 2 * 9)
    torch.testing.assert_close((a / space.scaling()).square().sum().item(), 20.0)
    with pytest.raises(GliodeError, match="positive"):
        Diagonal(torch.tensor([0.5, 0.0]).double())
