r"""Advection, diffusion and reaction, u_t + b . grad u = div(D grad u) - r u + f, with b = sum_k s_k b_k(x).

    "supg"      P1, streamline upwind Petrov-Galerkin (Brooks, Hughes 1982): test functions
                v + tau b . grad v, tau = (coth Pe - 1/Pe) / (2 |J^-1 b|): the nodal values are exact for
                D u'' = b u' in one dimension. In several, layers may still over- and undershoot.
    "dg"        discontinuous P1, upwind fluxes, symmetric interior penalty for D (Arnold 1982): D may be 0;
                its mass is inverted cell by cell, so it has an explicit torch form (`semidiscrete`)
    "galerkin"  P1 as it is; refused where the cell Peclet number Pe = |b| h / (2 D) exceeds 1: there it
                oscillates

The flows b_k are free of divergence. s_k, D and r are what a step is called with, and differentiated by.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import dolfinx
import numpy as np
import torch
import ufl
from dolfinx.fem import Constant, Function, functionspace
from mpi4py import MPI
from torch import Tensor
from ufl.domain import extract_unique_domain

from solvers.errors import GliodeError
from solvers.fem.export import affine
from solvers.fem.implicit import ImplicitStep, Sdirk2Step, theta_step
from solvers.fem.mesh import Domain, FloatArray
from solvers.semidiscrete import SemiDiscrete

METHODS = ("supg", "dg", "galerkin")
SCHEMES = ("crank-nicolson", "sdirk2")
PENALTY = 8.0  # of the interior penalty, times D / h
Flow = Callable[[Any], Sequence[Any]]
Values = Callable[[FloatArray], Any]


class Transport:
    """Steps u (owned dofs of `space`,) -> u1, called as step(u, dt, s, D, r), and the stationary solution.

    flows: callables of the UFL coordinate x, each to the components of b_k (length / time); boundary: u on
    the whole boundary, a callable of points (n, 3) -> (n,), or None: no diffusive flux, what arrives leaves,
    and with "dg" nothing flows in (the continuous methods want values where the flow enters). source: f, a
    callable as well. s (number of flows,); D >= 0 in length^2 / time (0 for "dg" only); r >= 0 in 1 / time.
    Raises GliodeError for anything else.
    """

    def __init__(
        self,
        domain: Domain,
        flows: Sequence[Flow],
        method: str = "supg",
        boundary: Values | None = None,
        source: Values | None = None,
        scheme: str = "crank-nicolson",
    ) -> None:
        if method not in METHODS:
            raise GliodeError(f"method: {method!r} is not one of {', '.join(METHODS)}")
        if scheme not in SCHEMES:
            raise GliodeError(f"scheme: {scheme!r} is not one of {', '.join(SCHEMES)}")
        if not flows:
            raise GliodeError("flows: give one callable of x or more; without flow take `DiffusionStep`")
        if method == "dg" and domain.comm.size > 1:
            raise GliodeError(
                "method: 'dg' runs on one process (a Domain has no ghost cells, which facets between ranks "
                "need); take 'supg', or the torch form of `semidiscrete`"
            )
        mesh = domain.mesh
        self.domain, self.method, self.scheme = domain, method, scheme
        self.space = functionspace(mesh, ("DG", 1)) if method == "dg" else domain.V
        self.speeds = Constant(mesh, np.ones(len(flows)))
        self.D, self.rate = Constant(mesh, 1.0), Constant(mesh, 0.0)
        self.speeds.name, self.D.name, self.rate.name = "s", "D", "r"
        x = ufl.SpatialCoordinate(mesh)
        self.flows = [ufl.as_vector(list(flow(x))) for flow in flows]
        self.velocity = sum((self.speeds[k] * b for k, b in enumerate(self.flows)), 0 * self.flows[0])
        self.boundary = None if boundary is None else domain.function(domain.interpolate(boundary))
        self.source = None if source is None else domain.function(domain.interpolate(source))
        self._bcs = [] if self.boundary is None or method == "dg" else [_held(domain, self.boundary)]
        self._peclet: Any = None

    def spatial(self, u: Any, v: Any) -> ufl.Form:
        """M u_t = spatial(u; v)."""
        reaction = -self.rate * u if self.source is None else self.source - self.rate * u
        if self.method == "dg":
            flow = upwind(u, v, self.velocity, self.boundary)
            spread = penalty(u, v, self.D, self.boundary)
            return flow + spread + reaction * v * ufl.dx
        b, D = self.velocity, self.D
        away = ufl.inner(b, ufl.grad(u)) - reaction
        form = -(away * v + D * ufl.inner(ufl.grad(u), ufl.grad(v))) * ufl.dx
        if self.method == "galerkin":
            return form
        return form - self._tau * ufl.inner(b, ufl.grad(v)) * away * ufl.dx

    def mass(self, u: Any, v: Any) -> ufl.Form:
        """The form of u_t: with SUPG the test functions are shifted here too."""
        if self.method in ("dg", "galerkin"):
            return u * v * ufl.dx
        return u * (v + self._tau * ufl.inner(self.velocity, ufl.grad(v))) * ufl.dx

    @property
    def _reference_speed(self) -> Any:
        """|J^-1 b|, cells crossed per time."""
        across = ufl.dot(ufl.JacobianInverse(self.domain.mesh), self.velocity)
        return ufl.sqrt(ufl.inner(across, across) + 1e-100)

    @property
    def _peclet_number(self) -> Any:
        """|b| h / (2 D), h = |b| / |J^-1 b| the length of a cell along the flow."""
        return ufl.inner(self.velocity, self.velocity) / (2 * self.D * self._reference_speed)

    @property
    def _tau(self) -> Any:
        Pe = self._peclet_number
        series = Pe / 3 - Pe**3 / 45  # for small Pe, where the difference would be rounding
        share = ufl.conditional(ufl.lt(Pe, 1e-2), series, 1 / ufl.tanh(Pe) - 1 / Pe)
        return share / (2 * self._reference_speed)

    def step(self) -> Callable[..., Tensor]:
        """step(u, dt, s, D, r) -> u1, on the tape in everything."""
        parameters = [self.speeds, self.D, self.rate]
        made: Any
        if self.scheme == "sdirk2":
            made = Sdirk2Step(self.spatial, self.space, parameters, mass=self.mass, bcs=self._bcs)
        else:
            made = theta_step(self.spatial, self.space, parameters, 0.5, mass=self.mass, bcs=self._bcs)

        def step(
            u: Tensor, dt: Tensor | float, s: Tensor, D: Tensor | float, r: Tensor | float = 0.0
        ) -> Tensor:
            self.check(s, D, r)
            found: Tensor = made(u, dt, s, D, r)
            return found

        return step

    def stationary(self) -> Callable[..., Tensor]:
        """solve(s, D, r) -> u with spatial(u) = 0, on the tape in everything."""
        u1, u0, v = Function(self.space), Function(self.space), ufl.TestFunction(self.space)
        parameters = [self.speeds, self.D, self.rate]
        made = ImplicitStep(self.spatial(u1, v), u1, u0, parameters, bcs=self._bcs)
        zero = torch.zeros(self.size, dtype=torch.float64)

        def solve(s: Tensor, D: Tensor | float, r: Tensor | float = 0.0) -> Tensor:
            self.check(s, D, r)
            return made(zero, s, D, r)

        return solve

    def semidiscrete(self) -> SemiDiscrete:
        """M u' = sum_k s_k (A_k u + b_k) + D (A_D u + b_D) + r A_r u + b: for `Linear`, on torch alone.

        Weights s0, s1, ... (not negative: the upwind side is fixed), D, r, source. Of "dg" only: there the
        mass is inverted cell by cell, and the flux is linear in the speed of each flow alone. Raises
        GliodeError for the other methods, and for flows that cross a facet together, as their upwind flux is
        not linear.
        """
        if self.method != "dg":
            raise GliodeError(f"method: {self.method!r} is not linear in its parameters; export method 'dg'")
        n = ufl.FacetNormal(self.domain.mesh)
        for one, other in itertools.combinations(self.flows, 2):
            both = abs(ufl.dot(one, n) * ufl.dot(other, n))
            crossing = both("+") * ufl.dS + both * ufl.ds
            if dolfinx.fem.assemble_scalar(dolfinx.fem.form(crossing)) > 0:
                raise GliodeError(
                    "flows: two of them cross the same facets, where the upwind flux is not linear in their "
                    "speeds; export one flow, or the components along the axes of a rectangular mesh"
                )
        u, v = ufl.TrialFunction(self.space), ufl.TestFunction(self.space)
        g = self.boundary
        forms = {f"s{k}": upwind(u, v, b, g) for k, b in enumerate(self.flows)}
        forms["D"] = penalty(u, v, 1.0, g)
        operators = {name: ufl.lhs(form) for name, form in forms.items()}
        loads = {} if g is None else {name: -ufl.rhs(form) for name, form in forms.items()}
        if self.source is not None:
            loads["source"] = self.source * v * ufl.dx
        mass = u * v * ufl.dx
        return affine(mass, operators | {"r": -mass}, loads, "advection, diffusion, reaction: DG, P1")

    @property
    def size(self) -> int:
        """Owned dofs: the length of a state."""
        return int(self.space.dofmap.index_map.size_local)

    @property
    def points(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(owned dofs, 3) coordinates; vertices of discontinuous cells are there once for each cell."""
        return np.asarray(self.space.tabulate_dof_coordinates()[: self.size])

    def check(self, s: Tensor, D: Tensor | float, r: Tensor | float) -> None:
        """Raise GliodeError for values that make no sense, or that plain Galerkin cannot do."""
        if tuple(s.shape) != (len(self.flows),) or not bool(torch.isfinite(s.detach()).all()):
            raise GliodeError(f"s: give {len(self.flows)} finite speeds, one for each flow")
        found, decay = float(D), float(r)
        if not (found > 0 or (found == 0 and self.method == "dg")) or not math.isfinite(found):
            raise GliodeError(f"D: {found:g} must be positive and finite; pure advection (D = 0) needs 'dg'")
        if not (decay >= 0 and math.isfinite(decay)):
            raise GliodeError(f"r: {decay:g} is a rate of decay, not negative; what grows is a source")
        if self.method == "galerkin" and (largest := self.peclet(s, D)) > 1:
            raise GliodeError(
                f"galerkin: the cell Peclet number |b| h / (2 D) is {largest:.3g}; above 1 the solution "
                f"oscillates: take method 'supg' or 'dg', or cells {largest:.2g} times smaller"
            )

    def peclet(self, s: Tensor, D: Tensor | float) -> float:
        """The largest mean of a cell's Peclet number, over all ranks."""
        if self._peclet is None:
            w = ufl.TestFunction(functionspace(self.domain.mesh, ("DG", 0)))
            self._peclet = dolfinx.fem.form(self._peclet_number * w * ufl.dx), dolfinx.fem.form(w * ufl.dx)
        self.speeds.value, self.D.value = s.detach().numpy(), float(D)
        sums, volumes = (dolfinx.fem.assemble_vector(form).array for form in self._peclet)
        largest: float = self.domain.comm.allreduce(float(np.max(sums / volumes, initial=0.0)), op=MPI.MAX)
        return largest


