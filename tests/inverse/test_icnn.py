"""Input-convex networks: convex for any weights, with the Lipschitz gradient that is said."""

import pytest
import torch
from torch import Tensor

from inverse.optimizers import quasi_newton
from inverse.problem import LeastSquares
from inverse.regularizers.learned.energy import Learned
from inverse.regularizers.learned.icnn import ICNN
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Euclidean


def rough(seed: int, **options: int | float) -> ICNN:
    """With weights of any size and sign."""
    torch.manual_seed(seed)
    energy = ICNN(**options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in energy.parameters():
            p.add_(3 * torch.randn_like(p))
    return energy


def hessian(energy: ICNN, x: Tensor) -> Tensor:
    """Dense, by the tape."""
    n = x.numel()
    found = torch.autograd.functional.hessian(lambda m: energy(m.reshape(1, *x.shape))[0], x.reshape(n))
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hessians_have_no_eigenvalue_below_the_squares_nor_above_the_bound(seed: int) -> None:
    energy = rough(seed, channels=3, size=3, layers=3, squares=0.01)
    g = energy.guarantee()
    x = 2 * torch.randn(7, 6, dtype=torch.float64)
    values = torch.linalg.eigvalsh(hessian(energy, x))
    scale = float(values[-1])
    assert scale > 0.1
    assert float(values[0]) >= 0.01 - 1e-12 * scale
    assert scale <= g.lipschitz
    assert g.convex and g.coercive


def test_every_secant_lies_above() -> None:
    energy = rough(3, channels=4, layers=4)
    ends = 3 * torch.randn(2, 200, 12, 11, dtype=torch.float64)
    t = torch.rand(200, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        inside = energy(torch.lerp(ends[0], ends[1], t))
        secant = torch.lerp(energy(ends[0]), energy(ends[1]), t[:, 0, 0])
    assert bool((inside < secant).all())


def test_volumes_are_as_good() -> None:
    energy = rough(4, dim=3, channels=2, size=3, layers=2, squares=0.02)
    values = torch.linalg.eigvalsh(hessian(energy, torch.randn(4, 4, 5, dtype=torch.float64)))
    assert float(values[0]) >= 0.02 - 1e-9
    assert float(values[-1]) <= energy.guarantee().lipschitz


def test_the_bound_is_attained_by_one_layer() -> None:
    """At x = 0 without biases R'' = w s''(0) K^T K + squares, and s'' is largest at 0."""
    torch.manual_seed(5)
    energy = ICNN(channels=1, size=3, layers=1, squares=0.5).double()
    values = torch.linalg.eigvalsh(hessian(energy, torch.zeros(20, 20, dtype=torch.float64)))
    lipschitz = energy.guarantee().lipschitz
    assert 0.95 * lipschitz <= float(values[-1]) <= lipschitz


def test_constants_are_not_seen_but_by_the_squares() -> None:
    energy = rough(6, squares=0.0)
    x = torch.randn(2, 14, 15, dtype=torch.float64)
    torch.testing.assert_close(energy(x + 7.0), energy(x))
    assert not energy.guarantee().coercive


def test_there_is_one_minimiser_wherever_one_starts() -> None:
    energy = rough(7, channels=2, size=3, layers=2, squares=0.1)
    R = Learned(energy, Euclidean(36), (6, 6), weight=0.5)
    y = torch.randn(36, dtype=torch.float64)
    problem = LeastSquares(Euclidean(36), lambda m: m[:10], y[:10], 0.1, R)
    rules = (GradientTolerance(1e-9), MaxIterations(2000))
    found = [
        quasi_newton.minimise(problem, far * torch.randn(36, dtype=torch.float64), stopping=rules).m
        for far in (0.1, 1.0, 10.0)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(GliodeError, match="0 layers"):
        ICNN(layers=0)
    with pytest.raises(GliodeError, match="squares must be finite"):
        ICNN(squares=-1.0)
    with pytest.raises(GliodeError, match="odd size"):
        ICNN(size=4)
