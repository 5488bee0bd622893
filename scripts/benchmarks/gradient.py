"""Derivatives of the tumour model: Taylor slopes, dot test, second derivatives, cost, one late observation.

MNI152; 20 steps of 10 days, the default. Taylor remainders |J(m + e d) - J(m) - e J'd| must fall as e^2 for
every kind of parameter; the dot test compares <J d, y> by forward mode with <d, J^T y> by reverse mode.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from scripts.benchmarks import Check
from solvers.evolution import Evolution
from tumour.anatomy import mni152
from tumour.model import TumourModel, domain_of

DAYS, STEPS = 200.0, 20
CHECKPOINT = 5  # about the square root of the steps


def number(value: float) -> Tensor:
    """A 0-d float64 tensor."""
    return torch.tensor(value, dtype=torch.float64)


class Problem:
    """J(m) = 1/2 |u(T) - goal|^2 in the lumped L2 norm, with each kind of parameter as an argument."""

    def __init__(self, spacing: float, checkpoint: int | None = None) -> None:
        self.model = TumourModel(domain_of(mni152(spacing)), checkpoint=checkpoint, rtol=1e-12)
        self.domain = self.model.domain
        self.evolution: Evolution = self.model._evolution
        x = self.domain.points[: self.domain.n_owned] / 30
        self.goal = torch.from_numpy(0.3 + 0.2 * np.sin(x[:, 0] + 2 * x[:, 1]) * np.cos(x[:, 2]))
        self.base: dict[str, Tensor] = {
            "D_white": number(0.3),
            "D_grey": number(0.05),
            "D(x)": torch.zeros(self.domain.n_cells, dtype=torch.float64),
            "rho": number(0.02),
            "rho(x)": torch.zeros(self.domain.n_owned, dtype=torch.float64),
            "initial field": torch.zeros(self.domain.n_owned, dtype=torch.float64),
            "seed position": torch.tensor([-28.0, -14.0, 26.0], dtype=torch.float64),
            "age": number(DAYS),
        }

    def direction(self, name: str) -> Tensor:
        """A direction of about a tenth of the parameter's size."""
        draw = torch.rand(
            self.base[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
        )
        size = {"D_white": 0.03, "D_grey": 0.01, "D(x)": 0.02, "rho": 0.002, "rho(x)": 0.002, "age": 20.0}
        return (draw + 0.5) * size.get(name, 0.02 if name == "initial field" else 0.5)

    def state(self, **changes: Tensor) -> Tensor:
        """u(T)."""
        m = self.base | changes
        D = self.model.diffusivity(m["D_white"], m["D_grey"])
        u = self.model.seed_state(m["seed position"])
        rho = m["rho"]
        # The fields are zero and enter only where they are asked for, as in a run without them.
        D = D + m["D(x)"] if "D(x)" in changes else D
        u = u + m["initial field"] if "initial field" in changes else u
        rho = rho + m["rho(x)"] if "rho(x)" in changes else rho
        return self.evolution(u, m["age"], STEPS, self.model.operator.conductances(D), rho)

    def cost(self, **changes: Tensor) -> Tensor:
        """J."""
        return 0.5 * (self.domain.mass * (self.state(**changes) - self.goal).square()).sum()

    def gradient(self, name: str, at: Tensor, create_graph: bool = False) -> Tensor:
        """dJ/dm_name, dual."""
        leaf = at if at.requires_grad else at.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.cost(**{name: leaf}), leaf, create_graph=create_graph)
        return found


def taylor(problem: Problem) -> list[Check]:
    """Slopes of the remainder between successive halvings, for each kind."""
    checks = []
    for name, m in problem.base.items():
        d = problem.direction(name)
        slope = float((problem.gradient(name, m) * d).sum())
        with torch.no_grad():
            start = float(problem.cost())
            remainders = [
                abs(float(problem.cost(**{name: m + e * d})) - start - e * slope) for e in (0.02, 0.01, 0.005)
            ]
        slopes = np.log2(np.array(remainders[:-1]) / np.array(remainders[1:]))
        worst = slopes[np.abs(slopes - 2).argmax()]
        checks.append(Check.near(f"Taylor slope, {name}", float(worst), 2.0, 0.05))
    return checks


