r"""The problems of the study `science` on which networks that are solutions compete with networks that solve.

For each: what the science-activated form does, what the rivals (PINN, deep Ritz) minimise, and the error of
both by the same measure. Initial and boundary values are built into the rivals' networks, their data and
points are those of ours or more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inverse.collocation import Term, fit
from inverse.methods import Adam
from inverse.optimizers import gauss_newton, newton_cg
from inverse.problem import InverseProblem
from inverse.stopping import GradientTolerance, MaxIterations
from scripts.benchmarks._measures import relative
from scripts.benchmarks.equation_rows.odes import STOPPING, Copies, Values
from solvers.node.collocation import Field, scattered
from solvers.node.models import Node
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.variational import Elements, membrane
from solvers.node.weights import Parameters
from solvers.ode.tableaux import real_interval

PI = math.pi
Result = dict[str, float]


@dataclass(frozen=True)
class Rival:
    """A way to train a network that is a solution: its size, the weights of its terms, its optimizers."""

    width: int = 16
    layers: int = 3
    points: int = 200
    data: float = 1.0
    lr: float = 1e-2
    share: float = 0.3
    batch: int | None = None

    def train(self, model: nn.Module, terms: list[Term], seconds: float) -> float:
        """The process's seconds that it took."""
        many = 10**6  # the time ends it
        options = {"adam": Adam(self.lr), "epochs": many, "polish": many, "batch": self.batch}
        return fit(model, terms, seconds=seconds, share=self.share, **options).seconds  # type: ignore[arg-type]


class Unknowing(nn.Module):
    """A solution, and rates that are not known: logarithms."""

    def __init__(self, solution: Field, starts: Mapping[str, float]) -> None:
        super().__init__()
        self.solution = solution
        self.logs = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(math.log(v), dtype=torch.float64)) for name, v in starts.items()}
        )

    def rates(self) -> dict[str, Tensor]:
        return {name: log.exp() for name, log in self.logs.items()}


