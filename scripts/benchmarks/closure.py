"""A growth law that nobody knows, learned inside the physics, beside black-box NODEs and a PINN.

u_t = D u_xx + rho g(u) on 50 mm without flux, u(0) known, D, rho and g unknown. Data: u at 51 places on 10
days up to day 100 with noise of 1 % of the largest, from a solver on a grid four times finer. Each rival gets
the same process time in the same run, and is asked for days 110 to 150. The truth is logistic, and once
Gompertz's; all settings are the same for both.

    ours      D u_xx + rho g(u), g a `Decreasing` network, D and rho unknown
    local     x_i' = a network of x_(i-1), x_i, x_(i+1), the same at all places and in both directions
    dense     x' = W2 tanh(W1 x + b1) + b2, all of the state
    PINN      a network u(t, x) with u(0, x) built in, D, rho and the same `Decreasing` network unknown, the
              equation a penalty up to day 150

The first three share integrator, optimizer (L-BFGS) and a prior about the start; the PINN has Adam before
L-BFGS and no prior: with that of ours on D, rho and the network its error on later days grew from 1.9 to
2.3 % on seed 101, where that of ours without a prior grows from 0.5 to 0.7 %. The settings
were chosen on the seeds 101 to 103: of ours the law's network and the prior; of local width, layers, reach,
symmetry, prior and scale; of dense width, knots and prior; of the PINN width, layers, points, weights,
scaling, built-in start, learning rate and share of Adam. The error on later days decided, which a user could
not know. After a first look at the tested seeds had shown the PINN weaker than need be (5.6 %), its settings
were chosen once more on the seeds 101 to 103, and in the same round the prior's weight of ours went from 0.3
to 1. The ratios depend on SECONDS: `--full` shows the PINN with ten times as many.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.func import functional_call

from inverse.collocation import Term, fit
from inverse.methods import Adam
from inverse.optimizers import quasi_newton
from inverse.problem import LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import GradientTolerance, MaxIterations, State
from scripts.benchmarks import Check
from solvers.node.collocation import Field, Perceptron, scattered
from solvers.node.fields import TwoLayer
from solvers.node.models import Node
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.closures import Decreasing
from solvers.node.weights import Parameters
from solvers.ode.fields import VectorField

LENGTH, PLACES, DAYS, SHOTS, LATER = 50.0, 51, 100.0, 10, 5
DIFFUSIVITY, NOISE = 0.13, 0.01
STARTS = {"D": 0.05, "rho": 0.01}
SECONDS, SEEDS = 6.0, {"logistic": (1, 2, 3, 4, 5), "gompertz": (1, 2, 3)}
RIVALS = ("local", "dense", "PINN")
BARS = {"g": 5.0, "ratio": 2.0}

Rate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Truth:
    """rho g(u), 1/day."""

    name: str
    rate: Callable[[np.ndarray], np.ndarray]

    def states(self, days: Sequence[float], finer: int = 4) -> Tensor:
        """u (days, PLACES) on a grid `finer` times as fine, by LSODA to 1e-8."""
        x = np.linspace(0, LENGTH, (PLACES - 1) * finer + 1)

        def slope(_: float, u: np.ndarray) -> np.ndarray:
            wide = np.pad(u, 1, mode="reflect")
            spread = DIFFUSIVITY * (wide[2:] - 2 * u + wide[:-2]) / (x[1] - x[0]) ** 2
            return np.asarray(spread + self.rate(u))

        options = {"method": "LSODA", "rtol": 1e-8, "atol": 1e-10, "lband": 1, "uband": 1}
        seed = start(torch.from_numpy(x)).numpy()
        found = solve_ivp(slope, (0, max(days)), seed, t_eval=days, **options)
        return torch.from_numpy(found.y.T[:, ::finer].copy())


TRUTHS = {
    "logistic": Truth("logistic", lambda u: 0.025 * u * (1 - u)),
    "gompertz": Truth("gompertz", lambda u: 0.01 * u * np.log(1.001 / (np.maximum(u, 0) + 1e-3))),
}


def start(x: Tensor) -> Tensor:
    """Two foci."""
    return 0.3 * torch.exp(-((x - 18) ** 2) / 18) + 0.1 * torch.exp(-((x - 34) ** 2) / 8)


@dataclass(frozen=True)
class Data:
    """What is known, y (SHOTS, PLACES) with noise sd; and what is not: the states, also later ones."""

    truth: Truth
    y: Tensor
    sd: float
    states: Tensor

    @staticmethod
    def of(truth: Truth, seed: int) -> Data:
        states = truth.states([DAYS * k / SHOTS for k in range(SHOTS + LATER + 1)])
        seen = states[1 : SHOTS + 1]
        sd = NOISE * float(seen.max())
        draw = torch.randn(seen.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Data(truth, seen + sd * draw, sd, states[1:])

    @property
    def visited(self) -> float:
        """The largest density up to day 100."""
        return float(self.states[:SHOTS].max())


@dataclass(frozen=True)
class Outcome:
    """What a method made of the data: u at all days, seen and later; rho g and D where it has them."""

    states: Tensor
    iterations: int
    seconds: float
    rate: Rate | None = None
    D: float = math.nan

    def misfit(self, data: Data) -> float:
        """chi^2 / N of the data, in which the noise has 1."""
        return float(((self.states[:SHOTS] - data.y) / data.sd).square().mean())

    def later(self, data: Data) -> float:
        """Relative L2 error over days 110 to 150, %."""
        truth = data.states[SHOTS:]
        return 100 * float((self.states[SHOTS:] - truth).norm() / truth.norm())

    def law(self, data: Data) -> float:
        """Relative L2 error of rho g on the visited densities, %."""
        return 100 * off(self.rate, data) if self.rate is not None else math.nan


def off(rate: Rate, data: Data) -> float:
    u = torch.linspace(0, data.visited, 401, dtype=torch.float64)
    truth = torch.from_numpy(data.truth.rate(u.numpy()))
    with torch.no_grad():
        return float((rate(u) - truth).norm() / truth.norm())


# ---- Networks that are integrated --------------------------------------------------------------------------


def laplacian() -> Tensor:
    """The second difference with mirrored ends, transposed, 1/mm^2."""
    unit = torch.eye(PLACES, dtype=torch.float64)
    wide = torch.cat([unit[1:2], unit, unit[-2:-1]])
    return ((wide[2:] - 2 * unit + wide[:-2]) * ((PLACES - 1) / LENGTH) ** 2).T.contiguous()


class Snapshots(nn.Module):
    """The states on each tenth day of a field from the start on, by `chebyshev4` in steps of 5 days."""

    def __init__(self, field: VectorField, shots: int, gradient: str) -> None:
        super().__init__()
        duration = DAYS * shots / SHOTS
        self.node = Node(field, duration, 2 * shots, "chebyshev4", gradient)
        self.start = start(torch.linspace(0, LENGTH, PLACES, dtype=torch.float64))

    def forward(self) -> Tensor:
        states: Tensor = self.node(self.start, trajectory=True)
        return states[2::2]


class Seconds:
    """Stops after so much of the process's time."""

    def __init__(self, seconds: float) -> None:
        self.until = time.process_time() + seconds

    def __call__(self, state: State) -> dict[str, float] | None:
        return {"seconds": self.until} if time.process_time() >= self.until else None


