r"""PETSc TAO's bound-constrained optimizers in the metric of a Space, serial and MPI.

TAO's methods are Euclidean: they take a gradient for a direction. In the variables z = m / s of a diagonal
metric (a, b) = sum a b / s^2 (`Euclidean`, `Diagonal`, products of such) the metric is Euclidean, so

    z-gradient = s J'(m),    z-Hessian v = s J''(m) (s v),    lower / s <= z <= upper / s,

and iteration counts do not depend on the mesh. In other metrics bounds are no boxes: take newton_cg or
quasi_newton there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inverse.optimizers.iteration import (
    DEFAULT_STOPPING,
    Callback,
    Iterate,
    Recorder,
    Result,
    Start,
    Stopping,
)
from inverse.problem import InverseProblem, ResidualEvaluation
from solvers.errors import GliodeError
from solvers.spaces import Product

FIRST_ORDER = ("blmvm", "bqnls")
NEWTON = ("bnls", "bntr", "bntl")

_prefixes = itertools.count()


def minimise(
    problem: InverseProblem,
    m0: Start,
    method: str = "bqnls",
    hessian: str = "gauss_newton",
    stopping: Stopping = DEFAULT_STOPPING,
    callback: Callback | None = None,
) -> Result:
    """Minimise J within the problem's bounds from m0 (or from the point of an earlier run's state_dict).

    method: "blmvm" or "bqnls" (limited-memory quasi-Newton, projected or with an active set), or the
    Newton-CG methods "bnls" (line search), "bntr" (trust region) and "bntl" (both), which take `hessian`:
    "gauss_newton" (LeastSquares) or "full". Under MPI a distributed point becomes a distributed vector.
    stopped_by is "TAO", with TAO's reason among the numbers, where its line search gave up. Raises
    GliodeError without petsc4py, and for metrics that are not diagonal.
    """
    if method not in FIRST_ORDER + NEWTON:
        raise GliodeError(f"tao: method {method!r} is not one of {', '.join(FIRST_ORDER + NEWTON)}")
    if hessian not in ("gauss_newton", "full"):
        raise GliodeError(f"tao: hessian {hessian!r} is not 'gauss_newton' or 'full'")
    scale = problem.space.scaling()
    if scale is None:
        raise GliodeError(
            "tao: needs a diagonal metric (Euclidean, Diagonal: fields in L2 with the lumped mass); "
            "in others take newton_cg or quasi_newton"
        )
    PETSc = _petsc()
    run = Recorder("tao", problem, m0, stopping, callback)
    with run:
        here = run.first()
        if not run.record(here):
            bridge = _Bridge(problem, run, here, scale, hessian)
            bridge.solve(PETSc, method)
    return run.result()


def _petsc() -> Any:
    try:
        from petsc4py import PETSc
    except ImportError as error:
        raise GliodeError(
            "tao: petsc4py is not installed in this Python; run in scripts/env, or take quasi_newton"
        ) from error
    return PETSc


class _Bridge:
    """TAO's callbacks: points z <-> m, the last evaluation kept, the record asked after every iteration."""

    def __init__(
        self, problem: InverseProblem, run: Recorder, here: Iterate, scale: Tensor, hessian: str
    ) -> None:
        self.problem, self.run, self.last, self.hessian = problem, run, here, hessian
        self.scale = scale.reshape(here.m.shape)
        self.at = self._z(here.m)
        self.action: Callable[[Tensor], Tensor] | None = None
        self.recorded = here
        self.linearised: Iterate | None = None  # where `action` is the Hessian's

    def _z(self, m: Tensor) -> Any:
        return (m / self.scale).reshape(-1).numpy()

    def _m(self, z: Any) -> Tensor:
        return (torch.from_numpy(z.copy()).view(self.scale.shape) * self.scale).contiguous()

    def solve(self, PETSc: Any, method: str) -> None:
        space, comm = self.problem.space, PETSc.COMM_SELF
        if space.comm is not None:
            comm = space.comm
            parts = space.spaces.values() if isinstance(space, Product) else [space]
            if any(part.comm is None for part in parts):
                raise GliodeError(
                    "tao: a product of distributed and replicated parts has no PETSc vector; "
                    "take landweber, or one kind alone"
                )
        x = PETSc.Vec().createMPI((len(self.at), None), comm=comm)
        x.array_w[:] = self.at
        tao = PETSc.TAO().create(comm)
        prefix = f"gliode_tao_{next(_prefixes)}_"
        tao.setOptionsPrefix(prefix)
        options = PETSc.Options()
        # Sub-matrices of the free entries as masks of the action: a Hessian is never a matrix here.
        chosen = {"tao_type": method, "tao_subset_type": "matrixfree"}
        for key, value in chosen.items():
            options[prefix + key] = value
        tao.setSolution(x)
        gradient = x.duplicate()
        tao.setObjectiveGradient(self._objective, gradient)
        if method in NEWTON:
            sizes = ((len(self.at), None), (len(self.at), None))
            matrix = PETSc.Mat().createPython(sizes, self, comm=comm)
            matrix.setUp()
            tao.setHessian(self._refresh, matrix)
        if self.problem.bounds is not None:
            lower, upper = x.duplicate(), x.duplicate()
            lower.array_w[:], upper.array_w[:] = (self._z(side) for side in self.problem.bounds)
            tao.setVariableBounds((lower, upper))
        tao.setTolerances(gatol=0.0, grtol=0.0, gttol=0.0)
        tao.setMaximumIterations(10**9)
        tao.setMaximumFunctionEvaluations(10**9)
        tao.setMonitor(self._accepted)  # petsc4py 3.25 never calls a convergence test
        tao.setFromOptions()
        for key in chosen:
            del options[prefix + key]
        try:
            tao.solve()
        except PETSc.Error as error:  # the error of a callback, wrapped
            raise error.__cause__ or error from None
        self._accept(x)
        if not self.run.stopped:
            reason = float(tao.getConvergedReason())
            self.run.stop("TAO", {"reason": reason, "gradient_norm": self.last.gradient_norm})

    def _evaluate(self, x: Any) -> Iterate:
        z = x.array_r
        same = bool(np.array_equal(z, self.at))
        comm: Any = self.problem.space.comm
        if not (same if comm is None else comm.allreduce(int(same)) == comm.size):
            self.at = z.copy()
            self.last = Iterate.of(self.problem.evaluate(self.problem.project(self._m(z))))
        return self.last

    def _objective(self, tao: Any, x: Any, gradient: Any) -> float:
        here = self._evaluate(x)
        gradient.array_w[:] = (here.gradient * self.scale).reshape(-1).numpy()
        return here.value

    def _accept(self, x: Any) -> None:
        """Note a new iterate."""
        here = self._evaluate(x)
        if here is not self.recorded and not self.run.stopped:
            self.recorded = here
            self.run.record(here)

    def _accepted(self, tao: Any) -> None:
        self._accept(tao.getSolution())
        if self.run.stopped:
            tao.setConvergedReason(type(tao).ConvergedReason.CONVERGED_USER)

    def _refresh(self, tao: Any, x: Any, matrix: Any, preconditioner: Any) -> None:
        """The Hessian's point is the iterate's."""
        here = self._evaluate(x)
        if here is not self.linearised:
            self.linearised = here
            at = self.problem.evaluate(here.m)
            if self.hessian == "full":
                self.action = at.hessian_action
            elif isinstance(at, ResidualEvaluation):
                self.action = at.gauss_newton_action
            else:
                raise GliodeError("tao: hessian='gauss_newton' needs LeastSquares; else take 'full'")
        matrix.assemble()

    def mult(self, matrix: Any, x: Any, y: Any) -> None:
        """y = s J'' (s x), as PETSc's Python matrices are asked for it."""
        assert self.action is not None
        y.array_w[:] = (self.action(self._m(x.array_r)) * self.scale).reshape(-1).numpy()