def columns(rows: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """z -> its first columns, one tensor for all `rows`: what a Field knows of its points is then kept."""
    kept = rows[:, :count].clone()
    return lambda z: kept if z is rows else z[:, :count]


def worst(estimates: Mapping[str, float], truths: Mapping[str, float]) -> float:
    """The largest relative error of a parameter."""
    return max(abs(estimates[name] / truths[name] - 1) for name in estimates)


# ---- logistic growth, direct ------------------------------------------------------------------------------

GROWTH, SMALL, HORIZON = 1.0, 0.2, 5.0
CHECKED = torch.linspace(0, HORIZON, 201, dtype=torch.float64)[1:]


def logistic(t: Tensor | float, x: Tensor, growth: Tensor | float = GROWTH) -> Tensor:
    return growth * x * (1 - x)


def grown(t: Tensor) -> Tensor:
    return SMALL / (SMALL + (1 - SMALL) * torch.exp(-GROWTH * t))


def logistic_ours(steps: int) -> Result:
    """kutta4; the error over [0, T] at the times of the steps."""
    node = Node(ScienceActivated(logistic), HORIZON, steps)
    start = time.process_time()
    with torch.no_grad():
        x = node(torch.tensor([SMALL], dtype=torch.float64), trajectory=True)[:, 0]
    return {"error": relative(x, grown(node.times())), "seconds": time.process_time() - start}


def logistic_pinn(rival: Rival, seconds: float, seed: int) -> Result:
    model = Field(
        "t",
        (0.0,),
        (HORIZON,),
        lift=lambda z: 0 * z + SMALL,
        start=True,
        width=rival.width,
        layers=rival.layers,
        seed=seed,
    )

    def equation(model: Field, z: Tensor) -> Tensor:
        u = model.jets(z, ("t",))
        return u["t"] - logistic(z, u[""])

    terms = [Term(equation, scattered((0.0,), (HORIZON,), rival.points, seed))]
    spent = rival.train(model, terms, seconds)
    with torch.no_grad():
        return {"error": relative(model(CHECKED[:, None])[:, 0], grown(CHECKED)), "seconds": spent}


# ---- heat, direct and inverse -----------------------------------------------------------------------------

CONDUCTIVITY = 0.05
LINE = torch.linspace(0, 1, 201, dtype=torch.float64)
SENSORS, VISITS = (0.1, 0.3, 0.5, 0.7, 0.9), 20


def heat_start(x: Tensor) -> Tensor:
    return torch.sin(PI * x) + 0.5 * torch.sin(3 * PI * x)


def heat_exact(t: Tensor | float, x: Tensor) -> Tensor:
    def decay(k: int) -> Tensor:
        return torch.exp(-CONDUCTIVITY * (k * PI) ** 2 * torch.as_tensor(t, dtype=torch.float64))

    return decay(1) * torch.sin(PI * x) + 0.5 * decay(3) * torch.sin(3 * PI * x)


def heat_field(cells: int) -> Callable[..., Tensor]:
    """Linear finite elements with lumped mass on the inner vertices of [0, 1], u = 0 at the ends."""

    def f(t: Tensor | float, u: Tensor, D: Tensor | float = CONDUCTIVITY) -> Tensor:
        wide = nn.functional.pad(u, (1, 1))
        return D * cells**2 * (wide[..., 2:] - 2 * u + wide[..., :-2])

    return f


def heat_network(
    cells: int, steps: int, unknowns: Mapping[str, Unknown] | None = None, most: float = CONDUCTIVITY
) -> Node:
    """Steps of Runge-Kutta-Chebyshev with the stages that D = `most` needs."""
    stages = 2
    while real_interval(stages) < 1.05 * 4 * most * cells**2 / steps:
        stages += 1
    return Node(ScienceActivated(heat_field(cells), unknowns), 1.0, steps, f"chebyshev{stages}")


def inner(cells: int) -> Tensor:
    return torch.linspace(0, 1, cells + 1, dtype=torch.float64)[1:-1]


def between(u: Tensor, x: Tensor) -> Tensor:
    """At points x, linear functions between the values u (..., cells - 1) at the inner vertices."""
    wide = nn.functional.pad(u, (1, 1))
    cells = wide.shape[-1] - 1
    left = (x * cells).floor().long().clamp(max=cells - 1)
    share = x * cells - left
    return wide[..., left] * (1 - share) + wide[..., left + 1] * share


def heat_ours(cells: int, steps: int) -> Result:
    start = time.process_time()
    with torch.no_grad():
        u = heat_network(cells, steps)(heat_start(inner(cells)))
    spent = time.process_time() - start
    return {"error": relative(between(u, LINE), heat_exact(1.0, LINE)), "seconds": spent}


def heat_model(rival: Rival, seed: int) -> Field:
    return Field(
        "tx",
        (0.0, 0.0),
        (1.0, 1.0),
        lift=lambda z: heat_start(z[:, 1:]),
        factor=lambda z: z[:, 1:] * (1 - z[:, 1:]),
        start=True,
        width=rival.width,
        layers=rival.layers,
        seed=seed,
    )


def heat_pinn(rival: Rival, seconds: float, seed: int) -> Result:
    model = heat_model(rival, seed)

    def equation(model: Field, z: Tensor) -> Tensor:
        u = model.jets(z, ("t", "xx"))
        return u["t"] - CONDUCTIVITY * u["xx"]

    terms = [Term(equation, scattered((0.0, 0.0), (1.0, 1.0), rival.points, seed))]
    spent = rival.train(model, terms, seconds)
    with torch.no_grad():
        u = model(torch.stack([torch.ones_like(LINE), LINE], 1))[:, 0]
    return {"error": relative(u, heat_exact(1.0, LINE)), "seconds": spent}


def heat_data(seed: int, noise: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """Times (n,), places (m,), u (n, m) of the closed form with noise of a share of the largest value."""
    times = torch.linspace(0, 1, VISITS + 1, dtype=torch.float64)[1:]
    places = torch.tensor(SENSORS, dtype=torch.float64)
    clean = heat_exact(times[:, None], places)
    draw = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return times, places, clean + noise * float(clean.abs().max()) * draw


def heat_identified(seed: int, start: float = 0.15, cells: int = 32, noise: float = 0.01) -> Result:
    """D by Levenberg-Marquardt from data at five places and 20 times."""
    begin = time.process_time()
    _, places, data = heat_data(seed, noise)
    unknown = Unknown(start, positive=True)
    network = heat_network(cells, 2 * VISITS, {"D": unknown}, most=0.5)
    own = Parameters(network)

    def observe(values: Values, copies: int) -> Tensor:
        x0 = heat_start(inner(cells)).repeat(copies, 1)
        states = torch.func.functional_call(network, values, (x0,), {"trajectory": True})
        return between(states[2::2], places)

    problem = Copies(own, observe, data, torch.full_like(data, 0.01 * float(data.abs().max())))
    own.load(gauss_newton.minimise(problem, own.pack(), stopping=STOPPING).m)
    error = abs(float(unknown.value()) / CONDUCTIVITY - 1)
    return {"error": error, "seconds": time.process_time() - begin}


def heat_inverse_pinn(rival: Rival, seconds: float, seed: int, start: float = 0.15) -> Result:
    model = Unknowing(heat_model(rival, seed), {"D": start})
    times, places, data = heat_data(seed)
    rows = torch.cartesian_prod(times, places)
    rows = torch.cat([rows, data.reshape(-1, 1)], 1)
    inputs = columns(rows, 2)

    def equation(model: Unknowing, z: Tensor) -> Tensor:
        u = model.solution.jets(z, ("t", "xx"))
        return u["t"] - model.rates()["D"] * u["xx"]

    def misfit(model: Unknowing, z: Tensor) -> Tensor:
        return model.solution(inputs(z)) - z[:, 2:]

    terms = [
        Term(equation, scattered((0.0, 0.0), (1.0, 1.0), rival.points, seed)),
        Term(misfit, rows, rival.data),
    ]
    spent = rival.train(model, terms, seconds)
    return {"error": abs(float(model.rates()["D"].detach()) / CONDUCTIVITY - 1), "seconds": spent}


# ---- Poisson ----------------------------------------------------------------------------------------------

SQUARE = torch.cartesian_prod(LINE[::2], LINE[::2])


def poisson_exact(z: Tensor) -> Tensor:
    a, b = (torch.sin(PI * z[:, k]) for k in (0, 1))
    return a * b + 0.5 * torch.sin(3 * PI * z[:, 0]) * torch.sin(2 * PI * z[:, 1])


def poisson_load(z: Tensor) -> Tensor:
    """-Laplace of it."""
    low = torch.sin(PI * z[:, 0]) * torch.sin(PI * z[:, 1])
    return PI**2 * (2 * low + 6.5 * torch.sin(3 * PI * z[:, 0]) * torch.sin(2 * PI * z[:, 1]))


def poisson_ours(cells: int) -> Result:
    """The same energy over piecewise-linear functions, in H1_0."""
    begin = time.process_time()
    side = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    corner = (torch.arange(cells)[:, None] * (cells + 1) + torch.arange(cells)).reshape(-1)
    right, up, across = corner + cells + 1, corner + 1, corner + cells + 2
    mesh = Elements(
        points, torch.cat([torch.stack([corner, right, across], 1), torch.stack([corner, across, up], 1)])
    )
    free = ((points > 0) & (points < 1)).all(1).nonzero()[:, 0]
    load = poisson_load(points)

    def whole(m: Tensor) -> Tensor:
        return torch.zeros(len(points), dtype=torch.float64).index_add(0, free, m)

    problem = InverseProblem(mesh.dirichlet(free), lambda m: mesh.energy(whole(m), membrane, load))
    rules = (GradientTolerance(1e-8), MaxIterations(20))
    found = newton_cg.minimise(problem, torch.zeros(len(free), dtype=torch.float64), "full", stopping=rules)
    u = whole(found.m).view(cells + 1, cells + 1)[None, None]
    spent = time.process_time() - begin
    place = (2 * SQUARE - 1).flip(1)[None, None]
    seen = nn.functional.grid_sample(u, place, "bilinear", "border", align_corners=True)
    return {"error": relative(seen.reshape(-1), poisson_exact(SQUARE)), "seconds": spent}


def poisson_rival(rival: Rival, seconds: float, seed: int, energy: bool) -> Result:
    """By the energy (deep Ritz) or by the residual (PINN)."""
    model = Field(
        "xy",
        (0.0, 0.0),
        (1.0, 1.0),
        factor=lambda z: (z * (1 - z)).prod(1, keepdim=True),
        width=rival.width,
        layers=rival.layers,
        seed=seed,
    )
    points = scattered((0.0, 0.0), (1.0, 1.0), rival.points, seed)

    def ritz(model: Field, z: Tensor) -> Tensor:
        u = model.jets(z, ("x", "y"))
        return 0.5 * (u["x"] ** 2 + u["y"] ** 2) - poisson_load(z)[:, None] * u[""]

    def equation(model: Field, z: Tensor) -> Tensor:
        u = model.jets(z, ("xx", "yy"))
        return u["xx"] + u["yy"] + poisson_load(z)[:, None]

    term = Term(ritz if energy else equation, points, energy=energy)
    spent = rival.train(model, [term], seconds)
    with torch.no_grad():
        return {"error": relative(model(SQUARE)[:, 0], poisson_exact(SQUARE)), "seconds": spent}
