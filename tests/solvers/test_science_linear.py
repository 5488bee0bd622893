"""Right-hand sides of saved problems: closed forms, gradients without a tape, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.sparse import diags, eye
from torch import Tensor

from solvers.errors import GliodeError
from solvers.node.science.linear import Linear
from solvers.ode.integrate import integrate
from solvers.ode.tableaux import chebyshev, real_interval
from solvers.operators import Conductances, Sparse
from solvers.semidiscrete import SemiDiscrete

F64 = torch.float64
N, H = 21, 0.05


def rod(consistent: bool = False) -> SemiDiscrete:
    """P1 on (0, 1) without flux at the ends."""
    first = torch.arange(N - 1)
    table = torch.full((1, 1), 1 / H, dtype=F64)
    pairs = Conductances(first, first + 1, first.int()[:, None], table, N, True)
    lumped = torch.full((N,), H, dtype=F64)
    lumped[[0, -1]] /= 2
    whole = diags([H / 6, 2 * H / 3, H / 6], [-1, 0, 1], shape=(N, N)).tolil()
    whole[0, 0] = whole[-1, -1] = H / 3
    load = {"heat": lumped * torch.linspace(0, 1, N, dtype=F64)}
    decay = {"decay": Sparse.of(-eye(N) @ diags(lumped.numpy()))}
    return SemiDiscrete(Sparse.of(whole) if consistent else lumped, decay, load, pairs)


def mode(k: int) -> Tensor:
    return torch.cos(k * math.pi * torch.linspace(0, 1, N, dtype=F64))


def rate(k: int, consistent: bool) -> float:
    """The eigenvalue of M^-1 K on the uniform rod, in closed form (Strang & Fix 1973)."""
    c = math.cos(k * math.pi * H)
    return 6 / H**2 * (1 - c) / (2 + c) if consistent else 2 / H**2 * (1 - c)


@pytest.mark.parametrize("consistent", [False, True])
def test_modes_are_eigenvectors(consistent: bool) -> None:
    """Several states with their own diffusivity in one product."""
    problem = rod(consistent)
    assert problem.conductances is not None
    x = torch.stack([mode(k) for k in (1, 2, 5)])
    D = torch.tensor([[0.3], [1.0], [2.0]], dtype=F64)
    w = problem.conductances(D.expand(3, N - 1))
    out = Linear(problem)(0.0, x, conductances=w, decay=0.0, heat=0.0)
    rates = torch.tensor([[rate(k, consistent)] for k in (1, 2, 5)], dtype=F64)
    torch.testing.assert_close(out, -D * rates * x, rtol=1e-8, atol=1e-8)
    unit = Linear(problem)(0.0, x, decay=0.0, heat=0.0)
    torch.testing.assert_close(unit, -rates * x, rtol=1e-8, atol=1e-8)


def test_operators_and_loads_have_weights_of_their_own() -> None:
    """x' = -a x + b z at D = 0, with a and b for each state."""
    problem = rod()
    f = Linear(problem)
    x, z = torch.rand(2, N, dtype=F64), torch.linspace(0, 1, N, dtype=F64)
    a, b = torch.tensor([[2.0], [3.0]], dtype=F64), torch.tensor([[0.5], [0.1]], dtype=F64)
    out = f(0.0, x, conductances=torch.zeros(N - 1, dtype=F64), decay=a, heat=b)
    torch.testing.assert_close(out, -a * x + b * z)
    both = f(0.0, x, conductances=torch.zeros(N - 1, dtype=F64))
    torch.testing.assert_close(both, -x + z)


def test_the_heat_equation_by_chebyshev_and_its_gradient_without_a_tape() -> None:
    """A mode decays as exp(-D rate t), and dJ/dD follows, through conductances(D) on the tape."""
    problem = rod()
    pairs, f = problem.conductances, Linear(problem)
    assert pairs is not None
    D = torch.tensor([0.02, 0.05], dtype=F64, requires_grad=True)
    times, scheme = torch.linspace(0, 1, 201, dtype=F64), chebyshev(4)
    assert real_interval(4) > 0.05 * 4 / H**2 / 200
    x0 = torch.stack([mode(2), mode(3)])
    w = pairs(D[:, None].expand(2, N - 1))

    def field(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return f(t, x, conductances=w, decay=0.0, heat=0.0)

    x = integrate(field, x0, times, scheme, parameters=(w,))
    rates = torch.tensor([rate(2, False), rate(3, False)], dtype=F64)
    exact = torch.exp(-D * rates)
    torch.testing.assert_close(x, exact[:, None] * x0, rtol=0, atol=3e-6)
    (found,) = torch.autograd.grad((x * x0).sum(), D)
    expected = -rates * exact * (x0**2).sum(1)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=0)
    taped = integrate(
        field, x0, times, scheme, parameters=(w.detach().requires_grad_(),), gradient="autograd"
    )
    torch.testing.assert_close(taped, x)


def test_what_does_not_fit_is_told() -> None:
    f, x = Linear(rod()), torch.rand(2, N, dtype=F64)
    with pytest.raises(
        GliodeError, match=r"weights: \['advection'\] are not among conductances, decay, heat"
    ):
        f(0.0, x, advection=1.0)
    with pytest.raises(GliodeError, match=r"state: shape \(21, 2\), expected \(..., 21\)"):
        f(0.0, x.T)
    with pytest.raises(GliodeError, match=r"state: torch.float32 on cpu, the operators torch.float64"):
        f(0.0, x.float())
    with pytest.raises(GliodeError, match="conductances: a number"):
        f(0.0, x, conductances=1.0)
