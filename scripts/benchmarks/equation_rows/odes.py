r"""Systems of ordinary differential equations: steps against references, rates from noisy samples.

The data are the reference's (SciPy's at tight tolerances, a closed form), never the network's own; each
observed component has noise of 1 % of its largest value. The network is ScienceActivated on the grid of the
direct problem; unknown rates are positive, in logarithms, and start 20 to 100 % off; Levenberg-Marquardt.
Starts x(0) are known unless the case says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from inverse.optimizers import gauss_newton
from inverse.problem import LeastSquares
from inverse.sensitivity import directional
from inverse.stopping import MaxIterations, StepTolerance
from scripts.benchmarks._measures import NOISE
from scripts.benchmarks.equation_rows import Row
from scripts.benchmarks.equation_rows._fits import SEEDS
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.systems import SYSTEMS, System
from solvers.node.weights import Parameters
from solvers.ode.adaptive import adaptive_grid
from solvers.ode.integrate import integrate

Values = dict[str, Tensor]
STOPPING = (StepTolerance(3e-5), MaxIterations(30))


def rows(full: bool) -> list[Row]:
    """The table; `full` adds nothing, all cases are small."""
    return [
        lotka_volterra(),
        sir(),
        lorenz(),
        kuznetsov(),
        pharmacokinetics(),
        robertson(),
        van_der_pol(),
    ]


class Sampled(nn.Module):
    """x(0) -> the states at the times grid[at], (len(at), ..., d)."""

    def __init__(self, field: ScienceActivated, grid: Tensor, at: Sequence[int], scheme: str) -> None:
        super().__init__()
        self.field, self.grid, self.at, self.scheme = field, grid, list(at), scheme

    def forward(self, x0: Tensor) -> Tensor:
        return integrate(self.field, x0, self.grid, self.scheme, trajectory=True)[self.at]


@dataclass(frozen=True)
class Case:
    """A system, the grid of its steps, which of its times and components are observed, and the scheme."""

    system: System
    grid: Tensor
    at: Sequence[int]
    seen: Sequence[int]
    scheme: str = "kutta4"

    @property
    def times(self) -> Tensor:
        return self.grid[list(self.at)]

    def solved(self, every: int = 1) -> Tensor:
        """The known system at the observed times, with only each `every`-th time of the grid."""
        places = [k // every for k in self.at]
        network = Sampled(ScienceActivated(self.system.field), self.grid[::every], places, self.scheme)
        with torch.no_grad():
            found: Tensor = network(self.system.x0)
        return found

    def identified(
        self, starts: Mapping[str, float], clean: Tensor, windows: Sequence[float] = (1.0,)
    ) -> dict[str, tuple[float, list[float]]]:
        """{name: (truth, an estimate a seed)}; starts: of the unknowns; clean: all states at the times;
        windows: the shares of the data that are fitted, one after the other.
        """
        seen = clean[:, list(self.seen)]
        sd = NOISE * seen.abs().amax(0).expand_as(seen)
        found: dict[str, list[float]] = {name: [] for name in starts}
        for seed in SEEDS:
            unknowns = {name: Unknown(value, positive=True) for name, value in starts.items()}
            field = ScienceActivated(self.system.field, unknowns)
            data = seen + sd * torch.randn(seen.shape, generator=generator(seed), dtype=torch.float64)
            for share in windows:
                self.fit(field, data, sd, round(share * len(data)))
            for name, unknown in unknowns.items():
                found[name].append(float(unknown.value()))
        return {name: (self.system.parameters[name], values) for name, values in found.items()}

    def fit(self, field: ScienceActivated, data: Tensor, sd: Tensor, count: int) -> None:
        """Fit the field's unknowns to the first `count` times."""
        problem, own = self.problem(field, data[:count], sd[:count])
        own.load(gauss_newton.minimise(problem, own.pack(), stopping=STOPPING).m)

    def problem(self, field: ScienceActivated, data: Tensor, sd: Tensor) -> tuple[Copies, Parameters]:
        """Least squares for the field's unknowns from data (n, observed) of the first n times."""
        at = list(self.at)[: len(data)]
        network = Sampled(field, self.grid[: at[-1] + 1], at, self.scheme)

        def observe(values: Values, copies: int) -> Tensor:
            x0 = self.system.x0.repeat(copies, 1)
            states: Tensor = torch.func.functional_call(network, values, (x0,))
            return states[..., list(self.seen)]

        own = Parameters(network)
        return Copies(own, observe, data, sd), own


