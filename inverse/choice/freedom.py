r"""The trace of the influence matrix, the number of data that a regularized fit follows.

    tr(J (J^T J + R'')^(-1) J^T),    J = r'(m),    the Gauss-Newton linearisation at m

(exact for a linear map and a quadratic R), by a dense Jacobian, or by random signs z (Hutchinson 1990), for
which z^T J x with (J^T J + R'') x = J^T z has that mean and a variance of at most 2 tr.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from inverse.optimizers.gauss_newton import dense
from inverse.problem import LeastSquares
from solvers.errors import GliodeError
from solvers.spaces import Space

DENSE = 2000  # parameters at most for a dense Jacobian


def degrees_of_freedom(
    problem: LeastSquares,
    m: Tensor,
    probes: int = 0,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-6,
    most: int = 1000,
) -> float:
    """That trace at m, for a problem whose regularizer holds alpha.

    probes: 0: exact, by as many tangent solves as parameters; else the number of random vectors z, each of
    which costs a solve by conjugate gradients (preconditioned by the space's Riesz map, to `tolerance`
    relative, in at most `most` steps): standard deviation sqrt(2 tr / probes) or less. generator: draws the
    z (None: seed 0, so that scores at different alphas share their z); where the data are distributed, one
    seeded differently on each rank. Raises GliodeError where the way chosen is impossible.
    """
    space = problem.space
    if probes == 0:
        if space.comm is not None or problem.comm is not None or space.size > DENSE:
            raise GliodeError(
                "degrees_of_freedom: a dense Jacobian is for few replicated parameters; give probes=20"
            )
        jacobian = problem.jacobian(m).numpy()
        square = jacobian.T @ jacobian
        hessian = square + dense(lambda d: problem.regularizer_action(m, d), m)
        try:
            return float(np.trace(scipy.linalg.solve(hessian, square, assume_a="pos")))
        except np.linalg.LinAlgError as error:
            raise GliodeError(
                "degrees_of_freedom: J^T J + R'' is singular; the regularizer must see what the data do not"
            ) from error
    if probes < 0:
        raise GliodeError(f"degrees_of_freedom: probes must be 0 (exact) or positive, got {probes}")
    if generator is None:
        if problem.comm is not None:
            raise GliodeError(
                "degrees_of_freedom: the data are distributed; pass a generator seeded by the rank"
            )
        generator = torch.Generator().manual_seed(0)
    at, total = problem.evaluate(m), 0.0
    for _ in range(probes):
        signs = torch.randint(0, 2, at.residual.shape, generator=generator)
        w = at.vjp((2 * signs - 1).to(at.residual))
        total += space.pair(w, _solve(space, at.gauss_newton_action, w, tolerance, most))
    return total / probes


def _solve(
    space: Space, action: Callable[[Tensor], Tensor], rhs: Tensor, tolerance: float, most: int
) -> Tensor:
    """x with H x = rhs by conjugate gradients, preconditioned by the Riesz map."""
    x, residual = torch.zeros_like(rhs), rhs
    p = z = space.riesz(residual)
    square = space.pair(residual, z)
    limit = tolerance**2 * square
    for _ in range(most):
        if square <= limit:
            return x
        image = action(p)
        curvature = space.pair(image, p)
        if not curvature > 0:
            raise GliodeError("degrees_of_freedom: J^T J + R'' is not positive definite at m")
        step = square / curvature
        x, residual = x + step * p, residual - step * image
        z = space.riesz(residual)
        before, square = square, space.pair(residual, z)
        p = z + (square / before) * p
    raise GliodeError(
        f"degrees_of_freedom: conjugate gradients left {math.sqrt(square / limit) * tolerance:.1e} of the "
        f"residual after {most} steps; raise `most`, or take a space that preconditions better"
    )