def trained(field: VectorField, data: Data, seconds: float, weight: float, gradient: str) -> Outcome:
    """By L-BFGS, least squares and a Gaussian prior about the start; in `field` lies the result."""
    begin = time.process_time()
    model = Snapshots(field, SHOTS, gradient)
    parameters = Parameters(model)

    def forward(m: Tensor) -> Tensor:
        out: Tensor = functional_call(model, dict(parameters.unpack(m)), ())
        return out

    prior = Tikhonov(parameters.space, weight, reference=parameters.pack())
    problem = LeastSquares(parameters.space, forward, data.y, data.sd, regularizer=prior)
    stopping = (GradientTolerance(1e-9), MaxIterations(10**6), Seconds(seconds))
    found = quasi_newton.minimise(problem, parameters.pack(), memory=20, stopping=stopping)
    spent = time.process_time() - begin
    parameters.load(found.m)
    with torch.no_grad():
        states = Snapshots(field, SHOTS + LATER, gradient)()
    return Outcome(states, found.iterations, spent)


def ours(data: Data, seed: int, seconds: float = SECONDS) -> Outcome:
    law, spread = Decreasing(seed=seed), laplacian()
    unknowns = {name: Unknown(value, positive=True) for name, value in STARTS.items()}

    def physics(t: Tensor, x: Tensor, D: Tensor, rho: Tensor, g: Rate) -> Tensor:
        return D * (x @ spread) + rho * g(x)

    field = ScienceActivated(physics, {**unknowns, "g": law})
    found = trained(field, data, seconds, 1.0, "autograd")
    D, rho = (float(unknowns[name].value()) for name in STARTS)
    return Outcome(found.states, found.iterations, found.seconds, lambda u: rho * law(u), D)