class Copies(LeastSquares):
    """Least squares of a network of few states, its Jacobian in one pass of dual numbers: a copy of the state
    for each unknown, each copy with a tangent of its own.

    observe: ({name: values (knots, copies, 1)}, copies) -> (times, copies, ...), of unknowns that are numbers
    or functions of the depth.
    """

    def __init__(
        self, own: Parameters, observe: Callable[[Values, int], Tensor], data: Tensor, sd: Tensor
    ) -> None:
        self.own, self.observe = own, observe
        super().__init__(own.space, lambda m: self._run(m[None])[0], data, sd)

    def _run(self, m: Tensor) -> Tensor:
        """All observations (copies, *data.shape) for the unknowns (copies, n)."""
        parts = m.split([p.numel() for p in self.own.own.values()], 1)
        values = {name: part.mT[..., None] for name, part in zip(self.own.own, parts, strict=True)}
        return self.observe(values, len(m)).movedim(1, 0)

    def jacobian(self, m: Tensor) -> Tensor:
        """J, (N, n)."""
        self.counts["forward"] += 1
        self.counts["tangent"] += 1
        tangents = directional(self._run, m.repeat(len(m), 1), torch.eye(len(m), dtype=m.dtype))[1]
        return (tangents / self.noise).flatten(1).mT


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(system: System, steps: int, every: int, seen: Sequence[int]) -> Case:
    """`steps` equal steps of the system's duration, observed each `every` of them, not at the start."""
    grid = torch.linspace(0, system.duration, steps + 1, dtype=torch.float64)
    return Case(system, grid, range(every, steps + 1, every), seen)


def by_scipy(case: Case, method: str = "DOP853", rtol: float = 1e-12, atol: float = 1e-13) -> Tensor:
    """The states at the observed times by SciPy, with the same right-hand side."""
    field = case.system.field

    def f(t: float, x: Any) -> Any:
        return field(t, torch.from_numpy(x)).numpy()

    times = case.times.numpy()
    span = (0.0, float(times[-1]))
    solution = solve_ivp(f, span, case.system.start, method, times, rtol=rtol, atol=atol)
    return torch.from_numpy(solution.y.T.copy())


def apart(x: Tensor, exact: Tensor) -> float:
    """The largest error of a component, in units of its largest value."""
    return float(((x - exact).abs().amax(0) / exact.abs().amax(0)).max())


def direct(case: Case, exact: Tensor) -> tuple[float, float]:
    """The error, and the order from steps twice as long."""
    even = replace(case, at=[k for k in case.at if k % 2 == 0])
    exact = exact[[k % 2 == 0 for k in case.at]]
    error, coarser = apart(even.solved(), exact), apart(even.solved(2), exact)
    return error, math.log2(coarser / error)


def row(
    name: str,
    case: Case,
    exact: Tensor,
    starts: Mapping[str, float],
    reference: str = "SciPy DOP853, 1e-12",
    bar: float = 1e-3,
    expected: float = 4.0,
    note: str = "",
    windows: Sequence[float] = (1.0,),
) -> Row:
    error, order = direct(case, exact)
    found = case.identified(starts, exact, windows)
    return Row(name, reference, error, bar, order, expected, found, note)


def lotka_volterra() -> Row:
    case = uniform(SYSTEMS["lotka_volterra"], 90, 3, (0, 1))
    starts = {"alpha": 1.0, "beta": 1.0, "gamma": 1.3, "delta": 0.7}
    note = "two periods, both observed 30 times; first the first third is fitted, then all"
    return row("Lotka-Volterra", case, by_scipy(case), starts, note=note, windows=(1 / 3, 1.0))


