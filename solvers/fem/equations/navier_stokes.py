r"""Incompressible Navier-Stokes in Taylor-Hood elements, on the tape.

    u_t + (u . grad) u - nu Laplace u + grad p = 0,   div u = 0

    steady          Newton on the stationary equations
    midpoint_step   the implicit midpoint rule: second order, any step; Newton in each
    SemiImplicit    BDF2 with extrapolated convection: second order, one matrix and so one factorisation for
                    all steps of a length, but steps bound by the flow's speed

The force that the fluid exerts on a part of the boundary is the residual tested with a velocity that is one
there and zero on all other dofs (the volume formula): twice the order of the surface integral (Giles, Larson,
Levenstam & Süli 1997).

On the rest of the boundary, where no velocity is fixed, nu du/dn = p n (the "do nothing" outflow).
Density is 1; units of length and time are the mesh's and the viscosity's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dolfinx
import numpy as np
import torch
import ufl
from dolfinx.fem import Constant, Function, functionspace
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.equations.stationary import Stationary, lifted
from solvers.fem.equations.taylor_hood import Array, Marker, TaylorHood
from solvers.fem.implicit import ImplicitStep

dx = ufl.dx(metadata={"quadrature_degree": 6})

NEWTON = {"snes_stol": 1e-9}
"""Newton is quadratic: after a relative step of 1e-9 nothing is left to gain."""


def convection(a: Any, u: Any, v: Any) -> Any:
    """(a . grad) u . v, an integrand."""
    return ufl.inner(ufl.grad(u) * a, v)


def stokes(u: Any, p: Any, v: Any, q: Any, nu: Any) -> Any:
    """nu grad u : grad v - p div v - q div u, an integrand."""
    return nu * ufl.inner(ufl.grad(u), ufl.grad(v)) - p * ufl.div(v) - q * ufl.div(u)


class _Forms:
    """The symbols of a step: unknown w, known u0, tests, and the parameters dt, nu, boundary values."""

    def __init__(self, space: TaylorHood) -> None:
        self.w, self.u0, self.boundary = (Function(space.W) for _ in range(3))
        self.w.name, self.u0.name, self.boundary.name = "u1", "u0", "boundary"
        self.dt, self.nu = (Constant(space.mesh, 0.0) for _ in range(2))
        self.dt.name, self.nu.name = "dt", "nu"
        self.now, self.p = ufl.split(self.w)
        self.before, _ = ufl.split(self.u0)
        self.v, self.q = ufl.TestFunctions(space.W)


def steady(space: TaylorHood) -> Stationary:
    """solve(nu, boundary, start=None): the stationary flow for boundary values (see `TaylorHood.boundary`).

    Newton from rest finds it up to a Reynolds number of some hundreds at most; the error then says so, and
    that `start` continues from a lower one.
    """
    f = _Forms(space)
    F = (convection(f.now, f.now, f.v) + stokes(f.now, f.p, f.v, f.q, f.nu)) * dx
    return Stationary(F, f.w, [f.nu, f.boundary], boundary=f.boundary, bcs=space.bcs, options=NEWTON)


def midpoint_step(
    space: TaylorHood,
) -> Callable[[Tensor, Tensor | float, Tensor | float, Tensor], Tensor]:
    """step(u, dt, nu, boundary): the implicit midpoint rule; boundary: the values at the step's end.

    The pressure of the result is that of the step's middle.
    """
    f = _Forms(space)
    middle = (f.now + f.before) / 2
    forces = convection(middle, middle, f.v) + f.nu * ufl.inner(ufl.grad(middle), ufl.grad(f.v))
    constraint = -f.p * ufl.div(f.v) - f.q * ufl.div(f.now)
    F = (ufl.inner(f.now - f.before, f.v) + f.dt * (forces + constraint)) * dx
    step = ImplicitStep(
        lifted(F, f.w, f.boundary), f.w, f.u0, [f.dt, f.nu, f.boundary], bcs=space.bcs, options=NEWTON
    )
    return lambda u, dt, nu, boundary: step(u, dt, nu, boundary) + boundary


class SemiImplicit:
    """BDF2 with convection extrapolated from two states: step(pair, dt, nu, boundary), pair: (2, owned dofs).

        (3 u1 - 4 u0 + u-1) / (2 dt) + 2 N(u0) - N(u-1) - nu Laplace u1 + grad p1 = 0,  N(u) = (u . grad) u

    pair[0] is the state now, pair[1] the one a step ago; `start` makes the first pair by a step of Euler's
    (one such step does not lower the order). All steps of a pair's life have the same dt. The matrix depends
    on dt and nu alone. Raises GliodeError where the flow crosses more than `courant` cells in dt (its mean of
    a cell), with the longest step that does not: 0.25 was unstable at Re 100, 0.16 was not.
    """

    def __init__(self, space: TaylorHood, courant: float = 0.2) -> None:
        f, older = _Forms(space), Function(space.W)
        older.name = "older"
        past, _ = ufl.split(older)
        # Where older is the state of a step ago: second = 1, BDF2; 0: Euler's implicit method.
        second = Constant(space.mesh, 0.0)
        change = f.now - f.before + second * (f.now - 2 * f.before + past) / 2
        before, past = (convection(u, u, f.v) for u in (f.before, past))
        pushed = before + second * (before - past)
        F = (ufl.inner(change, f.v) + f.dt * (pushed + stokes(f.now, f.p, f.v, f.q, f.nu))) * dx
        parameters = [f.dt, f.nu, f.boundary, older, second]
        self._step = ImplicitStep(lifted(F, f.w, f.boundary), f.w, f.u0, parameters, bcs=space.bcs)
        self._space, self._courant = space, courant
        cell = ufl.TestFunction(functionspace(space.mesh, ("DG", 0)))
        crossings = ufl.inv(ufl.Jacobian(space.mesh)) * f.before  # of the reference cell, whose edges are 1
        self._crossings = dolfinx.fem.form(ufl.sqrt(ufl.inner(crossings, crossings)) * cell * dx)
        self._volumes = dolfinx.fem.assemble_vector(dolfinx.fem.form(cell * dx)).array

    def start(self, u: Tensor, dt: Tensor | float, nu: Tensor | float, boundary: Tensor) -> Tensor:
        """The pair after a first step of dt from u."""
        return self._moved(u, u, 0.0, dt, nu, boundary)

    def __call__(self, pair: Tensor, dt: Tensor | float, nu: Tensor | float, boundary: Tensor) -> Tensor:
        """The pair one step later."""
        return self._moved(pair[0], pair[1], 1.0, dt, nu, boundary)

    def _moved(
        self,
        u: Tensor,
        older: Tensor,
        second: float,
        dt: Tensor | float,
        nu: Tensor | float,
        boundary: Tensor,
    ) -> Tensor:
        later = self._step(u, dt, nu, boundary, older, second) + boundary
        length = float(torch.as_tensor(dt).detach())
        crossed = length * self._rate()  # by u, which the step has just stored
        if crossed > self._courant:
            raise GliodeError(
                f"semi-implicit step: dt {length:.3g} lets the flow cross {crossed:.2g} cells, more than "
                f"{self._courant:g}; take dt <= {length * self._courant / crossed:.3g}, or midpoint_step"
            )
        return torch.stack([later, u])

    def _rate(self) -> float:
        """The most cells that the flow crosses per unit of time (mean of each cell)."""
        local = dolfinx.fem.assemble_vector(self._crossings).array / self._volumes
        return float(self._space.comm.allreduce(float(np.max(local, initial=0.0)), MPI.MAX))


class Force:
    """The force of the fluid on a part of the boundary, (dim,), by the volume formula; not on the tape.

        F_i = -int [(a + (u . grad) u) . v_i + nu grad u : grad v_i - p div v_i]

    v_i: component i is one at the part's dofs, all else zero; a: the acceleration u_t (zero where not given),
    as a state, for instance (3 u1 - 4 u0 + u-1) / (2 dt).
    """

    def __init__(self, space: TaylorHood, part: Marker) -> None:
        f, self._space = _Forms(space), space
        a, _ = ufl.split(f.u0)
        self._functions, self._nu = (f.w, f.u0), f.nu
        density = ufl.inner(a, f.v) + convection(f.now, f.now, f.v) + stokes(f.now, f.p, f.v, f.q, f.nu)
        units = [space.function(space.boundary(_constant(e), part)) for e in np.eye(space.dim)]
        test = ufl.TestFunction(space.W)
        self._forms = [dolfinx.fem.form(ufl.replace(-density * dx, {test: unit})) for unit in units]

    def __call__(self, u: Tensor, nu: float, acceleration: Tensor | None = None) -> Array:
        """(dim,), on every rank."""
        given = (u, self._space.zeros() if acceleration is None else acceleration)
        for function, value in zip(self._functions, given, strict=True):
            function.x.array[: self._space.n_owned] = value.detach().numpy()
            function.x.scatter_forward()
        self._nu.value = nu
        local = np.array([dolfinx.fem.assemble_scalar(form) for form in self._forms])
        return np.asarray(self._space.comm.allreduce(local, MPI.SUM))


def _constant(value: Array) -> Marker:
    return lambda x: np.tile(value[:, None], x.shape[1])
