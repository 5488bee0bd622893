"""Plug-and-play: where D is a prox the minimiser is known; where it is averaged, what the theory promises."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.nn.functional import conv2d

from inverse.datasets.images import validation_images
from inverse.optimizers import landweber, plug_and_play, proximal
from inverse.optimizers.plug_and_play import averaged
from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.learned import files
from inverse.regularizers.sparsity import Sparsity
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.node.convolution_flow import NonExpansiveDenoiser, mirrored
from solvers.spaces import Euclidean, GramSpace

N = 6
LONG = (GradientTolerance(1e-12), MaxIterations(20000))


def linear(bounds: tuple[float, float] | None = None) -> tuple[LeastSquares, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(9, N, dtype=torch.float64, generator=generator)
    y = torch.randn(9, dtype=torch.float64, generator=generator)
    return LeastSquares(Euclidean(N), lambda m: a @ m, y, 1.0, bounds=bounds), a, y


def pictures(shape: tuple[int, int] = (9, 8)) -> tuple[LeastSquares, NonExpansiveDenoiser]:
    """Half the pixels seen, through a matrix that is not injective; a denoiser of random weights."""
    torch.manual_seed(4)
    size = shape[0] * shape[1]
    a = torch.randn(size // 2, size, dtype=torch.float64) / size**0.5
    y = torch.randn(size // 2, dtype=torch.float64)
    denoiser = NonExpansiveDenoiser(3, 3, "tanh", 2, 0.6).double()
    nn.init.normal_(denoiser.field.K.values)
    return LeastSquares(Euclidean(size), lambda m: a @ m, y, 0.3), denoiser.at(0.5)


class Prox:
    """A firmly non-expansive map."""

    averaged = 0.5

    def __init__(self, of: Sparsity, step: float) -> None:
        self.of, self.step = of, step

    def __call__(self, x: Tensor) -> Tensor:
        return self.of.prox(x[0], self.step)[None]


def test_prox_of_a_quadratic_gives_tikhonovs_minimiser() -> None:
    """D = (I + tau S)^-1: the fixed point solves (A^T A + S) m = A^T y."""
    problem, a, y = linear()
    S, tau = torch.diag(torch.arange(1.0, N + 1)).double(), 0.05
    D = torch.linalg.inv(torch.eye(N, dtype=torch.float64) + tau * S)
    found = plug_and_play.minimise(problem, torch.zeros(N).double(), lambda x: x @ D, tau=tau, stopping=LONG)
    np.testing.assert_allclose(found.m, np.linalg.solve(a.T @ a + S, a.T @ y), rtol=1e-9)
    assert found.stopped_by == "GradientTolerance"


def test_prox_of_a_norm_gives_what_fista_finds() -> None:
    problem, _, _ = linear()
    term, start = Sparsity(problem.space, 1.0), torch.zeros(N).double()
    found = plug_and_play.minimise(problem, start, Prox(term, 0.03), tau=0.03, stopping=LONG)
    expected = proximal.minimise(linear()[0], start, term, stopping=LONG)
    np.testing.assert_allclose(found.m, expected.m, atol=1e-9)
    assert bool((found.m == 0).any())


@pytest.mark.parametrize("relaxation", [None, 0.4, 1.004])
def test_residual_never_rises_and_the_iteration_converges(relaxation: float | None) -> None:
    problem, denoiser = pictures()
    start = torch.randn(72, dtype=torch.float64)
    stopping = (GradientTolerance(1e-6), MaxIterations(3000))
    found = plug_and_play.minimise(problem, start, denoiser, (9, 8), "power", relaxation, stopping)
    residuals = [entry["gradient_norm"] for entry in found.history]
    assert found.stopped_by == "GradientTolerance" and len(residuals) > 20
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(residuals))
    tau = found.state.memory["tau"]
    again = problem.value_and_gradient(found.m)[1]
    moved = denoiser((found.m - tau * again).reshape(1, 9, 8)).reshape(-1)
    assert float((moved - found.m).norm()) <= 1.01e-6 * residuals[0] * float(tau)


def test_strongly_convex_misfits_have_one_fixed_point() -> None:
    _, denoiser = pictures()
    y = torch.randn(72, dtype=torch.float64)
    problem = LeastSquares(Euclidean(72), lambda m: m * 1.0, y, 1.0)
    ends = [
        plug_and_play.minimise(problem, start, denoiser, (9, 8), 0.5, stopping=LONG).m
        for start in (torch.zeros(72).double(), 5 * torch.randn(72, dtype=torch.float64))
    ]
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-9)
    assert float((ends[0] - y).norm()) > 0.1


def test_a_map_that_only_keeps_distances_needs_relaxation() -> None:
    """A quarter turn: 1-Lipschitz, not averaged; on its own it would go round for ever."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    problem = InverseProblem(Euclidean(2), lambda m: 0.0 * m.square().sum())
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = plug_and_play.minimise(problem, start, lambda x: x @ turn, tau=1.0, stopping=LONG)
    assert float(found.m.norm()) < 1e-10
    with pytest.raises(GliodeError, match=r"relaxation 1 does not lie between 0 and 1,"):
        plug_and_play.minimise(problem, start, lambda x: x @ turn, tau=1.0, relaxation=1.0)


