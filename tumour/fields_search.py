r"""Finding coefficient fields: Newton-CG in the metric of the penalty, alpha by the discrepancy principle.

    min_m  1/2 ||(F(m) - y) / sd||^2 + alpha R(m),    alpha such that the first norm is tau sqrt(data)

with, for each field a,

    h1   R = 1/2 int |grad a|^2 + a^2 / length^2
    tv   R = int sqrt(|grad a|^2 + EDGE^2) + PULL / 2 a^2
    learned   a trained R on meshes (tumour.fields_learned)

and by tissue R = 1/2 |a|^2 / spread^2 with alpha = 1, a prior: few numbers need no alpha. Newton-CG is
preconditioned by the metric in which R is regularized; that of the total variation is H1 with the weight
1 / sqrt(|grad a|^2 + EDGE^2) in each cell (lagged diffusivity: Vogel and Oman 1996), renewed every few steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from inverse.choice import ChoiceError, discrepancy
from inverse.optimizers import newton_cg
from inverse.problem import LeastSquares
from inverse.regularizers.gaussian import GaussianPrior
from inverse.regularizers.tikhonov import Tikhonov
from inverse.regularizers.total_variation import TotalVariation
from inverse.stopping import GradientTolerance, MaxIterations
from inverse.uncertainty.low_rank import LowRankLaplace, laplace
from solvers.errors import GliodeError
from solvers.fem.gradients import Gradient
from solvers.fem.spaces import lumped
from solvers.fem.weighted import WeightedSobolev
from solvers.spaces import Euclidean, GramSpace, Product
from tumour.fields import TISSUES, Coefficients, FieldMap
from tumour.fields_learned import LearnedPenalty

Kind = Literal["h1", "tv", "learned"]

EDGE = 0.02
"""1/mm: slopes of log D below this are no edges to the total variation, which is smooth there."""

PULL = 2e-3
"""1/mm: the weight of a^2 beside the total variation: it decides only where the data say nothing."""


class Penalty:
    """R of all fields at once, on the tape, and its metric at a point."""

    def __init__(self, coefficients: Coefficients, kind: Kind, length: float, spread: float) -> None:
        self.coefficients, self.kind, self._spread = coefficients, kind, spread
        self._by_tissue = coefficients.by == "tissue"
        self.quadratic = self._by_tissue or kind == "h1"
        if not self._by_tissue:
            domain = coefficients.domain
            self._metric = WeightedSobolev(domain, length**-2 if kind == "h1" else PULL)
            if kind == "tv":
                self._variation = TotalVariation(Gradient(domain), smoothing=EDGE, lagged=True)
                self._pull = Tikhonov(lumped(domain), PULL)

    def metrics(self, m: Tensor) -> list[WeightedSobolev]:
        """Of each field at m."""
        if self.quadratic:
            return [self._metric for _ in self.coefficients.of]
        parts = self.coefficients.parts(m.detach()).values()
        return [self._metric.weighted((self._metric.energy(a) + EDGE**2).rsqrt()) for a in parts]

    def space(self, m: Tensor) -> Product:
        """In which R near m is 1/2 ||m||^2: exactly for h1, for tv as its lagged diffusivity."""
        of = self.coefficients.of
        if self._by_tissue:
            return Product(dict.fromkeys(of, Euclidean(len(TISSUES), self._spread)))
        return Product({name: g.space for name, g in zip(of, self.metrics(m), strict=True)})

    def weighted(self, alpha: float) -> Callable[[Tensor], Tensor]:
        """alpha R, on the tape."""
        if self.quadratic:
            return Tikhonov(self.space(torch.zeros(0)), alpha)
        return lambda m: (
            alpha
            * sum(
                (self._variation(a) + self._pull(a) for a in self.coefficients.parts(m).values()),
                torch.zeros((), dtype=torch.float64),
            )
        )

    def prior(self, m: Tensor, alpha: float) -> GaussianPrior:
        """N(0, (alpha G)^-1), G the metric at m: what the regularizer amounts to as a prior there."""
        space, root = self.space(m), math.sqrt(alpha)
        scaled = GramSpace(
            space.size, lambda a: alpha * space.gram(a), lambda d: space.riesz(d) / alpha, space.comm
        )
        if self._by_tissue:

            def draw(generator: torch.Generator) -> Tensor:
                return (
                    self._spread / root * torch.randn(space.shape, dtype=torch.float64, generator=generator)
                )
        else:
            metrics = self.metrics(m)

            def draw(generator: torch.Generator) -> Tensor:
                return torch.cat([metric.sample(generator) for metric in metrics]) / root

        return GaussianPrior(scaled, 0.0, draw)


@dataclass(frozen=True)
class FieldSettings:
    """How to find fields.

    kind: "h1", "tv" or "learned"; weights: of the learned one, None: those that come with Gliode; length: mm,
    of H1 (of the learned one's metric); spread: prior standard deviation of a tissue's log departure; tau:
    of the discrepancy principle, above 1; max_iterations: Gauss-Newton steps for one alpha.
    """

    kind: Kind = "h1"
    length: float = 20.0
    spread: float = 1.0
    tau: float = 1.05
    max_iterations: int = 40
    weights: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("h1", "tv", "learned"):
            raise GliodeError(f"fields: regularizer {self.kind!r} is not 'h1', 'tv' or 'learned'")
        if self.weights is not None and self.kind != "learned":
            raise GliodeError(f"fields.weights: {self.kind} has none; take 'learned', or leave them out")
        for name in ("length", "spread"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise GliodeError(f"fields.{name}: {getattr(self, name)} must be positive and finite")
        if not self.tau > 1:
            raise GliodeError(f"fields.tau: {self.tau} must be above 1; 1.05 is usual")
        if self.max_iterations < 1:
            raise GliodeError("fields.max_iterations must be at least 1")


@dataclass(frozen=True)
class Solved:
    """The minimiser for one alpha; iterations: Gauss-Newton steps it took."""

    m: Tensor
    value: float
    residual_norm: float
    iterations: int


@dataclass(frozen=True)
class FoundFields:
    """What was found.

    m: the departures; alpha: and how it was chosen (`why`, one sentence; `trail`: all that were tried); met:
    whether the discrepancy is met; residual_norm, data: ||r|| and how many data; counts: solves.
    """

    m: Tensor
    alpha: float
    why: str
    met: bool
    trail: list[dict[str, float]]
    residual_norm: float
    data: int
    counts: dict[str, int]
    history: list[dict[str, float]]


Save = Callable[[dict[str, np.ndarray]], None]
GAP = 1e-4
"""A minimum is reached when J can fall by no more than this share of data / 2."""
CLOSE = 1e-3
"""How near ||r|| comes to tau sqrt(data), relative: errors of a field still move a lot within 1 %."""
LEAST = 0.1
"""Directions of which the data say less than this share of the prior keep the prior's variance."""
STEPS = 4
"""Newton steps in one metric of the total variation."""


class FieldSearch:
    """The search; given a saved state in `resume`, it goes on from there to the same numbers."""

    def __init__(
        self,
        forward: FieldMap,
        settings: FieldSettings,
        save: Save | None = None,
        resume: Mapping[str, np.ndarray] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.forward, self.settings = forward, settings
        self.penalty: Penalty | LearnedPenalty
        if settings.kind == "learned":
            self.penalty = LearnedPenalty(forward.coefficients, settings.weights, settings.length)
        else:
            self.penalty = Penalty(forward.coefficients, settings.kind, settings.length, settings.spread)
        self._save, self._progress = save, progress
        self._memory: dict[str, np.ndarray] = dict(resume or {})
        self.counts = {"forward": 0, "adjoint": 0, "tangent": 0}
        self.history: list[dict[str, float]] = []
        self._tried = 0

    def run(self) -> FoundFields:
        """Find alpha and the fields; where no alpha meets the discrepancy, the nearest, and `why` says so."""
        coefficients = self.forward.coefficients
        start = torch.zeros(len(coefficients.of) * coefficients.size, dtype=torch.float64)
        delta = math.sqrt(len(self.forward.data))
        if coefficients.by == "tissue":
            at = self.solve(1.0, start)
            found: tuple[float, Tensor, float, str, bool, list[dict[str, float]]]
            found = 1.0, at.m, at.residual_norm, "a prior on few numbers: no alpha to choose", True, []
        else:
            try:
                choice = discrepancy(
                    self.solve, start, delta, self.settings.tau, self._first(start), tolerance=CLOSE
                )
                result = choice.result
                assert choice.alpha is not None and result is not None and result.residual_norm is not None
                found = choice.alpha, choice.solution, result.residual_norm, choice.why, True, choice.trail
            except ChoiceError as error:
                best = error.best
                found = best.at, best.m, best.residual_norm, str(error), False, error.trail
        alpha, m, norm, why, met, trail = found
        if isinstance(self.penalty, LearnedPenalty):
            why = f"{why}. {self.penalty.said(m)}"
        return FoundFields(m, alpha, why, met, trail, norm, len(self.forward.data), self.counts, self.history)

    def _first(self, start: Tensor) -> float:
        """An alpha of the right order: the first step's fall of the misfit is what the penalty takes."""
        if isinstance(self.penalty, LearnedPenalty):
            return 1.0  # as it was trained
        kept = self._memory.get("first")
        if kept is None:
            problem = self._problem(start, 1.0)
            here = problem.evaluate(start)
            slope = problem.space.dual_norm(here.gradient())
            kept = np.array(0.02 * slope**2 / max(here.misfit, 1e-300))
            self._keep({"first": kept})
        return float(kept)

    def _problem(self, m: Tensor, alpha: float) -> LeastSquares:
        """The problem for one alpha, in the metric at m."""
        data, noise = self.forward.data, self.forward.noise
        return LeastSquares(self.penalty.space(m), self.forward, data, noise, self.penalty.weighted(alpha))

    def solve(self, alpha: float, start: Tensor) -> Solved:
        """The minimiser for one alpha, from a start."""
        self._tried += 1
        key = f"alpha{self._tried}"
        done = self._memory.get(f"{key}.m")
        if done is not None and bool(self._memory[f"{key}.done"]):
            value, norm, steps = self._memory[f"{key}.numbers"]
            return Solved(torch.from_numpy(done), float(value), float(norm), int(steps))
        m = start if done is None else torch.from_numpy(done)
        steps = 0 if done is None else int(self._memory[f"{key}.numbers"][2])
        value = math.inf if done is None else float(self._memory[f"{key}.numbers"][0])
        gap = GAP * len(self.forward.data) / 2
        limit = GradientTolerance(0.0, math.sqrt(2 * alpha * gap))
        most = self.settings.max_iterations
        while True:
            count = min(most - steps, most if self.penalty.quadratic else STEPS)
            result = newton_cg.minimise(self._problem(m, alpha), m, stopping=(limit, MaxIterations(count)))
            for name in self.counts:
                self.counts[name] += result.counts[name]
            m, norm = result.m, float(result.residual_norm or 0.0)
            steps += result.iterations
            before, value = value, result.value
            finished = self.penalty.quadratic or before - value <= gap or steps >= most
            self.history += [
                {
                    "alpha": alpha,
                    "residual_norm": math.sqrt(2 * row["misfit"]),
                    "gradient_norm": row["gradient_norm"],
                }
                for row in result.history[1:]
            ]
            numbers = np.array([value, norm, steps])
            self._keep({f"{key}.m": m.numpy(), f"{key}.numbers": numbers, f"{key}.done": np.array(finished)})
            if self._progress is not None:
                self._progress(f"alpha {alpha:.3g}: step {steps}, ||r|| {norm:.5g}")
            if finished:
                return Solved(m, value, norm, steps)

    def _keep(self, more: dict[str, np.ndarray]) -> None:
        self._memory.update(more)
        if self._save is not None:
            self._save(self._memory)

    def posterior(self, found: FoundFields, least: float = LEAST) -> LowRankLaplace:
        """The Laplace posterior at what was found, with the penalty there as the prior; see `laplace`."""
        prior = self.penalty.prior(found.m, found.alpha)
        problem = LeastSquares(prior.space, self.forward, self.forward.data, self.forward.noise, prior)
        return laplace(problem, prior, found.m, least)
