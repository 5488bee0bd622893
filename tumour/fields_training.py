r"""Bilevel training of a prior for coefficient fields, on linearised problems of a cohort.

    min_theta mean_i ||m_i(theta) - truth_i|| / ||truth_i||,
    m_i(theta) = argmin_m 1/2 ||Q^T J (m - truth_i) + Q^T r_i||^2 + R_theta(m),

J the derivative at the truth of the growth and the scans over the noise's standard deviation, r_i the
residual of the truth: noise and model error. Q (data, rank) spans the images J of so many draws of the H1
prior (Halko, Martinsson and Tropp 2011), what the data see of fields that are not rough; a lower problem then
costs no growth. What is trained is judged by the growth (scripts/benchmarks/field_prior.py); where it begins
is in data/cases/regularizers/field.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inverse.optimizers import newton_cg
from inverse.optimizers.iteration import Result
from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.learned.mesh import MeshRidge
from inverse.stopping import GradientTolerance, MaxIterations
from inverse.trainers.bilevel import Bilevel
from solvers.fem.mesh import Domain
from solvers.fem.multiscale import Multiscale
from solvers.fem.weighted import WeightedSobolev
from solvers.spaces import GramSpace
from tumour.priors import Split
from tumour.priors_fields import FieldProblem, field_case

LENGTH, STRENGTH = 20.0, 1.5
"""mm of the H1 metric G, and the alpha at which H1 does best: they precondition the lower problems."""
RANK, NUDGE = 120, 1e-3
"""Directions kept of the data, and the step of the differences that find them."""
GAP = 0.02
"""J of a lower problem may be so far above its minimum."""


@dataclass(frozen=True)
class Linearised:
    """r = B m - d on a mesh: B (rank, n), d (rank,); weight, truth (n,): of the error."""

    domain: Domain
    B: Tensor
    d: Tensor
    weight: Tensor
    truth: Tensor

    def error(self, m: Tensor) -> Tensor:
        """||m - truth|| / ||truth|| where the tumour has been, 0-d, on the tape."""
        return ((self.weight @ (m - self.truth).square()) / (self.weight @ self.truth.square())).sqrt()


def linearised(problem: FieldProblem, rank: int = RANK, seed: int = 0) -> Linearised:
    """The problem around its truth; seed: of the draws."""
    forward, truth = problem.forward, problem.truth
    generator = torch.Generator().manual_seed(seed)
    metric = WeightedSobolev(problem.domain, LENGTH**-2)
    leaf = truth.clone().requires_grad_()
    shown = forward(leaf) / forward.noise
    with torch.no_grad():
        columns = []
        for _ in range(min(rank, len(shown), len(truth))):
            nudge = metric.sample(generator)
            step = NUDGE * nudge / nudge.abs().max()
            columns.append((forward(truth + step) / forward.noise - shown) / step.norm())
        Q, _ = torch.linalg.qr(torch.stack(columns, 1))
    B = torch.stack([torch.autograd.grad(shown, leaf, q, retain_graph=True)[0] for q in Q.T])
    with torch.no_grad():
        d = Q.T @ (forward.data / forward.noise - shown) + B @ truth
    return Linearised(problem.domain, B, d, problem.weight, truth)


def prepared(split: Split, number: int, spacing: float) -> Linearised:
    """A case of the cohort, linearised on voxels of `spacing` mm."""
    return linearised(field_case(split, number).problem(spacing), seed=number)


class FieldTraining(nn.Module):
    """Numbers of cases (n, 1) -> relative errors of their minimisers (n, 1), on the tape for the energy's
    weights.

    A minimisation begins where that case's last one ended.
    """

    def __init__(self, energy: MeshRidge, cases: Sequence[Linearised], iterations: int = 12) -> None:
        super().__init__()
        self.energy, self.cases, self.iterations = energy, cases, iterations
        self._last: dict[int, Tensor] = {}
        # Not modules of this one: they share the energy's weights, which are held once.
        self._lower = [[self._bilevel(case, number)] for number, case in enumerate(cases)]

    def _bilevel(self, case: Linearised, number: int) -> Bilevel:
        B, d, space = case.B, case.d, _posterior(case)
        rules = GradientTolerance(0.0, math.sqrt(2 * GAP)), MaxIterations(self.iterations)

        def start(_: Tensor) -> Tensor:
            return self._last.get(number, space.riesz(B.T @ d))

        def solve(lower: InverseProblem, m: Tensor) -> Result:
            found = newton_cg.minimise(lower, m, inner_iterations=60, stopping=rules)
            self._last[number] = found.m
            return found

        lower = Bilevel(
            self.energy.on(Multiscale(case.domain, self.energy.lengths)),
            lambda _, R: LeastSquares(space, lambda m: B @ m, d, 1.0, R),
            start,
            (case.domain.n_owned,),
            solve=solve,
            rtol=1e-2,
            most=30,
        )
        lower.log_strength.requires_grad_(False)  # the energy's own weights say it
        return lower

    def forward(self, numbers: Tensor) -> Tensor:
        costs = []
        for number in numbers.flatten().long().tolist():
            m = self._lower[number][0](numbers[:1])[0]
            costs.append(self.cases[number].error(m))
        return torch.stack(costs)[:, None].to(numbers)


def _posterior(case: Linearised) -> GramSpace:
    """STRENGTH G + B^T B, inverted by Woodbury's formula."""
    B, G = case.B, WeightedSobolev(case.domain, LENGTH**-2).space
    U = torch.stack([G.riesz(row) for row in B], 1) / STRENGTH
    C = torch.linalg.inv(torch.eye(len(B), dtype=B.dtype) + B @ U)
    return GramSpace(
        len(case.truth),
        lambda a: STRENGTH * G.gram(a) + B.T @ (B @ a),
        lambda y: G.riesz(y) / STRENGTH - U @ (C @ (U.T @ y)),
    )
