r"""Stationary problems as steps of one, F(u, m; v) = 0 for all v, and the residuals of the two common ones.

A `Stationary` map m -> u is an `ImplicitStep` whose u0 the residual does not read: u0 is only where Newton
starts. So the adjoint and tangent solves, second derivatives and MPI are those of the step.

    Poisson      -div(k grad u) = f
    elasticity   -div sigma(u) = f,  sigma = 2 mu e + lambda tr(e) I,  e = sym grad u,
                 mu = E / (2 (1 + nu)),  lambda = E nu / ((1 + nu) (1 - 2 nu))

What remains on the boundary (a flux k du/dn, a traction sigma n) is subtracted from the residual by the user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dolfinx
import numpy as np
import torch
import ufl
from dolfinx.fem import Constant, DirichletBC, Function, FunctionSpace
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.implicit import ImplicitStep, NotConverged

Array = np.ndarray[Any, np.dtype[Any]]
Marker = Callable[[Array], Any]
"""Points (3, n) -> which of them belong to a part of the boundary, (n,)."""


class Stationary:
    """The solution u of a stationary residual, m -> u, differentiable to any order.

        solve = Stationary(F, u, [k, f])  # Constants and Functions
        u = solve(k_value, f_values)

    u: the unknown Function, of any space. boundary: a Function of that space, itself among the parameters,
    that is added to the unknown: u = w + boundary. With zero Dirichlet conditions in `bcs` its values there
    are the boundary values of u, and so parameters like others. bcs, options: as for `ImplicitStep`.

    Raises GliodeError where a value does not fit, NotConverged (one of these) where Newton's method fails.
    """

    def __init__(
        self,
        residual: ufl.Form,
        u: Function,
        parameters: Sequence[Function | Constant],
        *,
        boundary: Function | None = None,
        bcs: Sequence[DirichletBC] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        places = [i for i, p in enumerate(parameters) if p is boundary]
        if boundary is not None and not places:
            raise GliodeError("stationary: list `boundary` among the parameters, so that each call sets it")
        self._boundary = places[0] if places else None
        guess = Function(u.function_space)
        guess.name = "start"
        self._step = ImplicitStep(
            residual if boundary is None else lifted(residual, u, boundary),
            u,
            guess,
            parameters,
            bcs=bcs,
            options=options,
        )
        dofmap = u.function_space.dofmap
        self._n_owned = int(dofmap.index_map.size_local * dofmap.index_map_bs)

    def __call__(self, *values: Tensor | float, start: Tensor | None = None) -> Tensor:
        """u, (owned dofs,). start: where Newton starts (zero if None), such as u at parameters nearby."""
        guess = torch.zeros(self._n_owned, dtype=torch.float64) if start is None else start.detach()
        try:
            w = self._step(guess, *values)
        except NotConverged as error:
            raise NotConverged(
                f"stationary: Newton did not converge from {'zero' if start is None else 'the start given'};"
                " continue from easier parameters: solve there first and pass that solution as `start`, in"
                " several steps if need be; or check the parameters for values that make no sense"
            ) from error
        return w if self._boundary is None else w + torch.as_tensor(values[self._boundary])


def lifted(residual: ufl.Form, u: Function, boundary: Function) -> ufl.Form:
    """The residual with u + boundary in place of u: zero Dirichlet conditions then fix u to `boundary`."""
    return ufl.replace(residual, {u: u + boundary})


def dofs_on(space: FunctionSpace, where: Marker) -> Array:
    """The rank's dofs (of W if the space is a part of W) on the facets of the boundary that are marked."""
    mesh, dim = space.mesh, space.mesh.topology.dim - 1
    mesh.topology.create_connectivity(dim, dim + 1)
    facets = dolfinx.mesh.locate_entities_boundary(mesh, dim, where)
    return np.asarray(dolfinx.fem.locate_dofs_topological(space, dim, facets))


def zero(space: FunctionSpace, where: Marker) -> DirichletBC:
    """u = 0 on a part of the boundary; space: a scalar one, or a component V.sub(i).

    Raises GliodeError where no facet is marked (on any rank: collective).
    """
    dofs = dofs_on(space, where)
    if not space.mesh.comm.allreduce(len(dofs), MPI.SUM):
        raise GliodeError("boundary: no facet of the boundary has all its vertices marked; check the marker")
    return dolfinx.fem.dirichletbc(0.0, dofs, space)


def poisson(u: Any, v: Any, conductivity: Any, source: Any) -> ufl.Form:
    """int conductivity grad u . grad v - source v; conductivity: a scalar or a matrix."""
    return (ufl.inner(conductivity * ufl.grad(u), ufl.grad(v)) - source * v) * ufl.dx


def stress(u: Any, young: Any, ratio: Any) -> Any:
    """sigma(u) in the units of Young's modulus; ratio: Poisson's, in (-1, 1/2)."""
    strain = ufl.sym(ufl.grad(u))
    mu, lame = young / (2 * (1 + ratio)), young * ratio / ((1 + ratio) * (1 - 2 * ratio))
    return 2 * mu * strain + lame * ufl.tr(strain) * ufl.Identity(len(u))


def elasticity(u: Any, v: Any, young: Any, ratio: Any) -> ufl.Form:
    """int sigma(u) : grad v, without loads (in 2-D: plane strain); see `stress`."""
    return ufl.inner(stress(u, young, ratio), ufl.grad(v)) * ufl.dx
