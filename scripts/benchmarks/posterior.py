"""Posteriors: Laplace against preconditioned Crank-Nicolson chains, low rank against dense, coverage.

Two problems. A tumour of three unknown parameters (log D_white, log rho, log age; D_grey = D_white / 6, the
seed known) on MNI152 at 8 mm, seen by PET-like images of two visits 60 days apart with 10 % noise, where
the posterior is near Gaussian, and by one outline on every fourth axial slice with noise 0.3, where it is
not. And the logarithm of a conductivity e^m in u - (e^m u')' = f on 60 mm, seen at 15 points with 2 %
noise. Truths are drawn from the prior and data made with the model that is fitted: what is measured is the
posterior, not the model. `--full`: 50 tumours of each kind, and how many truths the 90 % intervals hold.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.benchmarks import Check

if TYPE_CHECKING:
    from torch import Tensor

    from inverse.problem import LeastSquares
    from inverse.regularizers.gaussian import GaussianPrior
    from inverse.uncertainty.chains import Chains
    from inverse.uncertainty.low_rank import LowRankLaplace

PARAMETERS = ("D_white", "rho", "age")
MEDIANS, SPREADS = (0.35, 0.02, 250.0), (0.5, 0.35, 0.3)
"""Of the prior: medians in mm^2/day, 1/day and days; standard deviations of the logarithms."""

SPACING, SEED, STEP, AGE_STEPS = 8.0, (-25.0, -15.0, 25.0), 15.0, 20
VISITS = (0.0, 60.0)
LEVEL, THRESHOLD = 0.9, 0.16
PATIENTS = 50


@dataclass(frozen=True)
class Case:
    """A problem, the truth behind its data, its Laplace posterior; state: point -> solution (densities);
    places: of a
    field, x in mm.
    """

    problem: LeastSquares
    prior: GaussianPrior
    truth: Tensor
    laplace: LowRankLaplace
    state: Callable[[Tensor], Tensor]
    places: Tensor


def tumour(number: int, few: bool) -> Case:
    """Patient `number`: two visits of density images, or (few) one outline on every fourth slice."""
    import numpy as np
    import torch

    from inverse.regularizers.gaussian import GaussianPrior
    from solvers.spaces import Euclidean
    from tumour.anatomy import mni152
    from tumour.imaging import Modality
    from tumour.model import Seed, TumourModel, domain_of
    from tumour.patients import camera

    anatomy = mni152(SPACING)
    model = TumourModel(domain_of(anatomy), seed=Seed(width=5.0), step=STEP)
    look = camera(model, anatomy, anatomy.brain)
    modality = Modality("oedema", 0.3) if few else Modality("density", 0.1)
    visits = VISITS[:1] if few else VISITS
    slices = np.argwhere(anatomy.brain)[:, 2]
    rows = torch.from_numpy(np.flatnonzero(slices % 4 == 0 if few else slices >= 0))
    seed = model.seed_state(torch.tensor(SEED, dtype=torch.float64))
    sd = torch.tensor(SPREADS, dtype=torch.float64)

    def states(m: Tensor) -> list[Tensor]:
        D, rho, age = m.exp()
        return model.evolve(seed, model.diffusivity(D, D / 6), rho, age, visits, AGE_STEPS)

    def forward(m: Tensor) -> Tensor:
        return torch.cat([image[rows] for u in states(m) for image in look(u, [modality])])

    prior = GaussianPrior(
        Euclidean(3, sd),
        torch.tensor(MEDIANS, dtype=torch.float64).log(),
        lambda generator: sd * torch.randn(3, dtype=torch.float64, generator=generator),
    )
    noise = modality.noise if few else None
    return _case(prior, forward, number, noise, modality.noise, lambda m: states(m)[-1], torch.zeros(0))


def field(cells: int = 60, noise: float = 0.02) -> Case:
    """The logarithm of a conductivity on an interval of 60 mm."""
    import torch
    from mpi4py import MPI

    from inverse.regularizers.gaussian import GaussianPrior
    from solvers.fem.mesh import interval
    from solvers.fem.priors import matern

    domain = interval(60.0, cells, comm=MPI.COMM_SELF)
    x = torch.from_numpy(domain.points[: domain.n_owned, 0].copy())
    return _elliptic(
        domain, matern(domain, 0.5, 15.0), GaussianPrior, x, x.argsort()[2 :: cells // 15], noise
    )


def plane() -> Case:
    """The same in a slab of 13 x 10 x 2 vertices, seen at all of them."""
    import torch
    from mpi4py import MPI

    from inverse.regularizers.gaussian import GaussianPrior
    from solvers.fem.mesh import box
    from solvers.fem.priors import matern

    domain = box((48.0, 36.0, 4.0), (12, 9, 1), comm=MPI.COMM_SELF)
    x = torch.from_numpy(domain.points[: domain.n_owned, 0].copy())
    return _elliptic(domain, matern(domain, 0.5, 15.0), GaussianPrior, x, torch.arange(len(x)), 0.02)


def _elliptic(domain: Any, made: Any, Prior: Any, x: Tensor, seen: Tensor, noise: float) -> Case:
    import torch

    from solvers.fem.operators import DiffusionOperator

    operator = DiffusionOperator(domain, rtol=1e-12)
    corners = torch.from_numpy(domain.cell_dofs).long()
    source = domain.mass * ((x - 20.0).abs() < 4.0).double()
    one = torch.tensor(20.0, dtype=torch.float64)  # mm^2, so that e^m is near 20 mm^2

    def state(m: Tensor) -> Tensor:
        return operator.solve(source, operator.conductances(m[corners].mean(1).exp()), one)

    prior = Prior(made.space, 0.0, made.sample)
    return _case(prior, lambda m: state(m)[seen], 3, None, noise, state, x)


def _case(
    prior: GaussianPrior,
    forward: Callable[[Tensor], Tensor],
    number: int,
    noise: float | None,
    relative: float,
    state: Callable[[Tensor], Tensor],
    places: Tensor,
) -> Case:
    """Truth and data of a number, noise given or relative to the largest datum; the Laplace posterior."""
    import torch

    from inverse.optimizers import gauss_newton, newton_cg
    from inverse.problem import LeastSquares
    from inverse.stopping import GradientTolerance, MaxIterations
    from inverse.uncertainty.low_rank import laplace

    generator = torch.Generator().manual_seed(number)
    truth = prior.sample(generator)
    with torch.no_grad():
        clean = forward(truth)
    sd = noise or relative * float(clean.max())
    data = clean + sd * torch.randn(len(clean), dtype=torch.float64, generator=generator)
    problem = LeastSquares(prior.space, forward, data, sd, regularizer=prior)
    if prior.space.size == 3:
        m = gauss_newton.minimise(problem, prior.mean).m
    else:
        stopping = (GradientTolerance(1e-8), MaxIterations(50))
        m = newton_cg.minimise(problem, prior.mean, stopping=stopping).m
    return Case(problem, prior, truth, laplace(problem, prior, m, least=1e-8), state, places)


def sampled(case: Case, draws: int, burn_in: int = 100) -> Chains:
    """Four chains of Crank-Nicolson steps about the Laplace posterior."""
    from inverse.uncertainty.mcmc import Plan, pcn

    return pcn(case.problem, case.prior, case.laplace, Plan(draws=draws, burn_in=burn_in, seed=1))


def compared(name: str, case: Case, chains: Chains, gaussian: bool) -> list[Check]:
    """Laplace's mean and sd against the chains': bars where the posterior is near Gaussian."""
    health, sd = chains.diagnostics(), chains.sd()
    shift = (case.laplace.mean - chains.mean()) / sd
    ratio = case.laplace.sd() / sd
    checks = [
        Check.at_least(f"{name}: effective sample size, bulk", float(health.bulk.min()), 1000),
        Check(f"{name}: effective sample size, tail", float(health.tail.min())),
        Check.at_most(f"{name}: R-hat", float(health.rhat.max()), 1.01),
        Check(f"{name}: proposals accepted at beta = {chains.beta:.2f}", float(chains.acceptance.mean())),
    ]
    largest, spread = float(shift.abs().max()), 100 * float((ratio - 1).abs().max())
    if gaussian:
        checks.append(Check.at_most(f"{name}: Laplace mean off", largest, 0.1, "posterior sd"))
        checks.append(Check.at_most(f"{name}: Laplace sd off", spread, 10, "%"))
        return checks
    for k, parameter in enumerate(PARAMETERS):
        low, high = chains.interval(LEVEL)
        left, right = case.laplace.interval(LEVEL)
        checks.append(
            Check(
                f"{name}: log {parameter}",
                f"Laplace mean off by {float(shift[k]):+.2f} sd, sd by {100 * float(ratio[k] - 1):+.0f} %; "
                f"90 %: [{float(left[k]):.2f}, {float(right[k]):.2f}], "
                f"chains [{float(low[k]):.2f}, {float(high[k]):.2f}]",
            )
        )
    return checks


def densely(name: str, case: Case) -> list[Check]:
    """The low-rank variance against that of the inverse of the dense Hessian, also of the default rank."""
    import torch

    from inverse.uncertainty.low_rank import laplace

    J = case.problem.jacobian(case.laplace.mean)
    units = torch.eye(case.prior.space.size, dtype=torch.float64)
    precision = torch.stack([case.prior.space.gram(unit) for unit in units], 1)
    exact = torch.linalg.inv(J.mT @ J + precision).diagonal()
    off = float((case.laplace.variance() / exact - 1).abs().max())
    what = f"{name}: variance of rank {case.laplace.kept} of {len(exact)} against dense, relative"
    short = laplace(case.problem, case.prior, case.laplace.mean)  # eigenvalues from 0.01 on
    over, bound = (short.variance() / exact - 1).max(), (short.neglected() / exact).max()
    return [
        Check.at_most(what, off, 1e-6),
        Check(f"{name}: the same of rank {short.kept}, stated bound {float(bound):.1g}", float(over)),
    ]


def exceeded(case: Case, chains: Chains, samples: int = 200) -> Check:
    """The map of P(u > 0.16) at the last visit, from Laplace and from draws of the chains."""
    import torch

    by_laplace = case.laplace.exceedance(case.state, THRESHOLD, samples)
    draws = chains.samples.flatten(0, 1)
    thinned = draws[:: len(draws) // samples][:samples]
    with torch.no_grad():
        by_chains = torch.stack([case.state(m) > THRESHOLD for m in thinned]).double().mean(0)
    off, open_ = (by_laplace - by_chains).abs(), (by_laplace > 0.05) & (by_laplace < 0.95)
    return Check(
        f"P(u > {THRESHOLD}) at the last visit, Laplace against chains ({samples} samples each)",
        f"off by {float(off.max()):.2f} at most, {float(off[open_].mean()):.3f} on average over the "
        f"{int(open_.sum())} vertices where it is between 0.05 and 0.95",
    )


def held(job: tuple[int, bool]) -> dict[str, list[bool]]:
    """Which truths of a patient the 90 % intervals of Laplace and of chains hold."""
    import torch

    torch.set_num_threads(1)
    number, few = job
    case = tumour(number, few)
    intervals = {
        "Laplace": case.laplace.interval(LEVEL),
        "chains": sampled(case, 500 if few else 150).interval(LEVEL),
    }
    return {
        name: ((low <= case.truth) & (case.truth <= high)).tolist() for name, (low, high) in intervals.items()
    }


def coverage() -> list[Check]:
    """Of 50 patients of each kind, numbered from 1000."""
    from rich.progress import track

    jobs = [(1000 + k, few) for few in (False, True) for k in range(PATIENTS)]
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        found = list(track(pool.imap(held, jobs), "patients", total=len(jobs)))
    checks = []
    for few, rows in ((False, found[:PATIENTS]), (True, found[PATIENTS:])):
        for method in ("Laplace", "chains"):
            for k, parameter in enumerate(PARAMETERS):
                count = sum(row[method][k] for row in rows)
                kind = "outline" if few else "two visits"
                what = f"{kind}: 90 % intervals of {method} that hold log {parameter}"
                if few and method == "Laplace":  # shown, as it is not near Gaussian
                    checks.append(Check(what, count, f"of {PATIENTS}"))
                else:
                    checks.append(Check.within(what, count, 41, 49, f"of {PATIENTS}"))
    return checks


def run(full: bool) -> list[Check]:
    """All comparisons; with `full` the coverage."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    line, two, few = field(), tumour(1, few=False), tumour(2, few=True)
    checks = densely("field on a line", line) + densely("field in a slab", plane())
    chains = sampled(line, 1500)
    checks += compared("field", line, chains, gaussian=True)
    chains = sampled(two, 1000)
    checks += compared("tumour, two visits", two, chains, gaussian=True)
    checks.append(exceeded(two, chains))
    checks += compared("tumour, few data", few, sampled(few, 3000), gaussian=False)
    return checks + (coverage() if full else [])