def sir() -> Row:
    case = uniform(SYSTEMS["sir"], 160, 4, (1,))
    starts = {"beta": 0.6, "gamma": 0.2}
    return row("SIR", case, by_scipy(case), starts, note="only the infectious observed, every 2 days")


def lorenz() -> Row:
    case = uniform(SYSTEMS["lorenz"], 200, 5, (0, 1, 2))
    starts = {"sigma": 12.0, "rho": 25.0, "beta": 3.2}
    note = "window [0, 2], within which an error grows by about 6; single shooting"
    return row("Lorenz, short window", case, by_scipy(case), starts, note=note)


def kuznetsov() -> Row:
    case = uniform(SYSTEMS["kuznetsov"], 80, 2, (0, 1))
    starts = {"sigma": 0.2, "rho": 0.8, "delta": 0.5, "alpha": 1.3}
    return row("Tumour and immune cells (Kuznetsov)", case, by_scipy(case), starts)


def pharmacokinetics() -> Row:
    system = SYSTEMS["pharmacokinetics"]
    case = uniform(system, 96, 1, (1,))
    return row(
        "Pharmacokinetics, two compartments",
        case,
        bateman(system, case.times),
        {"absorption": 2.5, "elimination": 0.25, "outward": 0.4, "back": 0.4},
        "closed form",
        note="only the centre observed, 96 times in a day",
    )


def bateman(system: System, times: Tensor) -> Tensor:
    """The closed form: sums of exp(-absorption t), exp(-fast t), exp(-slow t)."""
    a, e, o, b = system.parameters.values()
    middle, root = (e + o + b) / 2, math.sqrt((e + o + b) ** 2 / 4 - e * b)
    rates = (a, middle + root, middle - root)
    dose = system.start[0]
    states = torch.zeros(len(times), 3, dtype=torch.float64)
    states[:, 0] = dose * torch.exp(-a * times)
    for k, rate in enumerate(rates):
        others = math.prod(other - rate for j, other in enumerate(rates) if j != k)
        decay = torch.exp(-rate * times) * dose * a / others
        states[:, 1] += (b - rate) * decay
        states[:, 2] += o * decay
    return states


def robertson() -> Row:
    """The direct problem in steps so short that the order shows; the identification in an eighth of them."""
    system = SYSTEMS["robertson"]
    grid = np.geomspace(1e-5, 1e3, 257)
    grid = np.concatenate([[0.0], np.linspace(0, 1e-5, 9)[1:-1], grid])  # 0 and 1e-5 are the 0th and 8th
    case = Case(system, torch.from_numpy(grid), range(40, 265, 8), (0, 1, 2), "radau5")
    exact = by_scipy(case, "Radau", 1e-10, 1e-16)
    error, order = direct(case, exact)
    coarse = replace(case, grid=case.grid[::8], at=[k // 8 for k in case.at])
    found = coarse.identified({"k1": 0.05, "k2": 2.4e7, "k3": 1.3e4}, exact)
    left = apart(coarse.solved(), exact)
    note = f"stiff: rates from 1e-2 to 1e4; 264 graded steps of radau5, 33 for the fit (error {left:.1e})"
    return Row("Robertson", "SciPy Radau, 1e-10", error, 1e-3, order, 5.0, found, note)


def van_der_pol() -> Row:
    """The published value at t = 2 of the test set (mu^2 = 10^6)."""
    system = SYSTEMS["van_der_pol"]
    published = torch.tensor([1.706167732170483, -0.8928097010247975], dtype=torch.float64)
    times = adaptive_grid(system.field, system.x0, 0.0, 2.0, "radau5", rtol=1e-2, atol=1e-4)
    end = integrate(system.field, system.x0, times, "radau5")
    note = f"stiff: {len(times) - 1} adaptive steps of radau5; direct problem only"
    reference = "Mazzia and Magherini 2008, published"
    return Row(
        "van der Pol, mu = 1000",
        reference,
        float(((end - published) / published).abs().max()),
        1e-2,
        note=note,
    )
