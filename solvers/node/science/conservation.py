r"""Discontinuous Galerkin for conservation laws on element arrays: u_t + div f(u; w) = 0 as a vector field.

On each cell, for all polynomials v of the degree,

    int u_t v = int f(u) . grad v - int_faces f*(u-, u+; n) v-,

with f* the Rusanov flux. A state u is (..., cells, nodes, components), batch first, on any device. `DG` is
f(t, u, *w) for `integrate` and `ScienceActivated`; `SSPStep` is step(u, dt, *w) for `Evolution` and
`Stepped`, with a limiter after every stage and the CFL condition checked. Method: Cockburn and Shu 2001.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers.errors import Diverged, GliodeError
from solvers.node.science.elements import Elements
from solvers.node.science.laws import Law, courant, require_courant, rusanov

FLOOR = 1e-10  # of density, depth, pressure after the positivity limiter
Boundary = str | Sequence[float]


class DG:
    """f(t, u, *w) = u_t, w the law's parameters in order or by name (a number each; (batch, 1, 1) for one
    each in a batch; those left out as usual).

    boundary: "outflow" (the inner state), "wall" (mirrored), or the components of the state outside; where
    the elements are periodic there is none. tvb: None for no slope limiter (smooth solutions), 0 for minmod
    at faces, M > 0 to leave deviations below M h^2 alone, as smooth extrema have them (Shu 1987).
    """

    def __init__(
        self, law: Law, elements: Elements, boundary: Boundary = "outflow", tvb: float | None = None
    ) -> None:
        if law.dim != elements.dim:
            raise GliodeError(f"dim: {type(law).__name__} in {law.dim} D on elements in {elements.dim} D")
        check_boundary(law, boundary)
        if tvb is not None and not tvb >= 0:
            raise GliodeError(f"tvb: {tvb}; give 0 (minmod), a positive bound of |u''|, or None")
        self.law, self.elements, self.boundary, self.tvb = law, elements, boundary, tvb
        e = elements
        self._edge = e.boundary[..., None]
        self._open = bool(e.boundary.any())
        at_edge = e.neighbours == torch.arange(e.count, device=e.neighbours.device)[:, None]
        self._edge_cell = at_edge.any(-1)[:, None]
        self._width = e.volumes[:, None] ** (2 / e.dim)  # h^2
        self._normal = list(e.normals.unbind(-1))

    def __call__(self, t: Any, u: Tensor, *given: Any, **named: Any) -> Tensor:
        """u_t, of the shape of u."""
        w = self.law.values(given, named)
        self._check(u)
        e = self.elements
        flux = self.law.flux((e.values @ u).unbind(-1), *w)
        out = sum(
            (e.stiffness[:, d] @ torch.stack([row[d] for row in flux], -1) for d in range(1, e.dim)),
            e.stiffness[:, 0] @ torch.stack([row[0] for row in flux], -1),
        )
        inner = e.traces @ u
        outer = self._outer(inner)
        f = rusanov(self.law, inner.unbind(-1), outer.unbind(-1), self._normal, w, torch.maximum)
        return out - e.lift @ torch.stack(f, -1)

    def largest_step(self, u: Tensor, *given: Any, **named: Any) -> float:
        """The largest stable dt of SSP Runge-Kutta 3 at u: C(degree) min_cells 2 volume / (surface speed)."""
        e = self.elements
        with torch.no_grad():
            w = self.law.values(given, named)
            speed = self.law.speed((e.traces @ u).unbind(-1), self._normal, *w)
            rate = speed.amax(-1) * e.face_weights.sum(-1) / (2 * e.volumes)
            fastest = float(rate.max())
        return courant(e.degree) / max(fastest, 1e-300) if fastest == fastest else float("nan")

    def limit(self, u: Tensor, *given: Any, **named: Any) -> Tensor:
        """u with its slopes limited, then scaled towards the cell means until density, depth and pressure are
        positive; the means stay. Differentiable almost everywhere. Raises Diverged for means that are not
        positive.
        """
        w = self.law.values(given, named)
        mean = self.elements.means(u)[..., None, :]
        self._require_positive(mean, w)
        if self.tvb is not None and self.elements.degree > 0:
            u = self._slopes(u, mean, w)
        return self._scaled(u, mean, w)

    def _slopes(self, u: Tensor, mean: Tensor, w: Sequence[Any]) -> Tensor:
        """Where a trace leaves the range of the neighbours' means: the linear part, scaled into it, wave by
        wave in one dimension and else component by component.
        """
        e, average = self.elements, mean[..., 0, :]
        gaps = average.index_select(-2, e.neighbours.reshape(-1)).unflatten(-2, e.neighbours.shape) - mean
        deviation = u - mean
        columns = self.law.waves(mean.unbind(-1), *w)  # (..., K, 1) each, which w fits
        if columns is not None:
            waves = torch.stack([torch.stack(row, -1) for row in columns], -1)  # transposed, for rows
            waves = waves.squeeze(-3)
            components = torch.linalg.inv(waves)
            gaps, deviation = gaps @ components, deviation @ components
        low, high = self._bounds(gaps)
        kept = self._factor(e.traces @ deviation, low, high)
        linear = e.linear @ deviation
        linear = self._factor(e.traces @ linear, low, high) * linear
        scaled = mean + (linear if columns is None else linear @ waves)
        return torch.where(kept.amin(-1, keepdim=True) < 1, scaled, u)

    def _bounds(self, gaps: Tensor) -> tuple[Tensor, Tensor]:
        """The least and largest difference to a neighbour's mean, (..., K, 1, c), 0 included."""
        low, high = gaps.amin(-2).clamp(max=0), gaps.amax(-2).clamp(min=0)
        if self._open:  # nothing is known beyond: as steep as inwards
            most = torch.maximum(high, -low)
            low = torch.where(self._edge_cell, -most, low)
            high = torch.where(self._edge_cell, most, high)
        return low[..., None, :], high[..., None, :]

    def _factor(self, deviation: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The largest factor in [0, 1] that brings all traces (..., K, m, c) into the range."""
        bound = torch.where(deviation > 0, high, low)
        assert self.tvb is not None
        width = (self.tvb * self._width)[..., None]
        slack = 1e-12 * (high - low)  # rounding leaves linear functions alone
        inside = (deviation.abs() <= width) | (deviation.abs() <= bound.abs() + slack)
        ratio = bound / torch.where(inside, torch.ones_like(deviation), deviation)
        return torch.where(inside, torch.ones_like(ratio), ratio).amin(-2, keepdim=True)

    def _require_positive(self, mean: Tensor, w: Sequence[Any]) -> None:
        for i, middle in enumerate(self.law.positive(mean.detach().unbind(-1), *w)):
            if not bool((middle > FLOOR).all()):
                raise Diverged(
                    f"limiter: positive quantity {i + 1} of {type(self.law).__name__} has a cell mean of "
                    f"{float(middle.detach().min()):.3g}; take shorter steps, or check the initial state"
                )

    def _scaled(self, u: Tensor, mean: Tensor, w: Sequence[Any]) -> Tensor:
        """Zhang and Shu 2010; a positive quantity is concave, so that a chord to the mean lies below it."""
        e, law = self.elements, self.law
        for i, middle in enumerate(law.positive(mean.unbind(-1), *w)):
            at = torch.cat([e.traces @ u, e.values @ u], -2)
            least = law.positive(at.unbind(-1), *w)[i].amin(-1, keepdim=True)
            short = least < FLOOR
            gap = torch.where(short, middle - least, torch.ones_like(least))
            factor = torch.where(short, (middle - FLOOR) / gap, torch.ones_like(least))[..., None]
            u = torch.where(short[..., None], mean + factor * (u - mean), u)
        return u

    def _outer(self, inner: Tensor) -> Tensor:
        """The traces from the other side of the faces."""
        e = self.elements
        outer = inner.flatten(-3, -2).index_select(-2, e.exterior).unflatten(-2, e.boundary.shape)
        if not self._open or self.boundary == "outflow":
            return outer
        if self.boundary == "wall":
            beyond = torch.stack(self.law.mirror(inner.unbind(-1), self._normal), -1)
        else:
            beyond = inner.new_tensor(self.boundary).expand_as(inner)
        return torch.where(self._edge, beyond, outer)

    def _check(self, u: Tensor) -> None:
        e = self.elements
        wanted = (e.count, e.values.shape[1], self.law.components)
        if tuple(u.shape[-3:]) != wanted or u.dtype != e.values.dtype or u.device != e.values.device:
            raise GliodeError(
                f"state: {tuple(u.shape)} {u.dtype} on {u.device}; its last dimensions must be {wanted} "
                f"(cells, nodes, components), {e.values.dtype} on {e.values.device} (Elements.to)"
            )


def check_boundary(law: Law, boundary: Boundary) -> None:
    """Raise GliodeError unless it is "outflow", "wall" or a state of the law."""
    if boundary == "outflow":
        return
    if boundary == "wall":
        law.mirror([1.0] * law.components, [1.0, 0.0][: law.dim])
    elif isinstance(boundary, str) or len(boundary) != law.components:
        raise GliodeError(f"boundary: {boundary!r}; give 'outflow', 'wall' or {law.components} components")


class Limited(Protocol):
    """A semi-discrete law: the torch or the DOLFINx form."""

    def __call__(self, t: Any, u: Tensor, *given: Any, **named: Any) -> Tensor: ...

    def limit(self, u: Tensor, *given: Any, **named: Any) -> Tensor: ...

    def largest_step(self, u: Tensor, *given: Any, **named: Any) -> float: ...


class SSPStep:
    """u -> u(dt) by SSP Runge-Kutta 3 as convex means of Euler steps, each limited (Shu and Osher 1988):

        u1 = L(u + dt f(u)),  u2 = L(3/4 u + 1/4 (u1 + dt f(u1))),  u(dt) = L(1/3 u + 2/3 (u2 + dt f(u2)))

    Without a limiter this is the tableau `ssp3`. Bounds of an Euler step (range, positivity, total variation
    of the means) hold for the step. The initial state is taken as it is: limit it first where it has jumps.
    Raises Diverged with the largest stable step where dt violates the CFL condition.
    """

    def __init__(self, field: Limited) -> None:
        self.field = field

    def __call__(self, u: Tensor, dt: Tensor | float, *given: Any, **named: Any) -> Tensor:
        """u after dt."""
        f = self.field
        require_courant(float(dt), f.largest_step(u.detach(), *given, **named))
        v = u
        for old in (0.0, 3 / 4, 1 / 3):
            euler = v + dt * f(0.0, v, *given, **named)
            v = f.limit(old * u + (1 - old) * euler if old else euler, *given, **named)
        return v
