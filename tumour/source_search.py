r"""The search for a source: as a field, as a sparse field, or as points; every run says what stopped it.

    field    m with u(0) = positive(m), in L2 (or H1 of a length in mm), by nonlinear conjugate gradients
             from m = 0, stopped at ||r|| <= tau delta: the stopping index is the regularization
    sparse   u(0) >= 0 itself, 1/2 ||r||^2 + alpha int u(0), by FISTA; alpha is quartered, warm-started,
             from what allows no source at all on until ||r|| <= tau delta
    points   u(0) = sum_i a_i seed(x - c_i), the model's own seed: (c_i, log a_i) by Levenberg-Marquardt from
             the largest foci of the field, and on white residuals, for nothing is regularized there

Each begins with a field at ||r|| <= 1.2 delta, at which the defect of the mesh is taken. A field may have a
regularizer in place of early stopping (tumour/source_prior.py); its alpha is then that of the discrepancy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from inverse.choice import discrepancy
from inverse.optimizers import conjugate_gradients, gauss_newton, proximal, quasi_newton
from inverse.optimizers.iteration import Result
from inverse.problem import LeastSquares
from inverse.regularizers.sparsity import Sparsity
from inverse.stopping import Discrepancy, GradientTolerance, MaxIterations, State, StepTolerance
from inverse.uncertainty import Laplace
from solvers.errors import GliodeError
from solvers.fem.spaces import lumped, sobolev
from solvers.spaces import Space
from tumour.source import SourceProblem, positive
from tumour.source_foci import Focus, foci_of
from tumour.source_points import Points, starts_of
from tumour.source_prior import RULES, of_source, penalty_of, problem_with, smoothed_norm

Unknown = Literal["field", "sparse", "points"]
Regularizer = Literal["stopping", "h1", "tv", "learned"]

FIRST_TAU, FIRST_ITERATIONS = 1.2, 12
"""Of the field at which the defect is taken."""

FIRST_ALPHA = {"h1": 1.0, "tv": 0.03, "learned": 1.0}
"""Of the search for alpha, near what is usual at 5 % noise."""

INNER, QUARTERINGS = 150, 8
"""Sparse: iterations for one alpha, and how often it is quartered."""


@dataclass(frozen=True)
class Settings:
    """How to search. length: mm of the H1 gradient, 0 for L2; foci: how many points; starts: from how many
    sets of foci their search begins; tau: of the discrepancy principle; level: share of the largest density
    above which a focus is told from its surroundings; regularizer: of a field; weights: the file of a learned
    one, None: those that come with Gliode.
    """

    unknown: Unknown = "field"
    regularizer: Regularizer = "stopping"
    weights: str | None = None
    length: float = 0.0
    foci: int = 1
    starts: int = 3
    tau: float = 1.05
    max_iterations: int = 100
    level: float = 0.5

    def __post_init__(self) -> None:
        if self.unknown not in get_args(Unknown):
            raise GliodeError(
                f"locate.unknown: {self.unknown!r} is not one of {', '.join(get_args(Unknown))}"
            )
        if self.regularizer not in get_args(Regularizer):
            raise GliodeError(
                f"locate.regularizer: {self.regularizer!r} is not one of {', '.join(get_args(Regularizer))}"
            )
        if self.regularizer != "stopping" and self.unknown != "field":
            raise GliodeError(
                f"locate.regularizer: {self.regularizer} is for unknown: field, not {self.unknown}"
            )
        if self.regularizer != "stopping" and self.length > 0:
            raise GliodeError("locate.length: only early stopping works in H1; leave it out")
        if self.weights is not None and self.regularizer != "learned":
            raise GliodeError("locate.weights: only for regularizer: learned; leave it out")
        if not (math.isfinite(self.length) and self.length >= 0):
            raise GliodeError(f"locate.length: {self.length} mm must not be negative")
        if min(self.foci, self.starts, self.max_iterations) < 1:
            raise GliodeError("locate: foci, starts and max_iterations must be at least 1")
        if not self.tau > 1:
            raise GliodeError(f"locate.tau: {self.tau} must be above 1; 1.05 is usual")
        if not 0 < self.level < 1:
            raise GliodeError(f"locate.level: {self.level} is not in (0, 1)")


@dataclass(frozen=True)
class Source:
    """What was found.

    u: u(0), (owned dofs,); m: the unknown behind it; foci: see `foci_of` (of points: the points);
    residual_norm and delta: ||r|| in the search's own residuals and its noise level; stopping: the rule and
    its numbers, for `sparse` alpha too; counts: all solves; forward_equivalents: them and the defects;
    history: of the search itself, `first` that before the defect; states: at the scans' days; defect: by
    which the data were corrected, (data,); posterior: of points.
    """

    unknown: Unknown
    u: Tensor
    m: Tensor
    foci: list[Focus]
    residual_norm: float
    delta: float
    data: int
    stopping: dict[str, Any]
    counts: dict[str, int]
    forward_equivalents: float
    history: list[dict[str, float]]
    first: list[dict[str, float]]
    states: list[Tensor]
    defect: Tensor
    posterior: Laplace | None = None


Save = Callable[[dict[str, np.ndarray]], None]


@dataclass
class Locator:
    """The search; given a saved memory in `resume`, it goes on from there to the same numbers.

    save: called after each iteration with a flat dict of arrays, those of shape (owned dofs,) a rank's part;
    progress: called with a line of text and the iteration; watch: with each State of the search itself.
    """

    problem: SourceProblem
    settings: Settings = field(default_factory=Settings)
    save: Save | None = None
    resume: Mapping[str, np.ndarray] | None = None
    progress: Callable[[str, int], None] | None = None
    watch: Callable[[State], object] | None = None

    def __post_init__(self) -> None:
        self._memory: dict[str, np.ndarray] = dict(self.resume or {})
        self._counts = dict.fromkeys(("forward", "adjoint", "tangent"), 0)
        self._defects = 0
        domain, length = self.problem.domain, self.settings.length
        self.space: Space = sobolev(domain, length) if length > 0 else lumped(domain)

    def run(self) -> Source:
        """Search."""
        first, e = self.corrected()
        search = {"field": self._field, "sparse": self._sparse, "points": self._points}
        return search[self.settings.unknown](first, e)

    def corrected(self) -> tuple[Result, Tensor]:
        """A first field, at ||r|| <= 1.2 delta, and the defect (data,) there."""
        rules = (Discrepancy(FIRST_TAU, self.problem.delta), MaxIterations(FIRST_ITERATIONS))
        zero = torch.zeros_like(self.problem.data)
        # Both searches by conjugate gradients begin at m = 0, a density of w ln 2 = 0.007 everywhere.
        first = self._minimise(
            "first", conjugate_gradients.minimise, self.field_problem(zero), self.start, rules
        )
        return first, self._defect("first", positive(first.m))

    @property
    def start(self) -> Tensor:
        """m = 0."""
        return self.space.zeros()

    def field_problem(self, defect: Tensor) -> LeastSquares:
        """The problem of the field m in the search's space, its data less a defect (data,)."""
        return self._least_squares(self.space, positive, defect)

    def _least_squares(
        self, space: Space, source: Callable[[Tensor], Tensor], defect: Tensor
    ) -> LeastSquares:
        p = self.problem

        def forward(m: Tensor) -> Tensor:
            return p.smooth(p.growing.images(source(m)) / p.sd)

        return LeastSquares(space, forward, p.smooth((p.data - defect) / p.sd), 1.0)

    def _rules(self) -> tuple[Discrepancy, MaxIterations]:
        return Discrepancy(self.settings.tau, self.problem.delta), MaxIterations(self.settings.max_iterations)

    def _field(self, first: Result, e: Tensor) -> Source:
        if self.settings.regularizer != "stopping":
            return self._regularized(first, e)
        problem = self.field_problem(e)
        found = self._minimise("field", conjugate_gradients.minimise, problem, self.start, self._rules())
        return self._source(positive(found.m), found, first, e)

    def _regularized(self, first: Result, e: Tensor) -> Source:
        p, settings = self.problem, self.settings
        assert settings.regularizer != "stopping"
        penalty = penalty_of(settings.regularizer, p.domain, settings.weights)
        tried: list[Result] = []

        def solve(alpha: float, start: Tensor) -> Result:
            problem = problem_with(p, e, of_source(penalty, alpha))
            found = self._minimise(f"alpha{len(tried)}", quasi_newton.minimise, problem, start, RULES)
            norm = smoothed_norm(p, e, positive(found.m))
            self._counts["forward"] += 1
            history = [{**row, "alpha": alpha} for row in found.history]
            tried.append(replace(found, residual_norm=norm, history=history))
            return tried[-1]

        chosen = discrepancy(solve, self.start, p.delta, settings.tau, FIRST_ALPHA[settings.regularizer])
        found = chosen.result
        assert isinstance(found, Result) and chosen.alpha is not None
        source = self._source(positive(found.m), found, first, e)
        rows = [row for one in tried for row in one.history]
        history = [{**row, "iteration": float(place)} for place, row in enumerate(rows)]
        stopping = {"rule": "Discrepancy", "alpha": chosen.alpha, "tau": settings.tau, "delta": p.delta}
        return replace(source, history=history, stopping=stopping)

    def _sparse(self, first: Result, e: Tensor) -> Source:
        space = lumped(self.problem.domain)
        problem = self._least_squares(space, _not_negative, e)
        u = space.zeros()
        # Below this weight the empty source is no longer the best: the largest slope at zero, per volume.
        slope = self._kept("slope", lambda: space.riesz(-problem.evaluate(u).gradient()))
        self._counts["forward"] += 1
        self._counts["adjoint"] += 1
        alpha = _largest(slope, space)
        rules = (*self._rules()[:1], StepTolerance(1e-4), MaxIterations(INNER))
        history: list[dict[str, float]] = []
        for k in range(QUARTERINGS):
            alpha /= 4
            penalty = Sparsity(space, alpha, positive=True)
            minimise = partial(proximal.minimise, nonsmooth=penalty)
            found = self._minimise(f"sparse{k}", minimise, problem, u, rules)
            history += [{**row, "alpha": alpha} for row in found.history[1 if k else 0 :]]
            u = found.m
            if found.stopped_by == "Discrepancy":
                break
        source = self._source(u, found, first, e)
        history = [{**row, "iteration": float(place)} for place, row in enumerate(history)]
        return replace(source, history=history, stopping={**source.stopping, "alpha": alpha})

    def _points(self, first: Result, e: Tensor) -> Source:
        problem = self.field_problem(e)
        field_found = self._minimise(
            "field", conjugate_gradients.minimise, problem, self.start, self._rules()
        )
        points = Points(self.problem, self.settings.foci)
        candidates = foci_of(self.problem.domain, positive(field_found.m), 0.1)
        best: Result | None = None
        rules = (GradientTolerance(1e-5), StepTolerance(1e-4), MaxIterations(self.settings.max_iterations))
        for k, start in enumerate(starts_of(points, candidates, self.settings.starts)):
            found = self._minimise(f"points{k}", gauss_newton.minimise, points.problem(e), start, rules)
            if best is None or found.value < best.value:
                best = found
        assert best is not None
        e = self._defect("points", points.source(best.m))
        problem = points.problem(e)
        best = self._minimise("points", gauss_newton.minimise, problem, best.m, rules)
        jacobian = self._kept("jacobian", lambda: problem.jacobian(best.m))
        for name in ("forward", "tangent"):
            self._counts[name] += points.size
        posterior = points.posterior(best.m, jacobian)
        source = self._source(points.source(best.m), best, first, e)
        norm = float(best.residual_norm or 0.0)
        return replace(
            source,
            foci=points.foci(best.m),
            posterior=posterior,
            residual_norm=norm,
            delta=math.sqrt(len(self.problem.data)),
        )

    def _source(self, u: Tensor, found: Result, first: Result, e: Tensor) -> Source:
        p = self.problem
        with torch.no_grad():
            states = p.growing.states(u)
        self._counts["forward"] += 1
        return Source(
            unknown=self.settings.unknown,
            u=u,
            m=found.m,
            foci=foci_of(p.domain, u, self.settings.level),
            residual_norm=float(found.residual_norm or 0.0),
            delta=p.delta,
            data=len(p.data),
            stopping={"rule": found.stopped_by, **found.numbers},
            counts=dict(self._counts),
            forward_equivalents=sum(self._counts.values()) + self._defects * p.defect_cost,
            history=found.history,
            first=first.history,
            states=states,
            defect=e,
        )

    def _minimise(
        self,
        stage: str,
        minimise: Callable[..., Result],
        problem: LeastSquares,
        start: Tensor,
        rules: Sequence[Any],
    ) -> Result:
        """One stage, gone on with where it was left; its solves are counted either way."""
        saved = {k.split("/", 1)[1]: v for k, v in self._memory.items() if k.startswith(f"{stage}/")}

        def after(state: State) -> None:
            self._memory.update({f"{stage}/{k}": v for k, v in state.state_dict().items()})
            if self.watch is not None and stage == self.settings.unknown:
                self.watch(state)
            if self.progress is not None:
                norm = float(state.residual_norm or 0.0)
                self.progress(f"{stage}: iteration {state.iteration}, ||r|| {norm:.5g}", state.iteration)
            if self.save is not None:
                self.save(self._memory)

        found = minimise(problem, saved or start, stopping=rules, callback=after)
        for name in self._counts:
            self._counts[name] += found.counts[name]
        return found

    def _defect(self, stage: str, u: Tensor) -> Tensor:
        self._defects += 1
        return self._kept(f"{stage}.defect", lambda: self.problem.defect(u))

    def _kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor of an interrupted run, or made now and saved."""
        if name not in self._memory:
            self._memory[name] = make().numpy()
            if self.save is not None:
                self.save(self._memory)
        return torch.from_numpy(self._memory[name])


def _not_negative(u: Tensor) -> Tensor:
    """u, or 0 where it is negative; the slope at 0 is 1, which torch's own clamp does not promise."""
    return torch.where(u < 0, torch.zeros_like(u), u)


def _largest(u: Tensor, space: Space) -> float:
    """The largest entry over all ranks."""
    here = float(u.max()) if len(u) else -math.inf
    comm: Any = space.comm
    return here if comm is None else float(comm.allreduce(here, op=MPI.MAX))
