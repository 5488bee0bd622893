r"""Is a derivative right? Taylor ladders and dot products for any problem, at any point.

With f(h) = J(m + h d), r(m + h d) or J'(m + h d) and D the derivative that the tape gives along d,

    remainder(h) = ||f(h) - f(0) - h D||     falls as h^2; as h where D is wrong
    mismatch(h)  = ||c(h) - D|| / size(h),   c(h) = (f(h) - f(-h)) / 2h,   falls as h^2 down to rounding / h,

size(h) the largest of ||D||, ||c(h)|| and, for points where both vanish, a thousandth of ||f(h_1) - f(0)|| /
h_1. The least mismatch that two rungs in a row keep within is the error found in D (a single one may vanish
by chance, where h^2 hides a wrong D), and the verdict compares it with a tolerance: the remainders' first
steps fall as h^2 for a slightly wrong D too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from inverse.problem import InverseProblem, LeastSquares
from solvers.errors import GliodeError
from solvers.spaces import Space

STEPS = tuple(10.0 ** (-1 - k / 2) for k in range(11))
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Verification:
    """The outcome of a check; printed, it is the ladder and the verdict.

    steps, remainders, mismatches: one entry a rung; slopes: of log(remainder) between rungs; slope: their
    median up to the least remainder (2 where D is right, 1 where it is wrong, nan or noise where f is
    linear); error: the least mismatch of two rungs in a row; product_error: |a - b| / max(|a|, |b|) of the
    two products that must agree (None in `check_gradient`); passed: both errors within `tolerance`.
    """

    what: str
    steps: tuple[float, ...]
    remainders: tuple[float, ...]
    mismatches: tuple[float, ...]
    slopes: tuple[float, ...]
    slope: float
    error: float
    product_error: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the derivative holds."""
        errors = [self.error, *([] if self.product_error is None else [self.product_error])]
        return all(error <= self.tolerance for error in errors)

    def __str__(self) -> str:
        lines = [self.what, f"{'h':>10} {'remainder':>12} {'slope':>6} {'mismatch':>10}"]
        rows = zip(self.steps, self.remainders, (math.nan, *self.slopes), self.mismatches, strict=True)
        for h, remainder, slope, mismatch in rows:
            shown = f"{slope:.2f}" if math.isfinite(slope) else ""
            lines.append(f"{h:10.1e} {remainder:12.3e} {shown:>6} {mismatch:10.1e}")
        if self.product_error is not None:
            lines.append(f"the two products differ by {self.product_error:.1e}")
        verdict = "passed" if self.passed else "FAILED"
        lines.append(f"{verdict}: error {self.error:.1e}, tolerance {self.tolerance:.1e}")
        return "\n".join(lines)


def check_gradient(
    problem: InverseProblem,
    m: Tensor,
    d: Tensor | None = None,
    steps: Sequence[float] = STEPS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    show: bool = True,
) -> Verification:
    """J'(m) against values of J along d.

    d: a direction (None: the Riesz map of white noise, of the norm of m or 1, whichever is larger); steps:
    decreasing h > 0, two values of J each; tolerance: near (relative error of the solvers)^(2/3). show: print
    it (under MPI on one rank). Raises GliodeError for steps or points that are unusable.
    """
    m, d = _prepared(problem, m, d, steps, seed)
    value, gradient = problem.value_and_gradient(m)
    slope = torch.tensor(problem.space.pair(gradient, d), dtype=torch.float64)

    def f(h: float) -> Tensor:
        return torch.tensor(problem.value(m + h * d), dtype=torch.float64)

    start = torch.tensor(value, dtype=torch.float64)
    ladder = _ladder(f, start, slope, lambda x: float(x.abs()), steps)
    return _finish(problem, "gradient: J(m + h d) against J(m) + h <J'(m), d>", ladder, None, tolerance, show)


