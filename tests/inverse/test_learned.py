"""The adapter of energies: derivatives against differences, the prox against its equation, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from inverse.problem import InverseProblem
from inverse.regularizers.learned.energy import NOTHING, Energy, Guarantee, Learned
from inverse.verification import check_gradient, check_hessian
from solvers.errors import GliodeError
from solvers.spaces import Diagonal, Euclidean, Space


class Wave(Energy):
    """sum (b x^2 / 2 + cos x): weakly convex with modulus 1 - b, Lipschitz 1 + b."""

    def __init__(self, b: float = 0.25) -> None:
        super().__init__()
        self.b = torch.nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor) -> Tensor:
        return (self.b * x.square() / 2 + x.cos()).flatten(1).sum(1)

    def guarantee(self) -> Guarantee:
        b = float(self.b)
        return Guarantee(max(1 - b, 0.0), 1 + b, b > 0)

    def settings(self) -> dict[str, Any]:
        return {"b": float(self.b)}

    def require_fit(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise GliodeError(f"wave: a field has two axes, not {len(shape)}")


def point(n: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_derivatives_on_the_tape_and_by_hand() -> None:
    R = Learned(Wave(), Euclidean(6), (2, 3), weight=0.7, scale=1.6)
    m, d = point(), point(seed=1)
    problem = InverseProblem(Euclidean(6), R)
    assert check_gradient(problem, m, d, show=False).passed
    assert check_hessian(problem, m, d, show=False).passed
    torch.testing.assert_close(R.gradient(m), problem.evaluate(m).gradient())
    torch.testing.assert_close(R.hessian_action(m, d), problem.hessian_action(m, d))
    by_hand = 0.7 * (0.25 * m - torch.sin(1.6 * m) / 1.6)
    torch.testing.assert_close(R.gradient(m), by_hand)


def test_the_caller_s_energy_stays_as_it_was() -> None:
    energy = Wave()
    Learned(energy, Euclidean(4), (2, 2))
    assert energy.b.dtype == torch.float32 and energy.b.requires_grad and energy.training


@pytest.mark.parametrize("space", [Euclidean(6), Diagonal(torch.linspace(0.5, 2.0, 6, dtype=torch.float64))])
def test_the_prox_solves_its_own_equation(space: Space) -> None:
    R, m, step = Learned(Wave(), space, (2, 3), weight=0.4, tolerance=1e-9), point(), 1.1
    z = R.prox(m, step)
    weights = space.gram(torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(weights * (z - m) / step, -0.4 * (0.25 * z - torch.sin(z)), rtol=0, atol=1e-8)


def test_the_guarantee_scales_with_the_weight_alone() -> None:
    found = Learned(Wave(), Euclidean(4), (2, 2), weight=0.5, scale=3.0).guarantee()
    assert (found.modulus, found.lipschitz, found.coercive) == (0.375, 0.625, True)
    assert Wave(1.0).guarantee().convex and not NOTHING.convex
    with pytest.raises(GliodeError, match="not negative"):
        Guarantee(-1.0, 1.0, False)


def test_weights_beyond_the_certified_range_are_refused_with_the_range() -> None:
    R = Learned(Wave(), Euclidean(4), (2, 2), weight=1.5)
    R.require_convex(1.5 * 0.75)
    with pytest.raises(GliodeError, match=r"weight 1.5 times its modulus .* at most 1.333"):
        R.require_convex(1.0)
    with pytest.raises(GliodeError, match="the prox"):
        R.prox(point(4), 1.0)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(GliodeError, match="two axes"):
        Learned(Wave(), Euclidean(4))
    with pytest.raises(GliodeError, match=r"shape \(2, 3\) for 4 unknowns"):
        Learned(Wave(), Euclidean(4), (2, 3))
    with pytest.raises(GliodeError, match="weight must be positive"):
        Learned(Wave(), Euclidean(4), (2, 2), weight=0.0)
    with pytest.raises(GliodeError, match="scale must be positive"):
        Learned(Wave(), Euclidean(4), (2, 2), scale=-1.0)
    with pytest.raises(GliodeError, match="not found in 1 iterations"):
        Learned(Wave(), Euclidean(4), (2, 2), weight=0.5, iterations=1).prox(5 * point(4), 1.0)
