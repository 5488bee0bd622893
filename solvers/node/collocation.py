r"""Networks that are solutions: N(t, x) of a flow, u(t, x) of a PDE; initial and boundary values built in.

    Flow     N(t, x) = x + N~(t, x) - N~(0, x),            N(0, x) = x
    Field    u(z) = lift(z) + factor(z) (N~(z) - N~(z_0)),  z_0: z at t = 0, left out unless `start`

N~ is a perceptron with tanh. Its first and second derivatives by the inputs are carried forward through the
layers beside the value (Taylor arithmetic: one matrix product a layer for all of them),

    v = tanh(a),   v_i = (1 - v^2) a_i,   v_ij = (1 - v^2) (a_ij - 2 v a_i a_j),

by plain operations: they cost what nested reverse mode costs, and can be differentiated again in both modes.
Built-in values: Lagaris, Likas and Fotiadis (1998). Training is `inverse.collocation`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from solvers.errors import GliodeError
from solvers.evolution import is_dual

Order = tuple[int, ...]
"""A derivative: () the value, (i,) by input i, (i, j) by both."""

Jets = dict[Order, Tensor]
Map = Callable[[Tensor], Tensor]


class Perceptron(nn.Module):
    """N~(z) (n, outputs) of points z (n, d): `layers` hidden layers of `width` tanh, then a linear one.

    low, high: the box in which the points lie; inputs are scaled to [-1, 1] there. seed: of the weights
    (Glorot's; biases 0); gain: a factor of the last layer's, small for a start near 0. Raises GliodeError for
    an empty box, or sizes below 1.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        outputs: int = 1,
        width: int = 32,
        layers: int = 3,
        seed: int = 0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        if len(low) != len(high) or not low or not all(a < b for a, b in zip(low, high, strict=True)):
            raise GliodeError(f"network: the box from {list(low)} to {list(high)} is empty; give low < high")
        if min(outputs, width, layers) < 1:
            raise GliodeError(f"network: {outputs} outputs, {layers} layers of {width}; give 1 or more")
        ends = torch.tensor([list(low), list(high)], dtype=torch.float64)
        self.register_buffer("centre", ends.mean(0))
        self.register_buffer("reach", (ends[1] - ends[0]) / 2)
        sizes = [len(low), *[width] * layers, outputs]
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        for inputs, into in itertools.pairwise(sizes):
            layer = nn.Linear(inputs, into, dtype=torch.float64)
            with torch.no_grad():
                sd = math.sqrt(2 / (inputs + into)) * (gain if len(self.layers) == layers else 1.0)
                layer.weight.copy_(sd * torch.randn(into, inputs, dtype=torch.float64, generator=generator))
                layer.bias.zero_()
            self.layers.append(layer)

    def forward(self, z: Tensor) -> Tensor:
        a = (z - self.get_buffer("centre")) / self.get_buffer("reach")
        *hidden, last = self.layers
        for layer in hidden:
            a = torch.tanh(layer(a))
        out: Tensor = last(a)
        return out

    def jets(self, z: Tensor, orders: Sequence[Order]) -> Jets:
        """The value and the derivatives asked for, each (n, outputs); a second brings its firsts along."""
        rows = _closed(orders)
        firsts = [o[0] for o in rows if len(o) == 1]
        place = {o: k for k, o in enumerate(rows)}
        centre, reach = self.get_buffer("centre"), self.get_buffer("reach")
        a = torch.zeros(len(rows), *z.shape, dtype=z.dtype, device=z.device)
        for i in firsts:
            a[place[i,], :, i] = 1 / reach[i]
        a = torch.cat([((z - centre) / reach)[None], a[1:]])
        seconds = [(o, place[o]) for o in rows if len(o) == 2]
        *hidden, last = cast(list[nn.Linear], list(self.layers))
        for layer in hidden:
            a = linear(a, layer.weight)
            v = torch.tanh(a[0] + layer.bias)
            slope = 1 - v * v
            bent = -2 * v
            parts = [v, *(slope * a[place[i,]] for i in firsts)]
            for (i, j), k in seconds:
                parts.append(slope * (a[k] + bent * a[place[i,]] * a[place[j,]]))
            a = torch.stack(parts)
        a = linear(a, last.weight)
        return {(): a[0] + last.bias, **{o: a[k] for o, k in place.items() if o}}


def _closed(orders: Sequence[Order]) -> list[Order]:
    """(), all firsts that are asked for or needed, the seconds (i <= j)."""
    asked = {tuple(sorted(order)) for order in orders}
    if any(len(order) > 2 for order in asked):
        raise GliodeError("network: derivatives go up to order 2; state the equation as a first-order system")
    firsts = sorted({(i,) for order in asked for i in order})
    return [(), *firsts, *sorted(order for order in asked if len(order) == 2)]


class Flow(nn.Module):
    """N(t, x) = x + N~(t, x) - N~(0, x) for t (n, 1), x (n, d): the flow of x' = f, exact at t = 0.

    duration, low, high: t in [0, duration] and the box of the states at t = 0; the others as `Perceptron`.
    """

    def __init__(
        self,
        duration: float,
        low: Sequence[float],
        high: Sequence[float],
        width: int = 32,
        layers: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = Perceptron([0.0, *low], [duration, *high], len(low), width, layers, seed)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """N(t, x), (n, d)."""
        start = self.network(torch.cat([torch.zeros_like(t), x], 1))
        return x + (self.network(torch.cat([t, x], 1)) - start)

    def rate(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """N(t, x) and its derivative by t, which the equation compares with f(t, N)."""
        start = self.network(torch.cat([torch.zeros_like(t), x], 1))
        here = self.network.jets(torch.cat([t, x], 1), [(0,)])
        return x + (here[()] - start), here[0,]


class Field(nn.Module):
    """u(z) = lift(z) + factor(z) (N~(z) - N~(z_0)), (n, outputs), at points z (n, d) in the box [low, high].

    coordinates: their letters, such as "tx" or "xy". lift: z -> (n, outputs) with the given values (0 where
    left out); factor: z -> (n, 1) or (n, outputs), 0 where they are given (1). start: subtract N~ at t = 0,
    so that u = lift there; needs the coordinate t. lift and factor act row by row and hold nothing that is
    trained: their derivatives are taken once for a tensor of points (each time where it is on the tape).
    Raises GliodeError for letters that do not fit the box, or that are no coordinates.

    For instance u(0, x) = u0(x): Field("tx", low, high, lift=lambda z: u0(z[:, 1:]), start=True); u = 0 on
    the boundary of the unit square: Field("xy", (0, 0), (1, 1), factor=lambda z: (z * (1 - z)).prod(1,
    keepdim=True)).
    """

    def __init__(
        self,
        coordinates: str,
        low: Sequence[float],
        high: Sequence[float],
        outputs: int = 1,
        lift: Map | None = None,
        factor: Map | None = None,
        start: bool = False,
        width: int = 32,
        layers: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(set(coordinates)) != len(coordinates) or len(coordinates) != len(low):
            raise GliodeError(
                f"field: the coordinates {coordinates!r} and a box of {len(low)} sides: give each its letter"
            )
        if start and "t" not in coordinates:
            raise GliodeError(f"field: start needs a coordinate t, there are {coordinates!r}")
        self.coordinates, self.start = coordinates, start
        self.lift, self.factor = lift, factor
        self.network = Perceptron(low, high, outputs, width, layers, seed)
        self._known: list[tuple[Tensor, int, list[Order], Jets | None, Jets | None]] = []

    def forward(self, z: Tensor) -> Tensor:
        """u(z), (n, outputs)."""
        return self.jets(z, ())[""]

    def jets(self, z: Tensor, orders: Sequence[str]) -> dict[str, Tensor]:
        """u, under "", and its derivatives asked for, such as ("t", "x", "xx"), each (n, outputs)."""
        asked = {name: self._order(name) for name in orders}
        rows = _closed(list(asked.values()))
        lift, factor = self._constants(z, rows)
        u = self.network.jets(z, rows)
        if self.start:
            t = self.coordinates.index("t")
            still = [o for o in rows if t not in o]
            z0 = z.index_fill(1, torch.tensor([t], device=z.device), 0.0)
            u |= {o: u[o] - part for o, part in self.network.jets(z0, still).items()}
        if factor is not None:
            u = _product(factor, u, rows)
        if lift is not None:
            u = {o: lift[o] + u[o] for o in rows}
        return {"": u[()], **{name: u[tuple(sorted(order))] for name, order in asked.items()}}

    def _order(self, name: str) -> Order:
        unknown = [letter for letter in name if letter not in self.coordinates]
        if unknown or not name:
            raise GliodeError(f"field: no derivative {name!r}; the coordinates are {self.coordinates!r}")
        return tuple(self.coordinates.index(letter) for letter in name)

    def _constants(self, z: Tensor, rows: list[Order]) -> tuple[Jets | None, Jets | None]:
        """The derivatives of lift and factor, kept for the last few tensors of points."""
        if self.lift is None and self.factor is None:
            return None, None
        if is_dual(z) or (z.requires_grad and torch.is_grad_enabled()):  # u is differentiated by z
            return (
                None if self.lift is None else derivatives(self.lift, z, rows, tape=True),
                None if self.factor is None else derivatives(self.factor, z, rows, tape=True),
            )
        for known, version, orders, lift, factor in self._known:
            if _same(known, z) and version == z._version and orders == rows:
                return lift, factor
        lift = None if self.lift is None else derivatives(self.lift, z, rows)
        factor = None if self.factor is None else derivatives(self.factor, z, rows)
        self._known = [(z, z._version, rows, lift, factor), *self._known[:7]]
        return lift, factor


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are views of the same numbers."""
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _product(f: Jets, u: Jets, rows: Sequence[Order]) -> Jets:
    """The derivatives of f u, by Leibniz."""
    found: Jets = {}
    for o in rows:
        found[o] = f[o] * u[()] + f[()] * u[o] if o else f[o] * u[o]
        if len(o) == 2:
            i, j = o
            found[o] = found[o] + f[i,] * u[j,] + f[j,] * u[i,]
    return found


def derivatives(f: Map, z: Tensor, orders: Sequence[Order], tape: bool = False) -> Jets:
    """Of any function of the rows of z, (n, d) -> (n, c), by reverse mode column by column; `tape`: as
    functions of z, in both modes.
    """
    rows = _closed(orders)
    with torch.enable_grad():
        z = (z if tape else z.detach()).clone()
        if len(rows) > 1:  # within torch.func only the value can be had
            z.requires_grad_()
        value = f(z)
        if value.ndim != 2 or len(value) != len(z):
            raise GliodeError(f"field: a built-in value has shape {tuple(value.shape)}; give ({len(z)}, 1)")
        found: Jets = {(): value}
        firsts = [_slope(column, z) for column in value.unbind(1)]
        for i, *_ in (o for o in rows if len(o) == 1):
            found[i,] = torch.stack([slope[:, i] for slope in firsts], 1)
        for i, j in (o for o in rows if len(o) == 2):
            found[i, j] = torch.stack([_slope(slope[:, i], z)[:, j] for slope in firsts], 1)
    return found if tape else {o: part.detach() for o, part in found.items()}


def _slope(column: Tensor, z: Tensor) -> Tensor:
    """The gradient of each row's number, (n, d), on the tape; 0 of a constant."""
    if not column.requires_grad:
        return torch.zeros_like(z)
    (slope,) = torch.autograd.grad(column.sum(), z, create_graph=True, materialize_grads=True)
    return slope


def scattered(low: Sequence[float], high: Sequence[float], count: int, seed: int = 0) -> Tensor:
    """Points (count, d) that fill a box evenly: Sobol's sequence, scrambled by the seed (Owen 1998)."""
    ends = torch.tensor([list(low), list(high)], dtype=torch.float64)
    share = torch.quasirandom.SobolEngine(len(low), scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return ends[0] + (ends[1] - ends[0]) * share
