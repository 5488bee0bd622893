r"""The Runge-Kutta-Legendre polynomial of order 2: its stages, its coefficients and its stability.

One step of RKL2 (Meyer, Balsara & Aslam 2014, J. Comput. Phys. 257, 594) for u' = -L u is

    u1 = (1 - b) u0 + b P_s(1 - theta L) u0,   theta = 4 dt / (s^2 + s - 2),  b = (s^2 + s - 2) / (2s (s+1)),

P_s the Legendre polynomial of degree s: order 2, stable for dt |L| <= (s^2 + s - 2)/2, so a step twice as
long needs only 1.4 times the stages. Shared by the finite-element step of one tumour (`solvers.fem.legendre`)
and that of many (`solvers.node.science.batched`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

MOST_STAGES = 2001
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Polynomial:
    """s stages of y_j = alpha_j B y_{j-1} - beta_j y_{j-2}, B = 1 - theta L, and of the transposed
    recurrence.

    Both run scaled, y_j = scale_j z_j with z_j = z_{j-2} + factor_j B z_{j-1}: one pass over memory a stage.
    """

    s: int
    b: float
    alpha: FloatArray
    beta: FloatArray
    factor: FloatArray
    scale: FloatArray
    adjoint_factor: FloatArray
    adjoint_scale: FloatArray


@lru_cache(maxsize=256)
def polynomial(s: int) -> Polynomial:
    """The polynomial of s >= 2 stages."""
    j = np.arange(1, s + 1)
    alpha, beta = (2 * j - 1) / j, (j - 1) / j

    def scaled(alpha: FloatArray, beta: FloatArray) -> tuple[FloatArray, FloatArray]:
        scale = np.ones(s + 1)
        for k in range(2, s + 1):
            scale[k] = -beta[k - 1] * scale[k - 2]
        return alpha * scale[:-1] / scale[1:], scale

    b = (s * s + s - 2) / (2 * s * (s + 1))
    # Transposed, the recurrence runs from the last stage to the first.
    transposed = scaled(alpha[::-1], np.concatenate([[0.0], beta[:0:-1]]))
    return Polynomial(s, b, alpha, beta, *scaled(alpha, beta), *transposed)


def reach(s: int) -> float:
    """The largest dt |L| that s stages are used for: an even polynomial damps nothing at the end of its
    interval.
    """
    return (s * s + s - 2) / 2 * (0.95 if s % 2 == 0 else 1.0)


def stages_for(z: float) -> int:
    """The fewest stages, at least 2, for z = dt |L|."""
    s = max(2, math.ceil((math.sqrt(9.0 + 8.0 * z) - 1.0) / 2.0 - 1e-9))
    return s + 1 if s % 2 == 0 and z > reach(s) else s
