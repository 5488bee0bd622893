r"""The porous medium equation u_t = D laplace(u^m), m >= 1: diffusion that stops at a front.

With p = u^m in P1 as a second unknown, lumped mass and stiffness K (vertex rule on quadrilaterals and bricks)

    M (u1 - u0) = -dt D K p1,    M (p1 - u1^m) = 0,

so the flux is that of the nodal interpolant of u^m. Where K is an M-matrix (intervals, triangles without
obtuse angles, bricks) a step of implicit Euler is monotone: u >= 0 and its bounds are kept at any dt, for the
exact solution of the step. Mass is kept by every scheme, D grad(u^m) . n = 0 on the boundary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import ufl
from dolfinx.fem import Constant, functionspace
from scipy.special import gamma
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.implicit import Sdirk2Step, theta_step
from solvers.fem.mesh import Domain, FloatArray
from solvers.node.science.transport import SMALL

VERTEX = {"quadrature_rule": "vertex", "quadrature_degree": 1}
SCHEMES = ("implicit-euler", "sdirk2")


def stiffness_measure(domain: Domain) -> Any:
    """dx for grad . grad: by the vertex rule on quadrilaterals and bricks, which makes it an M-matrix."""
    tensor = domain.mesh.topology.cell_name() in ("quadrilateral", "hexahedron")
    return ufl.dx(metadata=VERTEX) if tensor else ufl.dx


@dataclass(frozen=True)
class Barenblatt:
    """The source solution of u_t = D laplace(u^m): mass concentrated in one point at time 0 (Barenblatt 1952;
    Vazquez, The Porous Medium Equation, 2007, section 4.4).

        u = s^(-a) (C - k |x|^2 s^(-2a/d))_+^(1/(m - 1)),  s = D t,  a = d / (d (m - 1) + 2),
        k = a (m - 1) / (2 m d),  C from the mass.

    m > 1; mass: over all of R^d; dim: d = 1, 2 or 3; D: diffusivity. Raises GliodeError where one makes no
    sense.
    """

    m: float
    mass: float
    dim: int = 1
    D: float = 1.0

    def __post_init__(self) -> None:
        if not self.m > 1:
            raise GliodeError(f"m: {self.m}; the source solution has a front for m > 1 only")
        if not (self.mass > 0 and self.D > 0 and self.dim in (1, 2, 3)):
            raise GliodeError("Barenblatt: mass and D must be positive, and dim 1, 2 or 3")

    @property
    def _constants(self) -> tuple[float, float, float]:
        """a, k and C."""
        d, m, p = self.dim, self.m, 1 / (self.m - 1)
        a = d / (d * (m - 1) + 2)
        k = a * (m - 1) / (2 * m * d)
        unit = math.pi ** (d / 2) * gamma(p + 1) / gamma(p + 1 + d / 2)  # int (1 - |x|^2)_+^p
        return a, k, (self.mass * k ** (d / 2) / unit) ** (1 / (p + d / 2))

    def density(self, points: FloatArray, t: float) -> FloatArray:
        """u at points (n, 3 or fewer coordinates), the first `dim` of which count; t > 0."""
        a, k, C = self._constants
        s = self._age(t)
        square = (np.asarray(points)[:, : self.dim] ** 2).sum(1) * s ** (-2 * a / self.dim)
        found: FloatArray = s**-a * np.maximum(C - k * square, 0.0) ** (1 / (self.m - 1))
        return found

    def front(self, t: float) -> float:
        """The radius beyond which u = 0."""
        a, k, C = self._constants
        return math.sqrt(C / k) * self._age(t) ** (a / self.dim)

    def _age(self, t: float) -> float:
        if not t > 0:
            raise GliodeError(f"Barenblatt: the time must be positive, got {t}")
        return self.D * t


class PorousMedium:
    """A step u (owned dofs,) -> u1 of u_t = D laplace(u^m), called as step(u, dt, D, m): on the tape in all.

    scheme: "implicit-euler" (order 1, keeps u >= 0) or "sdirk2" (order 2, L-stable; undershoots at the front
    are possible, none are clipped). D > 0 in length^2 / time; m >= 1 (1: the heat equation). Raises
    GliodeError for other values, and for states below zero by more than rounding under implicit Euler.
    """

    def __init__(self, domain: Domain, scheme: str = "sdirk2") -> None:
        if scheme not in SCHEMES:
            raise GliodeError(f"scheme: {scheme!r} is not one of {', '.join(SCHEMES)}")
        self.domain, self.scheme = domain, scheme
        W = functionspace(domain.mesh, ("Lagrange", 1, (2,)))
        if not np.array_equal(W.dofmap.list, domain.V.dofmap.list):
            raise GliodeError("porous medium: this DOLFINx numbers vector spaces unlike scalar ones")
        D, m = Constant(domain.mesh, 1.0), Constant(domain.mesh, 2.0)
        D.name, m.name = "D", "m"
        nodes, cells = ufl.dx(metadata=VERTEX), stiffness_measure(domain)

        def spatial(u: Any, v: Any) -> ufl.Form:
            power = u[0] * ufl.max_value(abs(u[0]), SMALL) ** (m - 1)
            flow = -D * ufl.inner(ufl.grad(u[1]), ufl.grad(v[0]))
            return flow * cells - (u[1] - power) * v[1] * nodes

        def mass(u: Any, v: Any) -> ufl.Form:
            return u[0] * v[0] * nodes

        far = {"snes_max_it": 500}  # Newton moves a front into the dry by about a cell an iteration
        if scheme == "sdirk2":
            self._step: Any = Sdirk2Step(spatial, W, [D, m], mass=mass, options=far)
        else:
            self._step = theta_step(spatial, W, [D, m], 1.0, mass=mass, options=far)

    def __call__(self, u: Tensor, dt: Tensor | float, D: Tensor | float, m: Tensor | float) -> Tensor:
        """u1, (owned dofs,)."""
        if not float(D) > 0:
            raise GliodeError(
                f"D: {float(D):g} must be positive; backwards in time the equation is ill-posed"
            )
        if not float(m) >= 1:
            raise GliodeError(f"m: {float(m):g} is below 1 (fast diffusion is not covered); give m >= 1")
        low = float(u.detach().min()) if len(u) else 0.0
        if self.scheme == "implicit-euler" and low < -1e-8:
            raise GliodeError(f"u: {low:.3g} somewhere; a density is not negative, check the initial state")
        pair = torch.stack([u, torch.zeros_like(u)], 1).reshape(
            -1
        )  # the second is not read but as Newton's start
        found: Tensor = self._step(pair, dt, D, m)
        return found.view(-1, 2)[:, 0]
