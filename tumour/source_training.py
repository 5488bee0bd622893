r"""Training of a source's regularizer: bilevel, on problems of a cohort, linear ones and then the growth's.

    u_i(theta) = argmin_(u = positive(m)) 1/2 ||Q^T J (u - u_i) + Q^T r_i||^2 + R_theta(u),
    min_theta mean_i ||u_i(theta) - u_i|| / ||u_i||,

u_i the true source on the search's mesh, J the derivative there of the growth, the scan and the noise's
inverse standard deviation, r_i the residual of u_i: noise and model error, less the defect at a first
estimate as in the search. Q (data, rank) spans the images J of so many random fields (Halko, Martinsson and
Tropp 2011); a lower problem then costs no growth, but leaves out what the data say beyond Q, so that more
regularization is right for the growth itself. So a second phase starts with twice the weights and solves the
lower problems with the growth; the Hessians of its hypergradients stay those of the linear problems.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inverse.losses import Mean
from inverse.methods import Adam
from inverse.optimizers import quasi_newton
from inverse.optimizers.iteration import Result
from inverse.problem import InverseProblem
from inverse.regularizers.learned.energy import Energy, Guarantee
from inverse.regularizers.learned.mesh import MeshRidge
from inverse.stopping import GradientTolerance, MaxIterations
from inverse.trainers.bilevel import Bilevel
from inverse.training import train
from solvers.fem.mesh import Domain
from solvers.fem.multiscale import Multiscale
from solvers.fem.spaces import lumped
from tumour import priors
from tumour.source import SourceProblem, positive
from tumour.source_prior import problem_with
from tumour.source_search import Locator

RANK, NUDGE = 100, 1e-4
"""Directions kept of the data, and the step of the differences that find them."""

SPACING, EPOCHS, BATCH, RATE, SEED = 6.0, (14, 8), 5, 0.1, 1
MORE = 0.7
"""Added to the logarithms of the weights before the second phase: twice the regularization."""

CASES = tuple(k for k in range(20) if k not in (6, 8))
"""TRAIN cases; those left out grow so fast that their linear lower problems do not converge from 0."""
WATCHED = (0, 1, 2, 3, 4, 5, 7)
"""VALIDATION cases, for the figures of the card; 6 is left out for the same reason."""


def fresh() -> MeshRidge:
    """The energy at the start: nearly H1, with wells of the values at 0 and at 0.4."""
    energy = MeshRidge(
        lengths=(0.0, 4.0, 8.0, 16.0),
        values=((2e-3, 0.0, 0.1), (2e-3, 0.0, 0.1), (1e-3, 4.0, 0.1)),
        slopes=((0.05, 0.0, 0.05), (0.005, 4.0, 0.02), (0.005, 8.0, 0.02)),
        potential="student",
        uneven=True,
        noise=0.02,
    )
    assert energy.shift is not None
    with torch.no_grad():
        energy.shift.copy_(torch.tensor([0.0, 4.0, 1.0]))
    return energy


def trained(
    epochs: tuple[int, int] = EPOCHS,
    cases: Sequence[Linearised] | None = None,
    watched: Sequence[Linearised] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[MeshRidge, dict[str, tuple[float, str]]]:
    """The energy trained on cases (None: CASES, prepared here), and its figures on those watched."""
    cases = [prepared("train", k, SPACING) for k in CASES] if cases is None else cases
    watched = [prepared("validation", k, SPACING) for k in WATCHED] if watched is None else watched
    energy = fresh()
    rows = torch.arange(len(cases), dtype=torch.float32)[:, None]
    labels = torch.zeros(len(cases), dtype=torch.long)

    def told(entry: Mapping[str, float], _: nn.Module) -> None:
        say(f"epoch {entry['epoch']:.0f}: mean relative error {entry['objective']:.4f}")

    for growth, count in zip((False, True), epochs, strict=True):
        if count:
            method, model = Adam(RATE, cosine=True), SourceTraining(energy, cases, growth=growth)
            with torch.no_grad():
                energy.log_weight.add_(MORE if growth else 0.0)
            train(model, Mean(), (rows, labels), method, epochs=count, batch=BATCH, seed=SEED, callback=told)
    with torch.no_grad():
        model = SourceTraining(energy, watched, growth=epochs[1] > 0)
        errors = model(torch.arange(len(watched), dtype=torch.float32)[:, None])
    figures = {
        "validation: median relative error": (100 * float(errors.median()), "%"),
        "its mean": (100 * float(errors.mean()), "%"),
    }
    return energy, figures


@dataclass(frozen=True)
class Linearised:
    """r = B u - d on a mesh: B (rank, n), d (rank,); truth: u_i (n,); problem, defect: of the growth."""

    domain: Domain
    B: Tensor
    d: Tensor
    truth: Tensor
    problem: SourceProblem | None = None
    defect: Tensor | None = None

    def error(self, u: Tensor) -> Tensor:
        """||u - truth|| / ||truth|| in L2, on the tape."""
        mass = self.domain.mass
        return ((mass @ (u - self.truth).square()) / (mass @ self.truth.square())).sqrt()


def linearised(
    problem: SourceProblem, truth: Tensor, defect: Tensor, rank: int = RANK, seed: int = 0
) -> Linearised:
    """The problem around its truth (n,); rank: at most the number of data; seed: of the random fields."""
    growing, sd = problem.growing, problem.sd
    generator = torch.Generator().manual_seed(seed)
    leaf = truth.clone().requires_grad_()
    shown = growing.images(leaf) / sd
    rank = min(rank, len(shown))
    with torch.no_grad():
        nudges = NUDGE * torch.randn((rank, len(truth)), generator=generator, dtype=torch.float64)
        seen = torch.stack([growing.images(truth + e) / sd - shown for e in nudges], 1)
        Q, _ = torch.linalg.qr(seen)
    rows = [torch.autograd.grad(shown, leaf, q, retain_graph=True)[0] for q in Q.T]
    B = torch.stack(rows)
    with torch.no_grad():
        d = Q.T @ ((problem.data - defect) / sd - shown) + B @ truth
    return Linearised(problem.domain, B, d, truth, problem, defect)


def prepared(split: priors.Split, number: int, spacing: float) -> Linearised:
    """A case of a cohort on voxels of `spacing` mm; its truth is grown on 2 mm, steps of 2.5 days."""
    case = priors.source_case(split, number)
    problem = priors.grown(case, 2.0, 2.5).problem(spacing)
    _, defect = Locator(problem).corrected()
    return linearised(problem, priors.boxed(problem.domain, case.shape, 3), defect, seed=number)


class Positive(Energy):
    """R(positive(m)): the energy of m that the lower problem has."""

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.energy(positive(x))
        return value

    def guarantee(self) -> Guarantee:
        return self.energy.guarantee()

    def settings(self) -> dict[str, object]:
        return {}


class SourceTraining(nn.Module):
    """Numbers of cases (b, 1) -> ||u(theta) - u|| / ||u|| of each, (b, 1); the energy is shared by all.

    iterations, tolerance: of the lower problems, from u = w ln 2; rtol, most: of MINRES (see `Bilevel`).
    growth: solve the lower problems with the growth itself; their Hessians stay those of the linear ones.
    """

    def __init__(
        self,
        energy: MeshRidge,
        cases: Sequence[Linearised],
        iterations: int = 40,
        tolerance: float = 1e-3,
        rtol: float = 1e-2,
        most: int = 25,
        growth: bool = False,
    ) -> None:
        super().__init__()
        self.growth = growth
        self.energy, self.cases = energy, list(cases)
        self._rules, self._minres = (GradientTolerance(tolerance), MaxIterations(iterations)), (rtol, most)
        self._bilevel = [self._problem(k) for k in range(len(self.cases))]  # a plain list: no parameters

    def _problem(self, k: int) -> Bilevel:
        case = self.cases[k]
        space, n = lumped(case.domain), len(case.truth)
        energy = Positive(self.energy.on(Multiscale(case.domain, self.energy.lengths)))

        def make(_: Tensor, R: object) -> InverseProblem:
            def misfit(m: Tensor) -> Tensor:
                return (case.B @ positive(m) - case.d).square().sum() / 2

            return InverseProblem(space, misfit, R)  # type: ignore[arg-type]

        def solve(problem: InverseProblem, start: Tensor) -> Result:
            if self.growth:
                assert (
                    case.problem is not None and case.defect is not None and problem.regularizer is not None
                )
                problem = problem_with(case.problem, case.defect, problem.regularizer)
            return quasi_newton.minimise(problem, start, stopping=self._rules)

        rtol, most = self._minres
        start = torch.zeros(n, dtype=torch.float64)
        return Bilevel(energy, make, lambda _: start, (n,), solve=solve, rtol=rtol, most=most)

    def forward(self, rows: Tensor) -> Tensor:
        """The relative errors."""
        costs = []
        for row in rows[:, 0].long().tolist():
            u = positive(self._bilevel[row](rows[:1])[0])
            costs.append(self.cases[row].error(u))
        return torch.stack(costs)[:, None].to(rows)
