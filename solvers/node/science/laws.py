r"""Conservation laws u_t + div f(u) = 0, each written once, for torch tensors and for UFL expressions alike.

A law takes its state as a sequence of components and uses +, -, *, /, ** and abs only, so that the torch and
the DOLFINx form of discontinuous Galerkin share every formula. `parameters` are the physical constants with
their usual values: any of them may be given to a step instead, as an unknown for instance.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from solvers.errors import Diverged, GliodeError

Components = Sequence[Any]


class Law(ABC):
    """The flux f of u_t + div f(u; w) = 0, u with `components` entries in `dim` dimensions."""

    components: int
    parameters: Mapping[str, float]

    def __init__(self, dim: int = 1) -> None:
        if dim not in (1, 2):
            raise GliodeError(f"{type(self).__name__}: dim is {dim}; give 1 or 2")
        self.dim = dim

    @abstractmethod
    def flux(self, u: Components, *w: Any) -> list[list[Any]]:
        """f(u), [component][direction]."""

    @abstractmethod
    def speed(self, u: Components, n: Components, *w: Any) -> Any:
        """The largest |eigenvalue| of d(f . n)/du for a unit vector n."""

    def mirror(self, u: Components, n: Components) -> list[Any]:
        """The state behind a solid wall of normal n. Raises GliodeError where a wall makes no sense."""
        raise GliodeError(f"boundary: {type(self).__name__} knows no wall; give 'outflow' or a state")

    def positive(self, u: Components, *w: Any) -> list[Any]:
        """What must stay positive, each a concave function of u."""
        return []

    def waves(self, u: Components, *w: Any) -> list[list[Any]] | None:
        """In one dimension the right eigenvectors of df/du, [component][wave]; None: the components."""
        return None

    def values(self, given: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """All parameters in order: the first ones given, others by name, else as usual."""
        names = list(self.parameters)
        unknown = set(named) - set(names[len(given) :])
        if unknown or len(given) > len(names):
            raise GliodeError(
                f"{type(self).__name__}: {len(given)} values and {sorted(named)} given; it has {names}"
            )
        return [*given, *(named.get(name, self.parameters[name]) for name in names[len(given) :])]


class Burgers(Law):
    """f(u) = a u^2/2 in every direction, a the speed factor (Burgers 1948)."""

    components = 1
    parameters: Mapping[str, float] = {"speed": 1.0}

    def flux(self, u: Components, *w: Any) -> list[list[Any]]:
        return [[w[0] * u[0] * u[0] / 2] * self.dim]

    def speed(self, u: Components, n: Components, *w: Any) -> Any:
        return abs(w[0] * u[0] * sum(n[1:], n[0]))


class _Fluid(Law):
    """A law whose state is (mass, momentum in each direction, ...)."""

    def mirror(self, u: Components, n: Components) -> list[Any]:
        out = sum((u[1 + d] * n[d] for d in range(1, self.dim)), u[1] * n[0])
        return [u[0], *(u[1 + d] - 2 * out * n[d] for d in range(self.dim)), *u[1 + self.dim :]]

    def _velocity(self, u: Components) -> list[Any]:
        return [u[1 + d] / u[0] for d in range(self.dim)]

    def _normal(self, u: Components, n: Components) -> Any:
        return abs(sum((u[1 + d] * n[d] for d in range(1, self.dim)), u[1] * n[0])) / u[0]


class ShallowWater(_Fluid):
    """(h, h v), f = (h v, h v v + g h^2/2 I): depth in m, velocity in m/s, `gravity` g in m/s^2."""

    parameters: Mapping[str, float] = {"gravity": 9.81}

    def __init__(self, dim: int = 1) -> None:
        super().__init__(dim)
        self.components = 1 + dim

    def flux(self, u: Components, *w: Any) -> list[list[Any]]:
        v, pressure = self._velocity(u), w[0] * u[0] * u[0] / 2
        momentum = [
            [u[1 + i] * v[j] + (pressure if i == j else 0.0) for j in range(self.dim)]
            for i in range(self.dim)
        ]
        return [[u[1 + d] for d in range(self.dim)], *momentum]

    def speed(self, u: Components, n: Components, *w: Any) -> Any:
        return self._normal(u, n) + (w[0] * u[0]) ** 0.5

    def positive(self, u: Components, *w: Any) -> list[Any]:
        return [u[0]]

    def waves(self, u: Components, *w: Any) -> list[list[Any]] | None:
        if self.dim > 1:
            return None
        v, c, one = u[1] / u[0], (w[0] * u[0]) ** 0.5, u[0] / u[0]
        return [[one, one], [v - c, v + c]]


class Euler(_Fluid):
    """(rho, rho v, E), f = (rho v, rho v v + p I, (E + p) v), p = (gamma - 1)(E - rho |v|^2/2): an ideal gas
    with the ratio of specific heats `gamma`, without units.
    """

    parameters: Mapping[str, float] = {"gamma": 1.4}

    def __init__(self, dim: int = 1) -> None:
        super().__init__(dim)
        self.components = 2 + dim

    def pressure(self, u: Components, *w: Any) -> Any:
        """p."""
        kinetic = sum((u[1 + d] * u[1 + d] for d in range(1, self.dim)), u[1] * u[1]) / (2 * u[0])
        return (w[0] - 1) * (u[1 + self.dim] - kinetic)

    def state(self, density: Any, velocity: Components, pressure: Any, gamma: float = 1.4) -> list[Any]:
        """The components of a density, a velocity and a pressure."""
        kinetic = density * sum((v * v for v in velocity[1:]), velocity[0] * velocity[0]) / 2
        return [density, *(density * v for v in velocity), pressure / (gamma - 1) + kinetic]

    def flux(self, u: Components, *w: Any) -> list[list[Any]]:
        v, p = self._velocity(u), self.pressure(u, *w)
        momentum = [
            [u[1 + i] * v[j] + (p if i == j else 0.0) for j in range(self.dim)] for i in range(self.dim)
        ]
        return [
            [u[1 + d] for d in range(self.dim)],
            *momentum,
            [(u[1 + self.dim] + p) * v[d] for d in range(self.dim)],
        ]

    def speed(self, u: Components, n: Components, *w: Any) -> Any:
        return self._normal(u, n) + (w[0] * self.pressure(u, *w) / u[0]) ** 0.5

    def positive(self, u: Components, *w: Any) -> list[Any]:
        return [u[0], self.pressure(u, *w)]

    def waves(self, u: Components, *w: Any) -> list[list[Any]] | None:
        if self.dim > 1:
            return None
        v, p, one = u[1] / u[0], self.pressure(u, *w), u[0] / u[0]
        c, enthalpy = (w[0] * p / u[0]) ** 0.5, (u[2] + p) / u[0]
        return [[one, one, one], [v - c, v, v + c], [enthalpy - v * c, v * v / 2, enthalpy + v * c]]


def rusanov(
    law: Law,
    inner: Components,
    outer: Components,
    n: Components,
    w: Sequence[Any],
    maximum: Callable[[Any, Any], Any],
) -> list[Any]:
    """f* = (f(u-) + f(u+)) . n/2 - s/2 (u+ - u-), s the larger speed of both (Rusanov 1961): monotone."""
    here, there = law.flux(inner, *w), law.flux(outer, *w)
    s = maximum(law.speed(inner, n, *w), law.speed(outer, n, *w))
    found = []
    for i in range(law.components):
        mean = sum(((here[i][d] + there[i][d]) * n[d] for d in range(1, law.dim)), 0.0)
        mean = mean + (here[i][0] + there[i][0]) * n[0]
        found.append((mean - s * (outer[i] - inner[i])) / 2)
    return found


COURANT = {0: 1.0, 1: 0.409, 2: 1 / 6, 3: 0.130}
"""Degree -> the largest dt s/h of SSP Runge-Kutta 3: linear stability (Cockburn and Shu 2001) and
positivity of the means (Zhang and Shu 2010: the end weight of a Gauss-Lobatto rule), whichever is less."""


def courant(degree: int) -> float:
    """The Courant number of a degree. Raises GliodeError beyond 3."""
    if degree not in COURANT:
        raise GliodeError(f"degree: {degree}; discontinuous Galerkin has {sorted(COURANT)} here")
    return COURANT[degree]


def require_courant(dt: float, largest: float) -> None:
    """Raise GliodeError unless 0 <= dt < infinity, Diverged unless it is at most the largest stable step.

    largest: NaN (or 0) where the state has no speed.
    """
    if not 0 <= dt < math.inf:
        raise GliodeError(f"explicit step: dt = {dt:.4g}; give a finite time, not negative")
    if not largest > 0:
        raise Diverged(
            "explicit step: the state is not finite, or a density, depth or pressure is negative; "
            "the run has already broken down"
        )
    if dt > largest * (1 + 1e-9):
        times = math.ceil(min(100 * dt / largest, 1e15)) / 100
        raise Diverged(
            f"explicit step: dt = {dt:.4g} violates the CFL condition; the largest stable step here is "
            f"{largest:.4g}: take {times:.2f} times as many steps"
        )
