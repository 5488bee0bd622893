r"""Choice of the regularization: orders of convergence, and how near the rules come to the best alpha.

Five linear problems and a nonlinear one, solved by Tikhonov in a space X with white noise of delta = 10 % to
0.1 % of the data. The truth is x = (A* A)^mu w, A* the adjoint in X and w = sum +-j^(-1/2) v_j over the
singular vectors of A: w has (but for a logarithm) a bounded norm and no more. Then the error falls as
delta^(2 mu / (2 mu + 1)), up to mu = 1 with the best alpha, up to mu = 1/2 with the discrepancy principle's
(Engl, Hanke, Neubauer 1996, chapters 4 and 5). Errors are in L2, also where X is stronger: there the order is
a lower bound.

Bars: orders at most 0.1 below the theory; at mu = 1/4 the discrepancy principle's and gcv's median error over
20 draws at most 1.5 times the oracle's at every delta. Smoother truths are shown without a bar: gcv minimises
the error of the data, which gains nothing from mu > 1/2, and needs a smaller alpha than the error of x.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inverse.choice import (
    Choice,
    SpectralTikhonov,
    discrepancy,
    gcv,
    l_curve,
    oracle,
    quasi_optimality,
    sweep,
)
from inverse.choice.spectral import Regularized
from inverse.choice.trials import Solve
from inverse.linear_problems import (
    LinearMap,
    convolution,
    downsampling,
    gaussian,
    heat,
    inpainting,
    tomography,
)
from inverse.optimizers import newton_cg
from inverse.problem import LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import GradientTolerance, MaxIterations
from scripts.benchmarks import Check
from solvers.spaces import Euclidean, GramSpace, Space

LEVELS = (1e-1, 10**-1.5, 1e-2, 10**-2.5, 1e-3)
DRAWS, SEED = 20, 0
SLACK, RATIO = 0.1, 1.5
SMOOTHNESS = (0.25, 0.5, 1.0)  # mu; the rules are barred at the first
SIDE = 24  # pixels of the pictures
RULES = ("discrepancy", "gcv", "l_curve", "quasi_optimality")


def run(full: bool) -> list[Check]:
    """All checks; `full` takes pictures of 32 x 32 pixels and 50 draws."""
    checks: list[Check] = []
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a choice at an end of the grid: its error counts as any
        for name, (forward, space) in linear(32 if full else SIDE).items():
            checks += linear_checks(name, forward, space, 50 if full else DRAWS)
        checks += nonlinear_checks(50 if full else DRAWS)
    return checks


# ---- what is solved ---------------------------------------------------------------------------------------


def linear(side: int) -> dict[str, tuple[LinearMap, Space]]:
    """Name -> map and space X of its regularizer."""
    seen = torch.rand(side, side, generator=torch.Generator().manual_seed(0)) < 0.5
    smooth = smooth_space(side, 2.0)
    return {
        "deconvolution": (convolution((side, side), gaussian(1.5, 2)), Euclidean(side**2)),
        "tomography": (tomography(side, 3 * side // 2, side), Euclidean(side**2)),
        "backward heat": (heat((64,), 4.0), Euclidean(64)),
        "inpainting": (inpainting(seen), smooth),
        "super-resolution": (downsampling((side, side), 2), smooth),
    }


def smooth_space(side: int, length: float) -> Space:
    """H2 on a picture, G = (1 + length^2 K)^2, K the Laplacian: in it a pixel's value is continuous."""
    line = torch.eye(side, dtype=torch.float64)
    slopes = line[1:] - line[:-1]
    K = torch.kron(slopes.mT @ slopes, line) + torch.kron(line, slopes.mT @ slopes)
    root = torch.eye(side**2, dtype=torch.float64) + length**2 * K
    gram = root @ root
    factor = torch.linalg.cholesky(gram)
    return GramSpace(side**2, lambda a: gram @ a, lambda d: torch.cholesky_solve(d[:, None], factor)[:, 0])


def source(svd: SpectralTikhonov) -> Tensor:
    """w."""
    j = torch.arange(1, len(svd.values) + 1, dtype=torch.float64)
    return svd.right @ ((-1) ** j / j.sqrt())


# ---- the study --------------------------------------------------------------------------------------------


@dataclass
class Draw:
    """One data set: how to solve it, and where to look."""

    solve: Solve
    freedom: Callable[[float, Tensor], float]
    size: int
    start: Tensor
    alphas: list[float]