def upwind(u: Any, v: Any, b: Any, inflow: Any = None) -> ufl.Form:
    """-div(b u) tested by v, discontinuous: upwind values at facets, `inflow` (None: 0) where b enters."""
    n = ufl.FacetNormal(extract_unique_domain(u))
    bn = ufl.dot(b, n)
    flux = bn("+") * ufl.avg(u) + 0.5 * abs(bn("+")) * ufl.jump(u)
    outside = 0.5 * (bn + abs(bn)) * u
    if inflow is not None:
        outside += 0.5 * (bn - abs(bn)) * inflow
    return u * ufl.dot(b, ufl.grad(v)) * ufl.dx - flux * ufl.jump(v) * ufl.dS - outside * v * ufl.ds


def penalty(u: Any, v: Any, D: Any, boundary: Any = None) -> ufl.Form:
    """div(D grad u) tested by v, discontinuous, symmetric; `boundary`: the value there (None: no flux)."""
    mesh = extract_unique_domain(u)
    n = ufl.FacetNormal(mesh)
    across = ufl.dot(ufl.transpose(ufl.Jacobian(mesh)), n)
    h = ufl.sqrt(ufl.inner(across, across))  # of the cell, along n
    jump_u, jump_v = ufl.jump(u, n), ufl.jump(v, n)
    form = -D * ufl.inner(ufl.grad(u), ufl.grad(v)) * ufl.dx
    form += D * (ufl.inner(ufl.avg(ufl.grad(u)), jump_v) + ufl.inner(ufl.avg(ufl.grad(v)), jump_u)) * ufl.dS
    form -= D * PENALTY / ufl.avg(h) * ufl.jump(u) * ufl.jump(v) * ufl.dS
    if boundary is not None:
        away = u - boundary
        form += D * (ufl.dot(ufl.grad(u), n) * v + ufl.dot(ufl.grad(v), n) * away) * ufl.ds
        form -= D * PENALTY / h * away * v * ufl.ds
    return form


def _held(domain: Domain, g: Function) -> Any:
    """The Dirichlet condition u = g on the whole boundary."""
    mesh, facets = domain.mesh, domain.mesh.topology.dim - 1
    mesh.topology.create_connectivity(facets, mesh.topology.dim)
    outer = dolfinx.mesh.exterior_facet_indices(mesh.topology)
    return dolfinx.fem.dirichletbc(g, dolfinx.fem.locate_dofs_topological(domain.V, facets, outer))
