r"""Science-activated networks: convergence, stability, accuracy, and PINN and deep Ritz in equal time.

Error against the time step and the mesh (states and identified rates, whose bias has the scheme's order); of
a control w(t) against its number of knots and the noise, beside the prediction bias^2 + variance of the
sensitivity problem; of rates against noise, observed spread beside predicted; of the states under errors of
the rates. Then, on the same problems, networks that are solutions: each rival trains for SECONDS of the
process (`--full`: 20), in the same process, Adam and then L-BFGS; sizes, weights and learning rates were
tuned on seeds 101 and 102, the benchmark's are 1 to 3. What the science-activated form spends is shown; on
direct problems it is a solver and needs no training. At last, rates from far starts, where the rivals
have the wider basin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inverse.optimizers import gauss_newton
from inverse.sensitivity import monte_carlo, propagate
from inverse.stopping import MaxIterations, StepTolerance
from scripts.benchmarks import Check
from scripts.benchmarks import _science_rivals as rivals
from scripts.benchmarks._science_contests import rival_checks, start_checks
from scripts.benchmarks.equation_rows.odes import Copies, Values, by_scipy, uniform
from solvers.node.models import Node
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.systems import SYSTEMS, System
from solvers.node.weights import Parameters
from solvers.ode.integrate import integrate

SECONDS, SEEDS = 4.0, (1, 2, 3)
SLACK = 0.2  # of an order
SCHEMES = {"heun": 2, "kutta3": 3, "kutta4": 4, "gauss2": 4}
KNOTS, LEVELS = (3, 5, 9, 17, 33), (0.001, 0.01, 0.1)
DRAWS, STARTS = 8, 5
FAITHFUL = 1.25  # observed and predicted spreads agree to this factor


def run(full: bool) -> list[Check]:
    """All checks; `full`: more draws at the same noise levels, rivals train five times as long."""
    return [
        *step_checks(),
        *mesh_checks(),
        *depth_checks(DRAWS if full else len(SEEDS)),
        *noise_checks(3 * DRAWS if full else DRAWS),
        *state_checks(),
        *rival_checks(5 * SECONDS if full else SECONDS, SEEDS),
        *start_checks(5 * SECONDS if full else SECONDS, STARTS),
    ]


# ---- step and mesh ----------------------------------------------------------------------------------------


def step_errors(scheme: str, steps: int) -> tuple[float, float]:
    """Logistic growth: of the state over [0, T], and of the growth rate identified from exact states."""
    unknown = Unknown(0.7, positive=True)
    node = Node(ScienceActivated(rivals.logistic, {"growth": unknown}), rivals.HORIZON, steps, scheme)
    exact = rivals.grown(node.times())[:, None]
    x0, own = exact[:1], Parameters(node)

    def observe(values: Values, copies: int) -> Tensor:
        out: Tensor = torch.func.functional_call(node, values, (x0.repeat(copies, 1),), {"trajectory": True})
        return out[1:]

    problem = Copies(own, observe, exact[1:], torch.ones_like(exact[1:]))
    with torch.no_grad():
        error = rivals.relative(problem.forward(torch.zeros(1, dtype=torch.float64)), exact[1:])
    found = gauss_newton.minimise(problem, own.pack(), stopping=(StepTolerance(1e-11), MaxIterations(30)))
    return error, abs(math.exp(float(found.m)) / rivals.GROWTH - 1)


def step_checks() -> list[Check]:
    checks = []
    for scheme, order in SCHEMES.items():
        coarse, fine = step_errors(scheme, 24), step_errors(scheme, 48)
        for what, a, b in zip(("state", "identified rate"), coarse, fine, strict=True):
            name = f"step, {scheme}: error of the {what} with 48 steps {b:.1e}, order"
            checks.append(Check.at_least(name, math.log2(a / b), order - SLACK))
    return checks


def mesh_checks() -> list[Check]:
    states = [rivals.heat_ours(cells, 80)["error"] for cells in (16, 32)]
    rates = [rivals.heat_identified(0, cells=cells, noise=0.0)["error"] for cells in (16, 32)]
    return [
        Check.at_least(
            f"mesh, heat: error of the {what} with 32 cells {b:.1e}, order", math.log2(a / b), 2 - SLACK
        )
        for what, (a, b) in {"state": states, "identified conductivity": rates}.items()
    ]


# ---- depth resolution -------------------------------------------------------------------------------------

DURATION, FROM = 10.0, 0.5


def control(t: Tensor) -> Tensor:
    """What is to be found: a therapy that swings, with one short pulse."""
    return 0.5 + 0.3 * torch.sin(2 * math.pi * t / DURATION) + 0.4 * torch.exp(-((t - 6.0) ** 2))


def treated(t: Tensor | float, x: Tensor, w: Tensor | None = None) -> Tensor:
    """Logistic growth under a therapy of rate w(t)."""
    return x * (1 - x) - (control(torch.as_tensor(t)) if w is None else w) * x


TREATED = System(treated, {"density": "1"}, {"w": "1"}, "1", (FROM,), DURATION)


class Depth:
    """Recovery of w(t), linear between `knots`, from the density at 64 times."""

    def __init__(self, knots: int) -> None:
        self.case = uniform(TREATED, 64, 1, (0,))
        self.clean = by_scipy(self.case)
        self.knots = knots

    def problem(self, data: Tensor, noise: float) -> tuple[Copies, Parameters]:
        unknown = Unknown(0.5, "linear", self.knots, DURATION)
        node = Node(ScienceActivated(treated, {"w": unknown}), DURATION, 64)
        own = Parameters(node)

        def observe(values: Values, copies: int) -> Tensor:
            x0 = torch.full((copies, 1), FROM, dtype=torch.float64)
            out: Tensor = torch.func.functional_call(node, values, (x0,), {"trajectory": True})
            return out[1:]

        return Copies(own, observe, data, torch.full_like(data, noise)), own

    def found(self, noise: float, seed: int) -> Tensor:
        """The values at the knots (knots,)."""
        draw = torch.randn(
            self.clean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        problem, own = self.problem(self.clean + noise * draw, max(noise, 1e-6))
        return gauss_newton.minimise(problem, own.pack(), stopping=(StepTolerance(1e-5), MaxIterations(25))).m

    def error(self, m: Tensor) -> float:
        """Relative, in L2 over the depth."""
        t = torch.linspace(0, DURATION, 1001, dtype=torch.float64)
        return rivals.relative(self.values(m, t), control(t))

    def values(self, m: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(np.interp(t.numpy(), np.linspace(0, DURATION, self.knots), m.numpy()))

    def predicted(self, bias: Tensor, noise: float) -> float:
        """sqrt(bias^2 + variance): the estimate without noise, and the covariance (J^T J)^-1 there."""
        problem, own = self.problem(self.clean, noise)
        J = problem.jacobian(bias)
        covariance = torch.linalg.inv(J.mT @ J)
        gram = torch.stack([own.space.gram(unit) for unit in torch.eye(self.knots, dtype=torch.float64)])
        t = torch.linspace(0, DURATION, 1001, dtype=torch.float64)
        size = float(control(t).norm()) * math.sqrt(DURATION / 1000)
        return math.hypot(self.error(bias), math.sqrt(float((gram * covariance).sum())) / size)


@dataclass(frozen=True)
class Resolved:
    """Errors of w(t) for a number of knots and a noise: root mean square over the seeds, and predicted."""

    knots: int
    noise: float
    observed: float
    predicted: float


def resolved(draws: int) -> list[Resolved]:
    rows = []
    for knots in KNOTS:
        depth = Depth(knots)
        bias = depth.found(0.0, 0)
        for noise in LEVELS:
            errors = [depth.error(depth.found(noise, seed)) for seed in range(1, draws + 1)]
            observed = math.sqrt(float(np.mean(np.square(errors))))
            rows.append(Resolved(knots, noise, observed, depth.predicted(bias, noise)))
    return rows


def depth_checks(draws: int) -> list[Check]:
    rows = resolved(draws)
    checks, best = [], []
    for noise in LEVELS:
        own = [row for row in rows if row.noise == noise]
        text = ", ".join(f"{row.knots}: {row.observed:.3g} ({row.predicted:.3g})" for row in own)
        checks.append(Check(f"depth, {100 * noise:g} % noise: error of w by knots (predicted)", text))
        best.append(min(own, key=lambda row: row.observed).knots)
    checks.append(Check(f"depth: best number of knots at {[100 * n for n in LEVELS]} % noise", str(best)))
    falls = sum(a >= b for a, b in itertools.pairwise(best))
    checks.append(Check.at_least("depth: fewer knots for more noise, cases", falls, len(LEVELS) - 1))
    # Where the error is not of the size of w itself and the map is nearly linear.
    small = [abs(math.log(row.observed / row.predicted)) for row in rows if row.predicted < 0.5]
    checks.append(
        Check.at_most("depth: observed over predicted error, worst factor", math.exp(max(small)), 1.6)
    )
    return checks


# ---- noise and stability ----------------------------------------------------------------------------------

RATES = {"beta": 0.4, "gamma": 0.1}


def spread(noise: float, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """SIR: errors of the logarithms of the rates (seeds, 2), and their predicted standard deviations.

    The data come from the same steps and the searches start at the truth: this is about the variance alone.
    """
    case = uniform(SYSTEMS["sir"], 80, 2, (1,))
    clean = case.solved()[:, [1]]
    sd = torch.full_like(clean, noise * float(clean.max()))
    errors = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        data = clean + sd * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        unknowns = {name: Unknown(value, positive=True) for name, value in RATES.items()}
        network = ScienceActivated(SYSTEMS["sir"].field, unknowns)
        case.fit(network, data, sd, len(data))
        errors.append([math.log(float(unknowns[name].value()) / value) for name, value in RATES.items()])
    exact = {name: Unknown(value, positive=True) for name, value in RATES.items()}
    problem, own = case.problem(ScienceActivated(SYSTEMS["sir"].field, exact), clean, sd)
    J = problem.jacobian(own.pack())
    return torch.tensor(errors), torch.linalg.inv(J.mT @ J).diagonal().sqrt()


def noise_checks(draws: int) -> list[Check]:
    checks, scores = [], []
    for level, noise in enumerate((0.001, 0.003, 0.01, 0.03, 0.1)):
        errors, sd = spread(noise, range(1 + level * draws, 1 + (level + 1) * draws))
        scores.append(errors / sd)
        observed = errors.square().mean(0).sqrt()
        shown = ", ".join(
            f"{name} {100 * float(o):.2g} ({100 * float(p):.2g})"
            for name, o, p in zip(RATES, observed, sd, strict=True)
        )
        checks.append(
            Check(f"noise {100 * noise:g} %: error of SIR's rates (predicted), {draws} draws", shown, "%")
        )
    factor = float(torch.cat(scores).square().mean().sqrt())
    name = "noise: observed over predicted spread of the estimates, all levels"
    checks.append(Check.within(name, factor, 1 / FAITHFUL, FAITHFUL))
    return checks


def state_checks() -> list[Check]:
    """Kuznetsov: how far 1 % in the rates moves the state at T, by tangents and by drawing rates."""
    system, names = SYSTEMS["kuznetsov"], ("rho", "delta", "alpha")
    known = torch.tensor([system.parameters[name] for name in names], dtype=torch.float64)
    times = torch.linspace(0, system.duration, 61, dtype=torch.float64)

    def end(logs: Tensor) -> Tensor:
        rates = (known * logs.exp()).unbind()
        return integrate(
            lambda t, x, *w: system.field(t, x, **dict(zip(names, w, strict=True))),
            system.x0,
            times,
            parameters=rates,
        )

    zero = torch.zeros(len(names), dtype=torch.float64)
    first = propagate(end, zero, sd=0.01).sd
    drawn = monte_carlo(end, zero, sd=0.01, samples=150, generator=torch.Generator().manual_seed(1)).sd
    factor = float((drawn / first).log().abs().max().exp())
    shown = ", ".join(f"{100 * float(s / abs(v)):.2g}" for s, v in zip(first, end(zero), strict=True))
    return [
        Check("stability, Kuznetsov: 1 % in the rates moves effector and tumour cells at T by", shown, "%"),
        Check.at_most(
            "stability: 150 drawn rates over the sensitivity problem, worst factor", factor, FAITHFUL
        ),
    ]
