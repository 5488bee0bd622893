"""Sparse products on the tape against dense algebra, all derivatives, and the stiffness made of them."""

from __future__ import annotations

import pytest
import torch
from scipy.sparse import random as random_matrix
from torch import Tensor

from solvers.errors import GliodeError
from solvers.legendre import stages_for
from solvers.node.science.batched import BatchedFlow
from solvers.node.science.sparse import PairOperator, Stiffness, product
from solvers.operators import Conductances, Sparse

F64 = torch.float64


def matrix() -> Sparse:
    return Sparse.of(random_matrix(5, 7, 0.5, random_state=2))


def graph(n: int = 9, cells: int = 6, k: int = 4) -> Conductances:
    """A random one: any 15 pairs (or all) and tables will do."""
    every = torch.combinations(torch.arange(n))
    chosen = every[torch.randperm(len(every))[:15].sort().values]
    edge = torch.randint(0, len(chosen), (cells, k), dtype=torch.int32)
    return Conductances(chosen[:, 0], chosen[:, 1], edge, torch.rand(cells, k, dtype=F64), n, False)


def dense(pairs: Conductances, w: Tensor) -> Tensor:
    """K(w) entry by entry."""
    K = torch.zeros(pairs.n, pairs.n, dtype=w.dtype)
    for i, j, value in zip(pairs.first.tolist(), pairs.second.tolist(), w, strict=True):
        K[i, i] += value
        K[j, j] += value
        K[i, j] -= value
        K[j, i] -= value
    return K


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (4, 7), (2, 3, 7)])
def test_the_product_is_the_dense_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    A = matrix()
    A = Sparse(A.pointers, A.columns, A.values.to(dtype), A.shape)
    x = torch.rand(shape, dtype=dtype)
    out = product(A, x)
    assert out.shape == (*shape[:-1], 5) and out.dtype == dtype
    torch.testing.assert_close(out, x @ A.dense().T)
    strided = x.reshape(-1, 7).T.contiguous().T.reshape(shape)  # in memory as (n, batch)
    torch.testing.assert_close(product(A, strided), out)


def test_all_derivatives_of_a_product_agree_with_differences() -> None:
    A = matrix()
    x = torch.rand(2, 7, dtype=F64, requires_grad=True)
    values = torch.rand_like(A.values).requires_grad_()

    def f(values: Tensor, x: Tensor) -> Tensor:
        return product(A, x, values)

    assert torch.autograd.gradcheck(f, (values, x), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        lambda v, x: f(v, x).sin(), (values, x), check_fwd_over_rev=True, check_rev_over_rev=True
    )


def test_the_derivative_by_coefficients_of_each_state() -> None:
    """A(c) = sum_k c_k A_k with its own c for each state of the batch."""
    A, B = matrix(), Sparse.of(random_matrix(5, 7, 0.4, random_state=5))
    x = torch.rand(3, 7, dtype=F64)
    c = torch.rand(3, 2, dtype=F64, requires_grad=True)
    out = c[:, :1] * product(A, x) + c[:, 1:] * product(B, x)
    g = torch.rand_like(out)
    (found,) = torch.autograd.grad(out, c, g)
    expected = torch.stack([torch.einsum("bi,ij,bj->b", g, K.dense(), x) for K in (A, B)], 1)
    torch.testing.assert_close(found, expected)


def test_the_sampled_product_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    A, x = matrix(), torch.rand(4, 7, dtype=F64)
    values = A.values.clone().requires_grad_()
    found = []
    for chunk in (8, 4_000_000):
        monkeypatch.setattr("solvers.node.science.sparse._CHUNK", chunk)
        found.append(torch.autograd.grad(product(A, x, values).square().sum(), values)[0])
    torch.testing.assert_close(*found)


def test_no_states_have_no_product_and_no_derivative() -> None:
    A = matrix()
    x, values = torch.zeros(0, 7, dtype=F64, requires_grad=True), A.values.clone().requires_grad_()
    out = product(A, x, values)
    by_x, by_values = torch.autograd.grad(out.sum(), (x, values))
    assert out.shape == (0, 5) and by_x.shape == (0, 7)
    assert torch.equal(by_values, torch.zeros_like(values))


def test_the_bound_of_a_pair_operator_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, bounds = graph(), list[Tensor]()
    operator = PairOperator(pairs, torch.linspace(0.5, 1.5, 9, dtype=F64))
    D = torch.rand(3, 6, dtype=F64)
    bound = operator.bound

    def counted(*weights: Tensor) -> Tensor:
        bounds.append(bound(*weights))
        return bounds[-1]

    monkeypatch.setattr(operator, "bound", counted)
    flow, weights = BatchedFlow(operator), operator.conductances(D)
    u = operator.box(torch.rand(3, 9, dtype=F64))
    for _ in range(3):
        u = flow(u, 0.1, *weights)
    assert len(bounds) == 1
    K = [dense(pairs, pairs(d)) / torch.linspace(0.5, 1.5, 9, dtype=F64)[:, None] for d in D]
    largest = torch.stack([torch.linalg.eigvals(k).abs().max() for k in K])
    assert bool((bounds[0][0] >= largest).all())


@pytest.mark.parametrize("many", [False, True])
def test_the_stiffness_is_the_dense_one(many: bool) -> None:
    pairs = graph()
    K = Stiffness(pairs)
    w = torch.rand(3, 15, dtype=F64) if many else torch.rand(15, dtype=F64)
    u = torch.rand(3, 9, dtype=F64)
    rows = [dense(pairs, w[i] if many else w) @ u[i] for i in range(3)]
    torch.testing.assert_close(K(w, u), torch.stack(rows))
    torch.testing.assert_close(K(w, u), pairs.stiffness(w, u))
    if not many:
        torch.testing.assert_close(K.diagonal(w), dense(pairs, w).diagonal())
        torch.testing.assert_close(K(w, u[0]), rows[0])


