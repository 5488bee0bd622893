r"""Levenberg-Marquardt for a few parameters, in the metric G of their Space.

Each step solves, exactly and within the bounds,

    min_d  <g, d> + 1/2 <(J^T J + R'' + lambda G) d, d>,    lower <= m + d <= upper,

with the gradient g always exact (one adjoint solve) and the dense Jacobian J from one dual-number pass a
parameter. A Gaussian prior is a regularizer: Tikhonov(Euclidean(n, scale=sd), reference=mean), and enters as
its residuals would. lambda follows the gain ratio (actual over predicted fall of J: Nielsen 1999).

A Jacobian of n parameters costs 2 n solves. With `jacobian_updates` the last one is kept and corrected by the
residuals that the iteration sees anyway (Broyden 1965, in the metric):

    B+ = B + (r+ - r - B s) (G s)^T / <G s, s>.

As g stays exact, an old Jacobian makes a step worse but moves no stationary point.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.optimize import lsq_linear
from torch import Tensor

from inverse.optimizers.iteration import (
    Callback,
    Iterate,
    Recorder,
    Result,
    Start,
    Stopping,
)
from inverse.optimizers.line_search import rounding
from inverse.problem import LeastSquares
from inverse.stopping import GradientTolerance, MaxIterations, StepTolerance, Value
from solvers.errors import GliodeError

TAKEN = 1e-4  # a step is taken above this gain ratio
POOR = 0.25  # the Jacobian is renewed below this one
REJECTIONS = 15
STOPPING: Stopping = (GradientTolerance(1e-6), StepTolerance(1e-8), MaxIterations(50))

Array = NDArray[np.float64]


def minimise(
    problem: LeastSquares,
    m0: Start,
    damping: float = 1e-3,
    jacobian_updates: bool = False,
    refresh_every: int = 5,
    jacobian: Tensor | None = None,
    stopping: Stopping = STOPPING,
    callback: Callback | None = None,
) -> Result:
    """Minimise J from m0 (or on from the state_dict of an earlier run).

    damping: first lambda in units of the largest eigenvalue of J^T J + R'' in the metric. jacobian_updates:
    correct the last Jacobian in place of a new one, for at most `refresh_every` steps and while the gain
    ratio is not poor. A Laplace posterior takes problem.jacobian(result.m), not a corrected one.
    """
    if problem.space.comm is not None:
        raise GliodeError(
            "gauss_newton: a dense Jacobian needs replicated parameters; for fields take newton_cg"
        )
    if not damping > 0:
        raise GliodeError(f"gauss_newton: damping must be positive, got {damping}")
    if refresh_every < 1:
        raise GliodeError(f"gauss_newton: refresh_every must be at least 1, got {refresh_every}")
    metric = dense(problem.space.gram, problem.space.zeros())
    run = Recorder("gauss_newton", problem, m0, stopping, callback)
    with run:
        at = problem.evaluate(run.start)
        here, residual = Iterate.of(at), at.residual
        del at
        damp = float(run.memory["damp"]) if "damp" in run.memory else None
        factor = float(run.memory.get("factor", 2.0))
        if run.memory:  # resumed: the saved Jacobian, or none where a new one was due
            jacobian = run.memory.get("jacobian")
        age = int(run.memory.get("age", 0 if jacobian is None else 1))
        while not run.record(here, _memory(damp, factor, jacobian, age)):
            if jacobian is None:
                jacobian, age = problem.jacobian(here.m), 0
            hessian = _hessian(problem, here, jacobian)
            if damp is None:
                damp = damping * float(scipy.linalg.eigh(hessian, metric, eigvals_only=True)[-1])
            for _ in range(REJECTIONS):
                d, predicted = _step(problem, here, hessian, hessian + damp * metric)
                trial = problem.evaluate(problem.project(here.m + d))
                gain = _gain(here, trial.value, predicted)
                if gain > TAKEN:
                    break
                if age > 0:
                    jacobian, age = problem.jacobian(here.m), 0
                    hessian = _hessian(problem, here, jacobian)
                else:
                    damp, factor = damp * factor, 2 * factor
            else:
                run.stop("NoDescent", {"gradient_norm": here.gradient_norm, "damping": damp})
                break
            damp, factor = damp * max(0.1, 1 - (2 * gain - 1) ** 3), 2.0
            if jacobian_updates and gain >= POOR and age < refresh_every:
                jacobian = _broyden(problem, jacobian, trial.residual - residual, trial.m - here.m)
                age += 1
            else:
                jacobian = None
            here, residual = Iterate.of(trial), trial.residual
            del trial
    return run.result()


def dense(operator: Callable[[Tensor], Tensor], like: Tensor) -> Array:
    """The matrix of a linear operator on points shaped as `like`, column by column."""
    units = torch.eye(like.numel(), dtype=like.dtype).view(-1, *like.shape)
    return torch.stack([operator(unit).reshape(-1) for unit in units], 1).numpy()


def _hessian(problem: LeastSquares, here: Iterate, jacobian: Tensor) -> Array:
    hessian: Array = problem.data_product(jacobian, jacobian).numpy()
    if problem.regularizer is None:
        return hessian
    return hessian + dense(lambda d: problem.regularizer_action(here.m, d), here.m)


def _step(problem: LeastSquares, here: Iterate, hessian: Array, damped: Array) -> tuple[Tensor, float]:
    """The minimiser d of the damped model within the bounds, and the fall the undamped model promises."""
    g = here.gradient.reshape(-1).numpy()
    root = scipy.linalg.cholesky(damped)
    d = -scipy.linalg.cho_solve((root, False), g)
    if problem.bounds is not None:
        lower, upper = ((side - here.m).reshape(-1).numpy() for side in problem.bounds)
        if np.any(d < lower) or np.any(d > upper):
            rhs = -scipy.linalg.solve_triangular(root, g, trans=1)
            d = lsq_linear(root, rhs, bounds=(lower, upper), method="bvls", tol=1e-12).x
    return torch.from_numpy(d).view(here.m.shape), -float(g @ d + 0.5 * d @ hessian @ d)


def _gain(here: Iterate, value: float, predicted: float) -> float:
    """Actual over predicted fall; where rounding drowns the prediction, 1 unless the value clearly rises."""
    noise = rounding(here)
    if predicted <= noise:
        return 1.0 if value <= here.value + noise else 0.0
    return (here.value - value) / predicted if math.isfinite(value) else 0.0


def _broyden(problem: LeastSquares, jacobian: Tensor, change: Tensor, s: Tensor) -> Tensor:
    """The Jacobian nearest to the last one, in the metric, that maps s to the change of the residual."""
    gs = problem.space.gram(s).reshape(-1)
    return jacobian + torch.outer(change - jacobian @ s.reshape(-1), gs / (gs @ s.reshape(-1)))


def _memory(damp: float | None, factor: float, jacobian: Tensor | None, age: int) -> dict[str, Value]:
    memory: dict[str, Value] = {} if damp is None else {"damp": damp, "factor": factor}
    return memory if jacobian is None else memory | {"jacobian": jacobian, "age": float(age)}