class Local(nn.Module):
    """x_i' from x_(i-1), x_i, x_(i+1), mirrored at the ends; the mean of both directions."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.network = Perceptron((0.0,) * 3, (1.0,) * 3, 1, width, 1, seed, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        near = torch.cat([x[1:2], x, x[-2:-1]]).unfold(0, 3, 1)
        both: Tensor = self.network(near) + self.network(near.flip(1))
        return 0.05 * both[:, 0] / 2


def local(data: Data, seed: int, seconds: float = SECONDS) -> Outcome:
    field = ScienceActivated(lambda t, x, net: net(x), {"net": Local(32, seed)})
    return trained(field, data, seconds, 0.1, "autograd")


def dense(data: Data, seed: int, seconds: float = SECONDS) -> Outcome:
    field = TwoLayer(PLACES, 4).double()
    field.reset(0.3, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        field.weights("W2").values.mul_(0.02)
    return trained(field, data, seconds, 100.0, "adjoint")


# ---- A network that is the solution -----------------------------------------------------------------------


class Pinn(nn.Module):
    """u(t, x) = u(0, x) e + (1 - e) N(t, x), e = exp(-t / 20 days), and the same unknowns as ours.

    A built-in start that does not fade leaves its foci for N to undo: 4.8 % in place of 2 % on later days.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        end, middle, reach = DAYS * (1 + LATER / SHOTS), LENGTH / 2, LENGTH / 4
        self.u = Field(
            "tx",
            (0.0, middle - reach),
            (end, middle + reach),
            lift=lambda z: start(z[:, 1:]) * torch.exp(-z[:, :1] / 20),
            factor=lambda z: 1 - torch.exp(-z[:, :1] / 20),
            width=14,
            layers=3,
            seed=seed,
        )
        self.logs = nn.ParameterDict(
            {k: nn.Parameter(torch.tensor(math.log(v), dtype=torch.float64)) for k, v in STARTS.items()}
        )
        self.law = Decreasing(seed=seed)


def pinn(data: Data, seed: int, seconds: float = SECONDS) -> Outcome:
    model, end = Pinn(seed), DAYS * (1 + LATER / SHOTS)
    days = torch.linspace(0, end, SHOTS + LATER + 1, dtype=torch.float64)[1:]
    everywhere = torch.cartesian_prod(days, torch.linspace(0, LENGTH, PLACES, dtype=torch.float64))
    seen = torch.cat([everywhere[: SHOTS * PLACES], data.y.reshape(-1, 1)], 1)
    times = scattered((0.0,), (end,), 50, seed)
    ends = torch.cat([torch.cat([times, torch.full_like(times, x)], 1) for x in (0.0, LENGTH)])

    def equation(model: Pinn, z: Tensor) -> Tensor:
        u = model.u.jets(z, ("t", "xx"))
        D, rho = model.logs["D"].exp(), model.logs["rho"].exp()
        return DAYS * (u["t"] - D * u["xx"] - rho * model.law(u[""].clamp(-0.2, 1.5)))

    def misfit(model: Pinn, z: Tensor) -> Tensor:
        return (model.u(z[:, :2]) - z[:, 2:]) / data.sd

    def flux(model: Pinn, z: Tensor) -> Tensor:
        return 10 * model.u.jets(z, ("x",))["x"]

    inside = scattered((0.0, 0.0), (end, LENGTH), 400, seed)
    terms = [Term(equation, inside, 1000.0), Term(misfit, seen), Term(flux, ends, 1000.0)]
    many = 10**6  # the time ends it
    found = fit(
        model,
        terms,
        adam=Adam(1e-2),
        epochs=many,
        polish=many,
        memory=8,
        seconds=seconds,
        share=0.5,
        seed=seed,
    )
    with torch.no_grad():
        states = model.u(everywhere).view(-1, PLACES)
        D, rho = (float(model.logs[name].exp()) for name in ("D", "rho"))
    epochs = len(found.adam.history) + 10 * len(found.polish.history)
    return Outcome(states, epochs, found.seconds, lambda u: rho * model.law(u), D)


