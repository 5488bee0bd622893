r"""Variational problems in space: minimise E(u) = int W(grad u) - f u dx, u given on a part of the boundary.

    Descent   (u1 - u0) / dt + E'(u1) = 0, the gradient flow of a UFL energy in L2, by implicit steps;
              dt = inf is Newton's method for E'(u) = 0
    Energy    E of the free degrees of freedom on the tape, for the optimizers of `inverse`: with bounds u >=
              psi (an obstacle) by `inverse.optimizers.tao`

Minimal surfaces: W = sqrt(1 + |grad u|^2); membranes: W = 1/2 |grad u|^2. Serial and MPI. The same energies
on torch alone: `solvers.node.science.variational.Elements`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import dolfinx
import numpy as np
import torch
import ufl
from dolfinx.fem import Constant, Function
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.gradients import Gradient
from solvers.fem.implicit import ImplicitStep
from solvers.fem.mesh import Domain, from_mesh
from solvers.fem.spaces import communicator
from solvers.spaces import Diagonal, reduce

Points = np.ndarray[Any, np.dtype[np.float64]]
_VERTICES = {"quadrature_rule": "vertex", "quadrature_degree": 1}


def sector(
    inner: float, outer: float, cells: int, angle: float = math.pi / 2, comm: MPI.Comm = MPI.COMM_WORLD
) -> Domain:
    """Triangles on inner <= r <= outer, 0 <= theta <= angle: `cells` along the radius, about square ones.

    By symmetry a part of the annulus, no flux through theta = 0 and theta = angle (natural conditions).
    Raises GliodeError unless 0 < inner < outer and 0 < angle < 2 pi.
    """
    if not (0 < inner < outer and 0 < angle < 2 * math.pi and cells >= 1):
        raise GliodeError("sector: needs 0 < inner < outer, 0 < angle < 2 pi and at least one cell")
    around = math.ceil(cells * angle * (inner + outer) / 2 / (outer - inner))
    mesh = dolfinx.mesh.create_rectangle(
        comm,
        [[inner, 0.0], [outer, angle]],
        [cells, around],
        ghost_mode=dolfinx.mesh.GhostMode.none,
        diagonal=dolfinx.mesh.DiagonalType.crossed,
    )
    r, theta = mesh.geometry.x[:, 0].copy(), mesh.geometry.x[:, 1].copy()
    mesh.geometry.x[:, 0], mesh.geometry.x[:, 1] = r * np.cos(theta), r * np.sin(theta)
    return from_mesh(mesh)


class Descent:
    """u0 -> u1 with (u1 - u0, v) / dt + E'(u1; v) = 0 for all v, (., .) with the lumped mass.

        flow = Descent(domain, lambda u: ufl.sqrt(1 + ufl.inner(ufl.grad(u), ufl.grad(u))) * ufl.dx, held)
        u = flow(u, 0.1)                # a step of the flow, on the tape; `Evolution` repeats it
        u = flow(u, math.inf)           # the stationary point near u, by Newton's method

    energy: the UFL functional E of a Function. held: (owned dofs,) bool, where the values of `values` are
    kept. parameters: Functions and Constants in the energy, whose values follow dt in a call.
    """

    def __init__(
        self,
        domain: Domain,
        energy: Callable[[Function], ufl.Form],
        held: Tensor,
        values: Tensor,
        parameters: Sequence[Function | Constant] = (),
    ) -> None:
        u1, u0 = Function(domain.V), Function(domain.V)
        v = ufl.TestFunction(domain.V)
        rate = Constant(domain.mesh, 0.0)
        F = rate * (u1 - u0) * v * ufl.dx(metadata=_VERTICES) + ufl.derivative(energy(u1), u1, v)
        everywhere = domain.ghosts.extend(held.double()).numpy() > 0.5
        dofs = np.flatnonzero(everywhere).astype(np.int32)
        bc = dolfinx.fem.dirichletbc(domain.function(values), dofs)
        self._step = ImplicitStep(F, u1, u0, [rate, *parameters], bcs=[bc])

    def __call__(self, u: Tensor, dt: Tensor | float, *values: Tensor | float) -> Tensor:
        """u1, (owned dofs,). Raises GliodeError where dt <= 0, or where Newton's method fails: then take
        shorter steps, or begin nearer (at the stationary point of a quadratic energy).
        """
        if not float(dt) > 0:
            raise GliodeError(f"descent: dt must be positive (inf: the stationary point), got {float(dt)}")
        return self._step(u, 1.0 / dt, *values)


class Energy:
    """E(u) = sum over cells of |cell| W(grad u) - sum_i M_i f_i u_i, of the free dofs m, on the tape.

    density: W, (quadrature points, d) -> (points,). held: (owned dofs,) bool; values: (owned dofs,), kept
    where held. load: f at the dofs. space: L2 of the free dofs with the lumped mass, whose metric is
    diagonal, as bounds ask for.
    """

    def __init__(
        self,
        domain: Domain,
        density: Callable[[Tensor], Tensor],
        held: Tensor,
        values: Tensor,
        load: Tensor | None = None,
    ) -> None:
        self.free = torch.nonzero(~held)[:, 0]
        self.comm = communicator(domain)
        self.space = Diagonal(domain.mass[self.free], self.comm)
        self._gradient, self._density = Gradient(domain), density
        self._values = torch.where(held, values, torch.zeros_like(values))
        self._load = None if load is None else domain.mass * load

    def state(self, m: Tensor) -> Tensor:
        """u, (owned dofs,), of the free values m."""
        return self._values.index_add(0, self.free, m)

    def __call__(self, m: Tensor) -> Tensor:
        """E, 0-d, the same on every rank."""
        u = self.state(m)
        local = self._gradient.weights @ self._density(self._gradient(u))
        return reduce(local if self._load is None else local - self._load @ u, self.comm)
