"""Gradients of partner and non-partner discretisations against step size: the gap, and where it explodes.

A gradient is that of the cost that the program computes, or it is not. Two problems, each with the gradient
by autograd through the steps as the truth:

- a standalone NODE, x' = tanh(W(t) x + b(t)) in 8 dimensions, 32 states, least squares, T = 2;
- heat on a rod, x' = w L x with 31 inner nodes, whose fastest mode decays by exp(-200) in the time T: every
  explicit scheme here takes the steps that it needs to be stable, and more.

"partner": the discrete adjoint of `integrate`, the symplectic partner scheme. "backsolve": state, costate
and gradient together backwards with the scheme of the direct run, which is what torchdiffeq's adjoint does.
Bars: the partner is exact to rounding at every step size; the gap of backsolve is nowhere near rounding on
coarse grids, and falls with the scheme's order only (Heun's with one more: it is even, and the leading
errors of it and its partner agree); on the rod its gradient is nonsense at every step size. Errors are
relative, in the norm of the whole gradient. A picture: results/benchmarks/adjoint_gap.png.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from scripts.benchmarks import Check
from solvers.node.fields import Standalone
from solvers.ode.costate import backsolve
from solvers.ode.integrate import integrate

PICTURE = Path(__file__).resolve().parents[2] / "results" / "benchmarks" / "adjoint_gap.png"
SCHEMES = {"euler": 1, "heun": 3, "kutta3": 3, "kutta4": 4}  # and the order of the gap
COLOURS = dict(zip(SCHEMES, ("#D55E00", "#E69F00", "#009E73", "#0072B2"), strict=True))
INK = "#1F2933"
EPS = torch.finfo(torch.float64).eps

Solve = Callable[..., Tensor]  # as `integrate`: (field, x0, times, scheme) -> x(T)
Gradient = Callable[[Solve, Tensor, str], Tensor]  # of a problem, flat
Errors = dict[str, list[float]]
Findings = tuple[list[int], Errors, Errors]  # numbers of steps; errors of partner and of backsolve


def node() -> Gradient:
    """The gradient by the weights and by x0."""
    random = torch.Generator().manual_seed(1)
    field = Standalone(8, knots=5, duration=2.0).double()
    field.reset(gain=1.5, rough=0.5, generator=random)
    x0, goal = torch.randn(2, 32, 8, generator=random, dtype=torch.float64)

    def gradient(solve: Solve, times: Tensor, scheme: str) -> Tensor:
        inputs = [x0.clone().requires_grad_(), *field.parameters()]
        J = 0.5 * (solve(field, inputs[0], times, scheme) - goal).square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(J, inputs)])

    return gradient


def rod(n: int = 31) -> tuple[Gradient, float]:
    """The gradient by w and by x0 of 1/2 ||x(T) - goal||^2 at w = 1, and the largest |eigenvalue|."""
    off = torch.ones(n - 1, dtype=torch.float64)
    L = (n + 1) ** 2 * (torch.diag(off, 1) + torch.diag(off, -1) - 2 * torch.eye(n, dtype=torch.float64))
    place = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    start, goal = torch.exp(-50 * (place - 0.3) ** 2), 0.3 * torch.sin(math.pi * place)

    def field(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return w * (x @ L)

    def gradient(solve: Solve, times: Tensor, scheme: str) -> Tensor:
        inputs = [start.clone().requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)]
        x = solve(field, inputs[0], times, scheme, parameters=(inputs[1],))
        J = 0.5 * (x - goal).square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(J, inputs)])

    return gradient, 4 * (n + 1) ** 2


def errors(gradient: Gradient, T: float, counts: list[int]) -> Findings:
    """Relative to autograd on the same grid, for each scheme and grid."""
    partner: Errors = {}
    gap: Errors = {}
    for scheme in SCHEMES:
        for n in counts:
            times = torch.linspace(0, T, n + 1, dtype=torch.float64)
            truth = gradient(partial(integrate, gradient="autograd"), times, scheme)
            for found, solve in ((partner, integrate), (gap, backsolve)):
                error = float((gradient(solve, times, scheme) - truth).norm() / truth.norm())
                found.setdefault(scheme, []).append(error)
    return counts, partner, gap


def listed(values: Sequence[float]) -> str:
    return " ".join(f"{v:.1e}" for v in values)


def order(found: Sequence[float]) -> float:
    return math.log2(found[-2] / found[-1])


def on_the_node(full: bool) -> tuple[list[Check], Findings]:
    """Rows of a table: errors at halved steps, observed orders."""
    counts = [4, 8, 16, 32, 64, 128, 256, 512] if full else [4, 8, 16, 32, 64, 128]
    _, partner, gap = found = errors(node(), 2.0, counts)
    steps = f"{counts[0]} to {counts[-1]} steps"
    worst = max(itertools.chain(*partner.values()))
    checks = [Check.at_most("NODE, partner, all schemes: largest error", worst, 1e-12)]
    for scheme, p in SCHEMES.items():
        checks += [
            Check(f"NODE, {scheme}, backsolve: errors, {steps}", listed(gap[scheme])),
            Check.at_least(f"NODE, {scheme}, backsolve: first error / rounding", gap[scheme][0] / EPS, 1e6),
            Check.near(f"NODE, {scheme}, backsolve: order", order(gap[scheme]), p, 0.3),
        ]
    return checks, found


def on_the_rod(full: bool) -> tuple[list[Check], Findings]:
    """The same where only forwards is stable."""
    gradient, fastest = rod()
    T = 200 / fastest
    # Stable for every scheme: h |lambda| <= 2.
    counts = [100, 200, 400, 800, 1600] if full else [100, 200, 400, 800]
    _, partner, gap = found = errors(gradient, T, counts)
    steps = f"{counts[0]} to {counts[-1]} steps"
    worst = max(itertools.chain(*partner.values()))
    least = min(itertools.chain(*gap.values()))
    checks = [Check.at_most("rod, partner, all schemes: largest error", worst, 1e-12)]
    checks += [Check(f"rod, {scheme}, backsolve: errors, {steps}", listed(gap[scheme])) for scheme in SCHEMES]
    checks.append(Check.at_least("rod, backsolve: smallest error of all", least, 1e6))
    return checks, found


def picture(path: Path, panels: dict[str, Findings]) -> None:
    """Error against the number of steps, one panel for each problem."""
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, (counts, partner, gap)) in zip(
        figure.subplots(1, len(panels)), panels.items(), strict=True
    ):
        for scheme, colour in COLOURS.items():
            axes.loglog(counts, gap[scheme], "o-", color=colour, markersize=4, label=f"{scheme}, backsolve")
            # Where the partner agrees to the last bit, a point on the lower edge says so.
            least = [max(e, EPS / 8) for e in partner[scheme]]
            axes.loglog(counts, least, "s--", color=colour, markersize=3, linewidth=0.8)
        axes.axhline(1.0, color=INK, linewidth=0.6, linestyle=":")
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlabel("steps", color=INK)
    first = figure.axes[0]
    first.set_ylabel("relative error of the gradient", color=INK)
    first.plot([], [], "s--", color=INK, markersize=3, linewidth=0.8, label="all four, partner")
    first.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(0.0, 0.4))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "Gliode"})


def run(full: bool) -> list[Check]:
    """All checks, and the picture; `--full`: finer steps."""
    torch.set_num_threads(1)
    of_node, smooth = on_the_node(full)
    of_rod, stiff = on_the_rod(full)
    picture(PICTURE, {"standalone NODE, T = 2": smooth, "heat on a rod, backwards": stiff})
    return [*of_node, *of_rod, Check("picture", str(PICTURE.relative_to(PICTURE.parents[2])))]
