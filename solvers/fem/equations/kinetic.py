r"""Linear transport with discrete velocities on DOLFINx: upwind discontinuous Galerkin, implicit in time.

    f_t + (v_k/eps) f_x = (sigma(x)/eps^2) (<f> - f),    k = 1, ..., one component of f for each velocity

With linear or higher elements the upwind scheme keeps the diffusive limit (Adams 2001; constant elements do
not), and an implicit step any dt: asymptotic-preserving in eps, h and dt alike. One sparse LU, by MUMPS.
"""

from __future__ import annotations

from typing import Any

import dolfinx
import torch
import ufl
from dolfinx.fem import Function, functionspace
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.equations.conservation import arc
from solvers.fem.implicit import Sdirk2Step
from solvers.node.science.kinetic import Velocities, check_velocities


class OrdinatesStep:
    """step(u, dt, sigma): the L-stable two-stage SDIRK of order 2, u the owned values of `space`.

    mesh: of `solvers.fem.equations.conservation.ring` (periodic) or `line`, at whose ends nothing comes in;
    sigma: the owned cells' values (cells,), or a 0-d tensor or number for all. `density(u)`: <f>, owned
    values of `scalar`, (dofs,). Raises GliodeError for elements of degree 0, whose limit is not diffusion.
    """

    def __init__(self, mesh: dolfinx.mesh.Mesh, velocities: Velocities, eps: float, degree: int = 1) -> None:
        check_velocities(velocities)
        if degree < 1:
            raise GliodeError("degree: 0; upwind transport keeps its diffusive limit from degree 1 on")
        if mesh.topology.dim != 1 or not eps > 0:
            raise GliodeError(
                f"ordinates: eps {eps:g} on cells of dimension {mesh.topology.dim}; give > 0, 1"
            )
        v, w = ([float(a) for a in part] for part in velocities)
        self.space = functionspace(mesh, ("DG", degree, (len(v),)))
        self.scalar = functionspace(mesh, ("DG", degree))
        self.weights = torch.tensor(w, dtype=torch.float64)
        sigma = Function(functionspace(mesh, ("DG", 0)), name="sigma")
        self.cells = int(sigma.function_space.dofmap.index_map.size_local)
        closed = mesh.geometry.dim > 1
        along = arc(mesh) if closed else ufl.as_vector([1.0])
        normal = ufl.FacetNormal(mesh)
        ahead = ufl.dot(normal("+"), along("+") if closed else along)
        metadata = {"quadrature_degree": 2 * degree}
        dx, dS, ds = (kind(metadata=metadata) for kind in (ufl.dx, ufl.dS, ufl.ds))

        def spatial(u: Any, test: Any) -> ufl.Form:
            mean = sum((w[k] * u[k] for k in range(1, len(v))), w[0] * u[0])
            form = ufl.Form([])
            for k, speed in enumerate(v):
                speed = speed / eps
                out = (speed * ahead * (u[k]("+") + u[k]("-")) + abs(speed) * (u[k]("+") - u[k]("-"))) / 2
                slope = ufl.dot(ufl.grad(test[k]), along)
                form += (speed * u[k] * slope + sigma / eps**2 * (mean - u[k]) * test[k]) * dx
                form -= out * (test[k]("+") - test[k]("-")) * dS
                if not closed:
                    form -= ufl.max_value(speed * ufl.dot(normal, along), 0.0) * u[k] * test[k] * ds
            return form

        self._step = Sdirk2Step(spatial, self.space, [sigma])

    def __call__(self, u: Tensor, dt: Tensor | float, sigma: Tensor | float = 1.0) -> Tensor:
        """u after dt, (owned dofs,)."""
        given = torch.as_tensor(sigma, dtype=torch.float64)
        return self._step(u, dt, given.expand(self.cells) if given.ndim == 0 else given)

    def density(self, u: Tensor) -> Tensor:
        """<f>, (owned dofs of `scalar`,)."""
        return u.view(-1, len(self.weights)) @ self.weights

    def isotropic(self, rho: Tensor) -> Tensor:
        """f = rho for all velocities."""
        return rho[:, None].expand(-1, len(self.weights)).reshape(-1)