METHODS: dict[str, Callable[..., Outcome]] = {"ours": ours, "local": local, "dense": dense, "PINN": pinn}


# ---- The comparison ---------------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} +- {stdev(values):.2f} (worst {max(values):.2f})"


def compared(name: str, bars: bool) -> list[Check]:
    """All methods on all seeds of a truth."""
    found: dict[str, list[Outcome]] = {method: [] for method in METHODS}
    sets = [Data.of(TRUTHS[name], seed) for seed in SEEDS[name]]
    for data, seed in zip(sets, SEEDS[name], strict=True):
        for method, run_one in METHODS.items():
            found[method].append(run_one(data, seed))
    later = {m: [o.later(d) for o, d in zip(found[m], sets, strict=True)] for m in METHODS}
    laws = {m: [o.law(d) for o, d in zip(found[m], sets, strict=True)] for m in ("ours", "PINN")}
    begun = [100 * off(_at_start(seed), d) for d, seed in zip(sets, SEEDS[name], strict=True)]
    count = f"{name}, {len(sets)} seeds"
    what = f"{count}: rho g on u <= {sets[0].visited:.2f}, relative L2"
    checks = [
        Check.at_most(f"{what}, mean", mean(laws["ours"]), BARS["g"], "%")
        if bars
        else Check(f"{what}, mean", mean(laws["ours"]), "%"),
        Check(f"{count}: the same, ours", f"{summary(laws['ours'])}; at the start {mean(begun):.0f}", "%"),
        Check(f"{count}: the same, PINN", summary(laws["PINN"]), "%"),
        Check(
            f"{count}: D = {DIFFUSIVITY}, ours and PINN",
            "; ".join(
                f"{mean(D):.3f} ({min(D):.3f} to {max(D):.3f})"
                for D in ([o.D for o in found[m]] for m in ("ours", "PINN"))
            ),
            "mm^2/day",
        ),
    ]
    for method in METHODS:
        spent = f"{mean(o.seconds for o in found[method]):.1f} s"
        steps = f"{mean(o.iterations for o in found[method]):.0f} iterations"
        row = f"{count}: days 110 to 150, {method} ({spent}, {steps})"
        checks.append(Check(row, summary(later[method]), "%"))
        misfits = [o.misfit(d) for o, d in zip(found[method], sets, strict=True)]
        checks.append(Check(f"{count}: chi^2 / N of the data, {method}", summary(misfits)))
    for rival in RIVALS:
        ratio = mean(later[rival]) / mean(later["ours"])
        least = min(a / b for a, b in zip(later[rival], later["ours"], strict=True))
        row = f"{count}: error of {rival} over ours, means"
        checks.append(Check.at_least(row, ratio, BARS["ratio"]) if bars else Check(row, ratio))
        checks.append(Check(f"{count}: error of {rival} over ours, least of a seed", least))
    return checks


def _at_start(seed: int) -> Rate:
    """rho g of ours before the training."""
    law = Decreasing(seed=seed)
    return lambda u: STARTS["rho"] * law(u)


def given_longer(times: int = 10) -> list[Check]:
    """The PINN with many times the seconds of the others."""
    sets = [Data.of(TRUTHS["logistic"], seed) for seed in SEEDS["logistic"]]
    found = [pinn(data, seed, times * SECONDS) for data, seed in zip(sets, SEEDS["logistic"], strict=True)]
    what = f"logistic: PINN with {times} times the time"
    return [
        Check(
            f"{what}, days 110 to 150", summary([o.later(d) for o, d in zip(found, sets, strict=True)]), "%"
        ),
        Check(f"{what}, rho g", summary([o.law(d) for o, d in zip(found, sets, strict=True)]), "%"),
    ]


def run(full: bool) -> list[Check]:
    """Both truths; with `full` the PINN also with ten times the time."""
    torch.set_num_threads(1)
    checks = compared("logistic", bars=True) + compared("gompertz", bars=False)
    return checks + (given_longer() if full else [])