@pytest.mark.parametrize("many", [False, True])
def test_all_derivatives_of_the_stiffness(many: bool) -> None:
    K = Stiffness(graph())
    w = torch.rand(2, 15, dtype=F64) if many else torch.rand(15, dtype=F64)
    u = torch.rand(2, 9, dtype=F64, requires_grad=True)
    w.requires_grad_()
    assert torch.autograd.gradcheck(K, (w, u), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w, u: K(w, u).sin(), (w, u), check_fwd_over_rev=True)


@pytest.mark.parametrize("shared", [False, True])
def test_the_polynomial_of_a_pair_operator(shared: bool) -> None:
    """RKL2 (Meyer, Balsara & Aslam 2014) of three states at once, each with its own stages and time."""
    pairs, mass = graph(), torch.linspace(0.5, 1.5, 9, dtype=F64)
    operator = PairOperator(pairs, mass, torch.rand(2, 15, dtype=F64) if shared else None)
    w = operator.weights(torch.rand(3, 2, dtype=F64)) if shared else (torch.rand(15, 3, dtype=F64),)
    u, dt = torch.rand(3, 9, dtype=F64), torch.tensor([0.02, 0.5, 3.0], dtype=F64)
    flow = BatchedFlow(operator)
    out = operator.states(flow(operator.box(u), operator.numbers(dt), *w))
    for i in range(3):
        K = dense(pairs, w[0][:, i])
        L = K / mass[:, None]
        bound = float(((K.diagonal() + K.abs().fill_diagonal_(0).sum(1)) / mass).max())
        assert float(operator.bound(*w)[0, i]) == pytest.approx(bound)
        s = stages_for(float(dt[i]) * bound)
        theta, b = 4 * float(dt[i]) / (s * s + s - 2), (s * s + s - 2) / (2 * s * (s + 1))
        values, vectors = torch.linalg.eig(torch.eye(9, dtype=F64) - theta * L)
        P = torch.special.legendre_polynomial_p(values.real, s)
        exact = (1 - b) * u[i] + b * ((vectors * P) @ torch.linalg.solve(vectors, u[i].to(vectors))).real
        torch.testing.assert_close(out[i], exact, rtol=1e-9, atol=1e-11)


def test_all_derivatives_of_the_polynomial() -> None:
    operator = PairOperator(graph(5, 3), torch.linspace(0.5, 1.5, 5, dtype=F64))
    flow = BatchedFlow(operator, stages=4)
    u, w = torch.rand(5, 2, dtype=F64, requires_grad=True), torch.rand(10, 2, dtype=F64, requires_grad=True)
    dt = torch.tensor([[0.3, 0.5]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(flow, (u, dt, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(flow, (u, dt, w))


def test_what_does_not_fit_is_told() -> None:
    A, pairs = matrix(), graph()
    with pytest.raises(GliodeError, match=r"state: shape \(7, 3\), expected \(..., 7\)"):
        product(A, torch.ones(7, 3, dtype=F64))
    with pytest.raises(GliodeError, match=r"state: torch.float32 on cpu, the operators torch.float64 on cpu"):
        product(A, torch.ones(7))
    with pytest.raises(GliodeError, match=r"state: torch.float64 on meta, .* move one"):
        product(A, torch.ones(7, dtype=F64, device="meta"))
    with pytest.raises(GliodeError, match="values: "):
        product(A, torch.ones(7, dtype=F64), torch.ones(3, dtype=F64))
    with pytest.raises(GliodeError, match=r"conductances: \(14,\), expected \(pairs,\)"):
        Stiffness(pairs)(torch.ones(14, dtype=F64), torch.ones(9, dtype=F64))
    with pytest.raises(GliodeError, match=r"conductances: of 2 states, the states are \(3, 9\)"):
        Stiffness(pairs)(torch.ones(2, 15, dtype=F64), torch.ones(3, 9, dtype=F64))
    with pytest.raises(GliodeError, match="shares: not given"):
        PairOperator(pairs, torch.ones(9, dtype=F64)).weights(torch.ones(1, 2, dtype=F64))
    positive = Conductances(pairs.first, pairs.second, pairs.edge, pairs.table, 9, True)
    with pytest.raises(GliodeError, match="D is negative somewhere"):
        PairOperator(positive, torch.ones(9, dtype=F64)).bound(-torch.ones(15, 1, dtype=F64))


@pytest.mark.gpu
def test_cuda_agrees_with_the_processor() -> None:
    pairs = graph()
    w, u = torch.rand(2, 15, dtype=F64), torch.rand(2, 9, dtype=F64)
    there = _on_cuda(pairs)
    for weights in (w, w[0]):
        leaves = [weights.clone().requires_grad_(), weights.cuda().requires_grad_()]
        outs = [Stiffness(p)(v, x) for p, v, x in zip((pairs, there), leaves, (u, u.cuda()), strict=True)]
        torch.testing.assert_close(outs[1].cpu(), outs[0])
        grads = [torch.autograd.grad(out.square().sum(), v)[0] for out, v in zip(outs, leaves, strict=True)]
        torch.testing.assert_close(grads[1].cpu(), grads[0])


def _on_cuda(pairs: Conductances) -> Conductances:
    parts = (pairs.first, pairs.second, pairs.edge, pairs.table)
    first, second, edge, table = (part.cuda() for part in parts)
    return Conductances(first, second, edge, table, pairs.n, pairs.vertex_rule)