def dot_test(problem: Problem) -> Check:
    """<J d, y> against <d, J^T y> over all kinds at once."""
    names = list(problem.base)
    y = torch.randn(problem.domain.n_owned, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    directions = {name: problem.direction(name) for name in names}
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(problem.base[name], directions[name]) for name in names}
        forward = float(forward_ad.unpack_dual(problem.state(**duals)).tangent @ y)
    leaves = {name: problem.base[name].clone().requires_grad_() for name in names}
    gradients = torch.autograd.grad(problem.state(**leaves), list(leaves.values()), y)
    reverse = sum(float((g * directions[name]).sum()) for name, g in zip(names, gradients, strict=True))
    return Check.at_most("dot test, relative", abs(forward - reverse) / abs(forward), 1e-8)


def second_derivatives(problem: Problem) -> list[Check]:
    """Hessian actions against central differences of the gradient."""
    checks = []
    for name, m in problem.base.items():
        d = problem.direction(name)
        e = 1e-3
        exact = (problem.gradient(name, m + e * d) - problem.gradient(name, m - e * d)) / (2 * e)
        leaf = m.clone().requires_grad_()
        (reverse,) = torch.autograd.grad(problem.gradient(name, leaf, create_graph=True), leaf, d)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(m.clone().requires_grad_(), d)
            forward = forward_ad.unpack_dual(problem.gradient(name, dual)).tangent
        scale = float(exact.norm())
        for mode, found in (("reverse", reverse), ("forward", forward)):
            error = float((found - exact).norm()) / scale
            checks.append(Check.at_most(f"{mode} over reverse, {name}, relative error", error, 1e-4))
    return checks


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Processor seconds of one call (one thread: what others run beside it counts little), and its result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def cost_of_gradient(spacing: float, repeats: int) -> list[Check]:
    """Backward sweep over forward run, paired: the median of the ratios."""
    checks = []
    names = ("D_white", "D_grey", "rho", "seed position", "age")
    for checkpoint, bar in ((None, 1.6), (CHECKPOINT, 2.8)):
        problem = Problem(spacing, checkpoint)
        leaves = {name: problem.base[name].clone().requires_grad_() for name in names}
        ratios = []
        for _ in range(repeats):
            with torch.no_grad():
                forward, _ = timed(problem.cost)
            taped, J = timed(partial(problem.cost, **leaves))
            backward, _ = timed(partial(_sweep, J, list(leaves.values())))
            ratios.append((backward / forward, (taped + backward) / forward))
        how = f"{'with' if checkpoint else 'without'} checkpointing, {spacing:g} mm"
        adjoint, whole = (statistics.median(ratio) for ratio in zip(*ratios[2:], strict=True))
        checks.append(Check.at_most(f"adjoint / forward time, {how}", adjoint, bar))
        checks.append(Check(f"value and gradient / forward time, {how}", whole))
    return checks


def _sweep(J: Tensor, leaves: list[Tensor]) -> Tensor:
    return torch.autograd.grad(J, leaves)[0]


def single_observation(problem: Problem) -> list[Check]:
    """The derivative by rho of u at day 200 and 20 mm from the seed, against central differences."""
    away = torch.from_numpy(problem.domain.points[: problem.domain.n_owned]) - problem.base["seed position"]
    at = int(((away.norm(dim=1) - 20.0).abs()).argmin())
    rho = problem.base["rho"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(problem.state(rho=rho)[at], rho)
    e = 2e-4 * float(rho)
    with torch.no_grad():
        u = [float(problem.state(rho=problem.base["rho"] + k * e)[at]) for k in (-2, -1, 1, 2)]
    exact = (u[0] - 8 * u[1] + 8 * u[2] - u[3]) / (12 * e)
    return [
        Check.at_least(
            "one observation at day 200: sign of the derivative", float(slope) * np.sign(exact), 0.0
        ),
        Check.at_most("the same, relative error", abs(float(slope) - exact) / abs(exact), 1e-6),
    ]


def run(full: bool) -> list[Check]:
    """All checks; `--full` at 3 mm, timed at 2 mm, instead of 6 mm and 3 mm."""
    torch.set_num_threads(1)
    problem = Problem(3.0 if full else 6.0)
    return [
        *taylor(problem),
        dot_test(problem),
        *second_derivatives(problem),
        *single_observation(problem),
        *cost_of_gradient(2.0 if full else 3.0, 12),
    ]