def test_constants_of_compositions() -> None:
    """N firmly non-expansive maps: N / (N + 1); two: Ogura and Yamada's (a + b - 2ab) / (1 - ab)."""
    assert averaged([0.5] * 4) == pytest.approx(4 / 5)
    a, b = 0.3, 0.8
    assert averaged([a, b]) == pytest.approx((a + b - 2 * a * b) / (1 - a * b))
    assert averaged([0.2, 1.0]) == 1.0


def test_bounds_are_kept() -> None:
    """With D the identity it is projected gradient descent."""

    class Same:
        averaged = 0.01

        def __call__(self, x: Tensor) -> Tensor:
            return x

    start = torch.zeros(N).double()
    found = plug_and_play.minimise(linear((-0.1, 0.2))[0], start, Same(), stopping=LONG)
    expected = landweber.minimise(linear((-0.1, 0.2))[0], start, stopping=LONG)
    np.testing.assert_allclose(found.m, expected.m, atol=1e-9)
    assert float(found.m.max()) == 0.2


def test_steps_are_those_of_the_space() -> None:
    gram = torch.diag(torch.arange(1.0, N + 1)).double() + 0.3
    space = GramSpace(N, lambda v: gram @ v, lambda d: torch.linalg.solve(gram, d))
    _, a, y = linear()
    problem = LeastSquares(space, lambda m: a @ m, y, 1.0)
    start = torch.ones(N).double()
    found = plug_and_play.minimise(problem, start, lambda x: x / 2, tau=0.01, stopping=MaxIterations(1))
    step = (start - 0.01 * torch.linalg.solve(gram, a.T @ (a @ start - y))) / 2
    np.testing.assert_allclose(found.m, (start + step) / 2, rtol=1e-10)  # relaxed: nothing is known of D
    assert found.history[0]["gradient_norm"] == pytest.approx(space.norm(start - step) / 0.01)


def test_a_run_goes_on_where_it_ended() -> None:
    problem, denoiser = pictures()
    start, whole = torch.zeros(72).double(), MaxIterations(12)
    at_once = plug_and_play.minimise(problem, start, denoiser, (9, 8), stopping=whole)
    part = plug_and_play.minimise(problem, start, denoiser, (9, 8), stopping=MaxIterations(5))
    resumed = plug_and_play.minimise(problem, part.state_dict(), denoiser, (9, 8), stopping=whole)
    assert torch.equal(resumed.m, at_once.m) and resumed.iterations == 12
    assert at_once.counts["adjoint"] - part.counts["adjoint"] == 7


def test_what_cannot_converge_is_refused() -> None:
    problem, a, _ = linear()
    start = torch.zeros(N).double()
    most = 2 / float(torch.linalg.eigvalsh(a.T @ a).max())
    for tau in (1.05 * most, 0.0, -1.0):
        with pytest.raises(GliodeError, match="does not lie between 0 and 2"):
            plug_and_play.minimise(problem, start, lambda x: x, tau=tau)
    with pytest.raises(GliodeError, match="'big'"):
        plug_and_play.minimise(problem, start, lambda x: x, tau="big")
    with pytest.raises(GliodeError, match=r"fields of shape \(2, 2\) for 6"):
        plug_and_play.minimise(problem, start, lambda x: x, (2, 2))
    with pytest.raises(GliodeError, match="must return the same"):
        plug_and_play.minimise(problem, start, lambda x: x[:, 1:])
    with pytest.raises(GliodeError, match="must return the same"):
        plug_and_play.minimise(problem, start, lambda x: x.float())


def test_shipped_denoiser_keeps_its_word() -> None:
    """Its norms by scipy's SVD of dense matrices; noise of three levels falls by what one training gave."""
    denoiser, card = files.load(files.shipped("pnp"), units="1")
    assert isinstance(denoiser, NonExpansiveDenoiser) and card.guarantee is None
    flow = denoiser.field
    with torch.no_grad():
        for k in flow.K.values[::4].double():
            unit = torch.eye(15 * 14, dtype=torch.float64).reshape(-1, 1, 15, 14)
            K = conv2d(mirrored(unit, flow.size // 2), flow.bank(k)).flatten(1)
            assert float(svds(K.numpy(), 1, return_singular_vectors=False)[0]) <= (2 * denoiser.each) ** 0.5
        truths = validation_images(64)
        for sigma, gain in ((10 / 255, 2.0), (25 / 255, 5.0), (40 / 255, 6.0)):
            generator = torch.Generator().manual_seed(6)
            noisy = truths + sigma * torch.randn(truths.shape, generator=generator, dtype=torch.float64)
            error = (denoiser.at(1.2 * sigma)(noisy) - truths).square().mean()
            assert -10 * math.log10(float(error) / sigma**2) > gain