def noisy(clean: Tensor, level: float, draws: int) -> Iterator[tuple[Tensor, float]]:
    """Data with white noise of that level relative to ||clean||, and its standard deviation."""
    sd = level * float(clean.norm()) / math.sqrt(clean.numel())
    for draw in range(draws):
        generator = torch.Generator().manual_seed(SEED + draw)
        yield clean + sd * torch.randn(clean.shape, generator=generator, dtype=torch.float64), sd


def errors(draw: Draw, truth: Tensor, norm: Space, rules: tuple[str, ...]) -> dict[str, float]:
    """The relative error of the oracle, and that of each rule over it."""
    trials = sweep(draw.solve, draw.start, draw.alphas)
    # The square of the noise's norm has mean N and variance 2 N: tau sqrt(N) is one deviation above.
    tau = math.sqrt(1 + math.sqrt(2 / draw.size))
    chosen: dict[str, Callable[[], Choice]] = {
        "discrepancy": lambda: discrepancy(
            draw.solve, draw.start, math.sqrt(draw.size), tau, draw.alphas[len(draw.alphas) // 3]
        ),
        "gcv": lambda: gcv(trials, draw.freedom, draw.size),
        "l_curve": lambda: l_curve(trials),
        "quasi_optimality": lambda: quasi_optimality(trials, norm),
    }
    best = oracle(trials, truth, norm).numbers["relative_error"]
    out = {"oracle": best}
    for rule in rules:
        choice = chosen[rule]()
        out[rule] = norm.norm(choice.solution - truth) / norm.norm(truth) / best
    return out


Table = dict[str, list[float]]


def medians(rows: list[list[dict[str, float]]]) -> Table:
    """Key -> the median over the draws at each level."""
    return {key: [float(np.median([row[key] for row in level])) for level in rows] for key in rows[0][0]}


def order(values: list[float]) -> float:
    """The slope in log-log over the noise levels."""
    return float(np.polyfit(np.log(LEVELS), np.log(values), 1)[0])


def text(values: list[float]) -> str:
    return " ".join(f"{value:.2g}" for value in values)


def order_checks(name: str, mu: float, table: Table) -> list[Check]:
    """Errors and orders against 2 mu / (2 mu + 1); the discrepancy principle's up to mu = 1/2."""
    theory = 2 * mu / (2 * mu + 1)
    what = f"{name}, mu = {mu:g}"
    checks = [
        Check(f"{what}: oracle's error, 10 % to 0.1 % noise", text(table["oracle"])),
        Check.at_least(f"{what}: order of the oracle", order(table["oracle"]), round(theory - SLACK, 3)),
    ]
    if mu <= 0.5:
        by_rule = [a * b for a, b in zip(table["oracle"], table["discrepancy"], strict=True)]
        found = order(by_rule)
        checks.append(Check.at_least(f"{what}: order by the discrepancy", found, round(theory - SLACK, 3)))
    return checks


def rule_checks(name: str, mu: float, table: Table, barred: tuple[str, ...]) -> list[Check]:
    """Each rule's error over the oracle's: the worst level with a bar, or all levels shown."""
    checks = []
    for rule in RULES:
        if rule in table:
            what = f"{name}, mu = {mu:g}: {rule} / oracle"
            if rule in barred:
                checks.append(Check.at_most(f"{what}, worst level", max(table[rule]), RATIO))
            checks.append(Check(f"{what}, 10 % to 0.1 %", text(table[rule])))
    return checks


def linear_checks(name: str, forward: LinearMap, space: Space, draws: int) -> list[Check]:
    """One linear problem at three degrees of smoothness."""
    svd, l2 = SpectralTikhonov(forward, space), Euclidean(space.size)
    w, checks = source(svd), []
    for mu in SMOOTHNESS:
        truth = svd.power(w, mu)
        clean = forward(truth).reshape(-1)
        rows = []
        for level in LEVELS:
            row = []
            for data, sd in noisy(clean, level, draws):
                problem = svd.problem(data, sd)
                largest = float(svd.values[0] / sd) ** 2
                alphas = [largest * 10 ** (k / 4) for k in range(4, -33, -1)]
                draw = Draw(problem.solve, problem.freedom, problem.size, space.zeros(), alphas)
                row.append(errors(draw, truth, l2, RULES if mu == SMOOTHNESS[0] else RULES[:2]))
            rows.append(row)
        table = medians(rows)
        checks += order_checks(name, mu, table)
        checks += rule_checks(name, mu, table, RULES[:2] if mu == SMOOTHNESS[0] else ())
    return checks


# ---- the nonlinear problem --------------------------------------------------------------------------------

GROWTH, STEPS = 0.4, 4  # of the logistic law in a unit of time, over 4 units


def grow(u: Tensor, duration: float) -> Tensor:
    """u' = GROWTH u (1 - u), exactly, on the tape."""
    factor = math.exp(GROWTH * duration)
    return u * factor / (1 + u * (factor - 1))


def evolve(u: Tensor, diffuse: LinearMap) -> Tensor:
    """u(4) from u(0), u_t = u_xx + GROWTH u (1 - u) in insulated cells, by Strang's splitting."""
    for _ in range(STEPS):
        u = grow(diffuse(grow(u, 0.5)), 0.5)
    return u


def linearisation(u: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The same map and its Jacobian by dense products; matrix: of one step of diffusion."""
    factor = math.exp(GROWTH * 0.5)
    J = torch.eye(len(u), dtype=u.dtype)
    for _ in range(STEPS):
        for step in (None, matrix):
            if step is not None:
                u, J = step @ u, step @ J
            J = (factor / (1 + u * (factor - 1)).square())[:, None] * J
            u = grow(u, 0.5)
    return u, J


def nonlinear_checks(draws: int) -> list[Check]:
    """A tumour's density in the past from that of today, in one dimension, by Gauss and Newton's method.

    x - x* = (F'(x)* F'(x))^mu w: the reference x* is made from x and w; mu = 1/2 is the source condition
    x - x* = F'(x)* w of Tikhonov's theory for nonlinear maps (Engl, Kunisch, Neubauer 1989).
    """
    diffuse, space = heat((64,), 1.0), Euclidean(64)
    matrix = torch.stack([diffuse(unit) for unit in torch.eye(64, dtype=torch.float64)], 1)
    place = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    truth = 0.2 + 0.3 * torch.exp(-(((place - 0.4) / 0.12) ** 2))
    clean, J = linearisation(truth, matrix)
    svd, checks = SpectralTikhonov(lambda d: J @ d, space), []
    for mu in SMOOTHNESS[:2]:
        away = svd.power(source(svd), mu)
        reference = truth - 0.3 * space.norm(truth) / space.norm(away) * away
        rows = []
        for level in LEVELS:
            row = []
            for data, sd in noisy(clean, level, draws):
                largest = float(svd.values[0] / sd) ** 2
                draw = _dense(
                    matrix, data, sd, reference, [largest * 10 ** (k / 4) for k in range(4, -25, -1)]
                )
                row.append(errors(draw, truth, space, RULES if mu == SMOOTHNESS[0] else RULES[:2]))
            rows.append(row)
        table = medians(rows)
        checks += order_checks("nonlinear", mu, table)
        checks += rule_checks("nonlinear", mu, table, RULES[:2] if mu == SMOOTHNESS[0] else ())
    alpha, start = draw.alphas[8], reference
    regularizer = Tikhonov(space, alpha, reference)
    problem = LeastSquares(space, lambda u: evolve(u, diffuse), data, sd, regularizer)
    other = newton_cg.minimise(problem, start, stopping=(GradientTolerance(1e-8), MaxIterations(50))).m
    mine = draw.solve(alpha, start).m
    difference = space.norm(mine - other) / space.norm(other - reference)
    return [
        *checks,
        Check.at_most("nonlinear: its solution against newton_cg's on the tape", difference, 1e-5),
    ]


def _dense(matrix: Tensor, data: Tensor, sd: float, reference: Tensor, alphas: list[float]) -> Draw:
    """Gauss-Newton with a dense Jacobian, each step halved until the objective falls."""

    def at(alpha: float, m: Tensor) -> tuple[float, float, Tensor, Tensor]:
        out, J = linearisation(m, matrix)
        r = (out - data) / sd
        square = float(r @ r)
        return square / 2 + alpha / 2 * float((m - reference).square().sum()), square, r, J / sd

    def solve(alpha: float, start: Tensor) -> Regularized:
        m = start
        value, square, r, J = at(alpha, m)
        for _ in range(30):
            gradient = J.mT @ r + alpha * (m - reference)
            hessian = J.mT @ J + alpha * torch.eye(len(m), dtype=m.dtype)
            d = -torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
            fall = -float(gradient @ d)
            if fall <= 1e-10 * value:
                break
            step = 1.0
            while (trial := at(alpha, m + step * d))[0] > value - 1e-4 * step * fall and step > 1e-3:
                step /= 2
            m = m + step * d
            value, square, r, J = trial
        return Regularized(m, value, math.sqrt(square))

    def freedom(alpha: float, m: Tensor) -> float:
        values = torch.linalg.svdvals(at(alpha, m)[3]).square()
        return float((values / (values + alpha)).sum())

    return Draw(solve, freedom, data.numel(), reference, alphas)