def check_adjoint(
    problem: LeastSquares,
    m: Tensor,
    d: Tensor | None = None,
    steps: Sequence[float] = STEPS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    show: bool = True,
) -> Verification:
    """The tangent r'(m) d against residuals along d, and <r'(m) d, w> = <d, r'(m)^T w> for white noise w.

    Arguments as of `check_gradient`. A right tangent with unequal products means a wrong adjoint.
    """
    if not isinstance(problem, LeastSquares):
        raise GliodeError("check_adjoint: needs a LeastSquares problem; else take check_gradient")
    m, d = _prepared(problem, m, d, steps, seed)
    start, tangent = problem.linearised(m, d)
    w = torch.randn(start.shape, dtype=start.dtype, generator=torch.Generator().manual_seed(seed + 1))
    forward = float(problem.data_product(tangent, w))
    backward = problem.space.pair(problem.vjp(m, w), d)

    def norm(x: Tensor) -> float:
        return math.sqrt(float(problem.data_product(x, x)))

    ladder = _ladder(lambda h: problem.residual(m + h * d), start, tangent, norm, steps)
    what = "tangent: r(m + h d) against r(m) + h r'(m) d; products <r'(m) d, w> and <d, r'(m)^T w>"
    return _finish(problem, what, ladder, (forward, backward), tolerance, show)


def check_hessian(
    problem: InverseProblem,
    m: Tensor,
    d: Tensor | None = None,
    steps: Sequence[float] = STEPS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    show: bool = True,
) -> Verification:
    """J''(m) d against gradients along d, in the dual norm, and <J''(m) d, e> = <J''(m) e, d> for another e.

    Arguments as of `check_gradient`.
    """
    m, d = _prepared(problem, m, d, steps, seed)
    space = problem.space
    here = problem.evaluate(m)
    action = here.hessian_action(d)
    e = _direction(space, m, seed + 1)
    products = space.pair(action, e), space.pair(here.hessian_action(e), d)

    def f(h: float) -> Tensor:
        return problem.value_and_gradient(m + h * d)[1]

    ladder = _ladder(f, here.gradient(), action, space.dual_norm, steps)
    what = "Hessian: J'(m + h d) against J'(m) + h J''(m) d; products <J''(m) d, e> and <J''(m) e, d>"
    return _finish(problem, what, ladder, products, tolerance, show)


def _direction(space: Space, m: Tensor, seed: int) -> Tensor:
    white = torch.randn(m.shape, dtype=m.dtype, generator=torch.Generator().manual_seed(seed))
    d = space.riesz(white)
    return d * (max(space.norm(m), 1.0) / space.norm(d))


def _prepared(
    problem: InverseProblem, m: Tensor, d: Tensor | None, steps: Sequence[float], seed: int
) -> tuple[Tensor, Tensor]:
    problem.space.check(m, "point")
    if len(steps) < 3 or any(not 0 < b < a for a, b in pairwise(steps)):
        raise GliodeError("verification: steps must be at least three decreasing positive numbers")
    if d is None:
        d = _direction(problem.space, m, seed)
    problem.space.check(d, "direction")
    if not problem.space.norm(d) > 0:
        raise GliodeError("verification: the direction is zero; give another, or none")
    return m.detach(), d.detach()


def _ladder(
    f: Callable[[float], Tensor],
    start: Tensor,
    derivative: Tensor,
    norm: Callable[[Tensor], float],
    steps: Sequence[float],
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Steps, remainders and mismatches."""
    remainders: list[float] = []
    mismatches: list[float] = []
    least = max(norm(derivative), 1e-300)
    for h in steps:
        ahead, back = f(h), f(-h)
        if not remainders:
            least = max(least, 1e-3 * norm(ahead - start) / h)
        central = (ahead - back) / (2 * h)
        remainders.append(norm(ahead - start - h * derivative))
        mismatches.append(norm(central - derivative) / max(least, norm(central)))
    return tuple(steps), tuple(remainders), tuple(mismatches)


def _finish(
    problem: InverseProblem,
    what: str,
    ladder: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]],
    products: tuple[float, float] | None,
    tolerance: float,
    show: bool,
) -> Verification:
    steps, remainders, mismatches = ladder
    logs = np.log(np.maximum(remainders, 1e-300))
    slopes = np.diff(logs) / np.diff(np.log(steps))
    falling = slopes[: int(np.argmin(remainders))]
    pairs = [max(pair) for pair in pairwise(mismatches) if all(map(math.isfinite, pair))]
    product_error = None
    if products is not None:
        product_error = abs(products[0] - products[1]) / max(abs(products[0]), abs(products[1]), 1e-300)
    outcome = Verification(
        what=what,
        steps=steps,
        remainders=remainders,
        mismatches=mismatches,
        slopes=tuple(slopes.tolist()),
        slope=float(np.median(falling)) if len(falling) else math.nan,
        error=min(pairs, default=math.inf),
        product_error=product_error,
        tolerance=tolerance,
    )
    if show and getattr(problem.space.comm, "rank", 0) == 0:
        print(outcome)
    return outcome
