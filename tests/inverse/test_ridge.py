"""Ridge regularizers: derivatives, and guarantees against dense Hessians and random secants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inverse.optimizers import quasi_newton
from inverse.problem import LeastSquares
from inverse.regularizers.learned.energy import Energy, Learned
from inverse.regularizers.learned.ridge import FieldsOfExperts, Ridge, cosines
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Euclidean

CONVEX: dict[str, Any] = {"potential": "smooth_l1", "a": 8.0, "h": 5.0}
WEAKLY: dict[str, Any] = {"potential": "saturating", "a": 8.0, "h": 5.0}
SPLINE: dict[str, Any] = {"potential": "spline", "a": 4.0, "h": 5.0, "modulus": 1.0}
SMOOTH: dict[str, Any] = {"potential": "log_cosh", "a": 3.0, "h": 5.0}


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(energy: Energy, size: float = 0.3, seed: int = 0) -> Energy:
    energy = energy.double()
    for p in energy.parameters():
        p.data += size * random(tuple(p.shape), seed)
    return energy


def planar(options: dict[str, Any]) -> Energy:
    return shaken(Ridge((6,), (3,), **options))


def solid(options: dict[str, Any]) -> Energy:
    torch.manual_seed(0)  # a chain starts with random numbers
    return shaken(Ridge((2, 4), (3, 1), 3, **options))


def hessian(energy: Energy, x: Tensor) -> Tensor:
    """Dense, by torch's own double backward of the definition."""
    found: Any = torch.autograd.functional.hessian(lambda z: energy(z[None])[0], x)
    return found.reshape(x.numel(), x.numel())


def definition(energy: Ridge, x: Tensor) -> Tensor:
    """Window by window."""
    kernel, size = energy.kernel(), energy.conv.size
    windows = x
    for axis in range(1, x.ndim):
        windows = windows.unfold(axis, size, 1)
    axes = tuple(range(-(x.ndim - 1), 0))
    responses = torch.stack([(windows * k[0]).sum(axes) for k in kernel], 1)
    return energy.potential(responses).flatten(1).sum(1)


@pytest.mark.parametrize("make", [planar, solid])
@pytest.mark.parametrize("options", [CONVEX, WEAKLY, SPLINE, SMOOTH])
def test_value_and_gradients_are_those_of_the_definition(make: Any, options: dict[str, Any]) -> None:
    energy = make(options)
    x = random((2, 7, 6) if make is planar else (2, 5, 4, 6), 1)
    torch.testing.assert_close(energy(x), definition(energy, x))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(definition(energy, leaf).sum(), leaf)
    torch.testing.assert_close(energy.gradient(x), expected)
    # with frozen weights value and slope are made in one sweep, in parts
    frozen = make(options).requires_grad_(False)
    torch.testing.assert_close(frozen(x), energy(x).detach())
    (swept,) = torch.autograd.grad(frozen(leaf).sum(), leaf, create_graph=True)
    torch.testing.assert_close(swept.detach(), expected)
    d = random(tuple(x.shape), 2)
    actions = [
        torch.autograd.grad(g, leaf, d)[0]
        for g in (swept, torch.autograd.grad(definition(energy, leaf).sum(), leaf, create_graph=True)[0])
    ]
    torch.testing.assert_close(*actions)


@pytest.mark.parametrize("make", [planar, solid])
def test_parameters_have_the_gradient_of_differences(make: Any) -> None:
    energy, x = make(SMOOTH), random((2, 5, 5, 4)[: 3 if make is planar else 4], 1)
    parameters = list(energy.parameters())
    for of in (lambda: energy(x).sum(), lambda: (energy.gradient(x) * x).sum()):
        gradients = torch.autograd.grad(of(), parameters)
        for p, g in zip(parameters, gradients, strict=True):
            d = random(tuple(p.shape), 3)
            ends = []
            for h in (1e-5, -1e-5):
                p.data.add_(d, alpha=h)
                ends.append(float(of()))
                p.data.sub_(d, alpha=h)
            assert float((g * d).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("make", [planar, solid])
@pytest.mark.parametrize("options", [CONVEX, WEAKLY, SPLINE, SMOOTH])
def test_guarantee_holds_of_dense_hessians_and_of_secants(make: Any, options: dict[str, Any]) -> None:
    energy = make(options)
    found = energy.guarantee()
    assert found.modulus <= 1 and found.convex == (options in (CONVEX, SMOOTH))
    shape = (6, 7) if make is planar else (4, 4, 4)
    for seed in range(3):
        for size in (0.05, 0.3, 2.0):
            values = torch.linalg.eigvalsh(hessian(energy, size * random(shape, seed)))
            assert -found.modulus - 1e-9 <= float(values[0]) and float(values[-1]) <= found.lipschitz + 1e-9
    x, z = (0.3 * random((300, *shape), seed) for seed in (5, 6))
    z = x + (z - x) * torch.logspace(-3, 0, 300, dtype=torch.float64).reshape(-1, *(1,) * len(shape))
    with torch.no_grad():
        d, change = (z - x).flatten(1), (energy.gradient(z) - energy.gradient(x)).flatten(1)
    square = d.square().sum(1)
    assert bool(((change * d).sum(1) >= -(found.modulus + 1e-9) * square).all())
    assert bool((change.norm(dim=1) <= (found.lipschitz + 1e-9) * square.sqrt()).all())


def test_guarantee_is_near_what_happens() -> None:
    """At 0 the Hessian of SmoothL1 is h W^T W: its largest eigenvalue is h ||W||^2, which is near h."""
    energy = Ridge((8,), (3,), **CONVEX).double()
    top = float(torch.linalg.eigvalsh(hessian(energy, torch.zeros(12, 12, dtype=torch.float64)))[-1])
    assert 0.85 * energy.guarantee().lipschitz < top <= energy.guarantee().lipschitz
    assert energy.guarantee().lipschitz == pytest.approx(5.0, rel=1e-3)
    # between 1/a and 1/b that of `saturating` is -W^T W
    weakly = Ridge((1,), (3,), **WEAKLY).double()
    slope = torch.arange(12, dtype=torch.float64).expand(12, 12) * 0.5
    for x in (slope, slope.mT):
        if abs(float(torch.linalg.eigvalsh(hessian(weakly, x))[0])) > 1e-9:
            least = float(torch.linalg.eigvalsh(hessian(weakly, x))[0])
    assert -weakly.guarantee().modulus - 1e-9 <= least < -0.5 * weakly.guarantee().modulus


def test_weight_one_makes_denoising_convex_and_more_is_refused() -> None:
    """From two starts to one minimiser; beyond the certified weight the check says no."""
    y, space = 0.5 * random((9, 9), 4), Euclidean(81)
    energy = planar(WEAKLY)
    good = Learned(energy, space, (9, 9), weight=1 / energy.guarantee().modulus)
    good.require_convex(1.0)
    with pytest.raises(GliodeError, match="take a weight of at most"):
        Learned(energy, space, (9, 9), weight=1.01 / energy.guarantee().modulus).require_convex(1.0)
    problem = LeastSquares(space, lambda m: m, y.reshape(-1), 1.0, good)
    ends = [
        quasi_newton.minimise(problem, start, stopping=(GradientTolerance(1e-9), MaxIterations(2000))).m
        for start in (torch.zeros(81, dtype=torch.float64), 3 * random((81,), 8))
    ]
    torch.testing.assert_close(*ends, atol=1e-5, rtol=0)


def test_constants_cost_nothing_and_the_mean_is_kept() -> None:
    energy = planar(CONVEX)
    x = random((1, 8, 8), 1)
    torch.testing.assert_close(energy(x + 5), energy(x))
    assert abs(float(energy.gradient(x).detach().sum())) < 1e-10


def test_kernel_of_frozen_weights_is_made_anew_when_they_change() -> None:
    energy, x = planar(CONVEX).requires_grad_(False), random((1, 6, 6), 1)
    before = float(energy(x))
    energy.load_state_dict(shaken(Ridge((6,), (3,), **CONVEX), 0.3, 7).state_dict())
    after = float(energy(x))
    fresh = shaken(Ridge((6,), (3,), **CONVEX), 0.3, 7)
    assert after == pytest.approx(float(fresh(x).detach()), rel=1e-12) and after != before


def test_cosines_are_orthonormal_and_mean_free() -> None:
    for size, dim in ((5, 2), (3, 3)):
        flat = cosines(size**dim - 1, size, dim).flatten(1)
        torch.testing.assert_close(flat @ flat.mT, torch.eye(len(flat), dtype=torch.float64))
        torch.testing.assert_close(flat.sum(1), torch.zeros(len(flat), dtype=torch.float64))


@pytest.mark.parametrize("energy", [planar(SPLINE), shaken(FieldsOfExperts((4,), (3,), a=2.0))])
def test_settings_make_the_same_energy(energy: Any) -> None:
    again = type(energy)(**energy.settings()).double()
    again.load_state_dict(energy.state_dict())
    x = random((1, 6, 6))
    torch.testing.assert_close(again(x), energy(x))


def test_fields_of_experts_pay_the_logarithm() -> None:
    energy = FieldsOfExperts((4,), (3,), a=3.0, h=2.0).double()
    x = random((2, 6, 5))
    responses = torch.nn.functional.conv2d(x[:, None], energy.kernel())
    expected = 2 / 9 * (1 + 9 * responses.square()).log().flatten(1).sum(1) / 2
    torch.testing.assert_close(energy(x), expected)


def test_bad_settings_and_fields_are_refused() -> None:
    with pytest.raises(GliodeError, match="potential 'cubic' is not one of"):
        Ridge(potential="cubic")
    with pytest.raises(GliodeError, match="options"):
        Ridge(potential="smooth_l1", pieces=3)
    with pytest.raises(GliodeError, match="2 axes of 7"):
        Learned(Ridge(), Euclidean(36), (6, 6))
    with pytest.raises(GliodeError, match="2 axes of 7"):
        Learned(Ridge(), Euclidean(1000), (10, 10, 10))
