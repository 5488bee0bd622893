r"""Diffusion on a voxel grid without a matrix: the finite-element operator as shifts of boxes, in torch.

Bricks with the vertex rule couple a vertex to its six neighbours along the axes only, so on the box around
the voxels K(w) is three differences. The weight of an edge along axis a is

    w = (V / h_a^2) (mean of D over the four cells around it, 0 for those outside the domain),

V the volume of a voxel, h_a its side: the numbers of `solvers.fem.operators.DiffusionOperator`, from one D
per cell. States are (batch, X, Y, Z), the box's vertices; 0 outside the domain, where nothing flows. Any
device, float32 and float64; slices only, so that torch.compile can make one loop of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from solvers.errors import GliodeError
from solvers.semidiscrete import Grid

AXES = (1, 2, 3)


class VoxelOperator:
    """K(w) and the lumped mass M of a voxel grid, and what `solvers.node.science.batched` needs of them.

    fields: (K, cells), from which `weights` makes D = sum_k theta_k field_k; None: D is a field itself.
    compiled: fuse each stage by torch.compile, for CUDA; its first call takes a minute. Raises GliodeError
    for fields that do not fit, for cells or vertices that are none of the grid.
    """

    def __init__(
        self,
        grid: Grid,
        fields: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        compiled: bool = False,
    ) -> None:
        if fields is not None and (fields.ndim != 2 or fields.shape[1] != len(grid.voxel)):
            raise GliodeError(f"fields: shape {tuple(fields.shape)}, expected (K, {len(grid.voxel)} cells)")
        low = grid.voxel.amin(0)
        sides = (grid.voxel.amax(0) - low + 1).tolist()
        self.cells, self.shape = tuple(sides), tuple(side + 1 for side in sides)
        self.dtype, self.n = dtype, len(grid.corner)
        self.spacing = torch.linalg.vector_norm(grid.affine[:3, :3].double(), dim=0).tolist()
        self.volume = self.spacing[0] * self.spacing[1] * self.spacing[2]
        voxel, corner = (grid.voxel - low).long().cpu(), (grid.corner - low).long().cpu()
        touched = pad(
            _box(torch.ones(1, len(voxel)).double(), _flat(voxel, self.cells), self.cells), (1,) * 6
        )
        for axis in AXES:
            touched = _pairs(touched, axis)
        mass = (self.volume / 8) * touched[0]
        inside = ((corner >= 0) & (corner < torch.tensor(self.shape))).all(1)
        if not bool(inside.all()) or len(corner) != int((mass > 0).sum()):
            raise GliodeError("grid: its vertices are not the corners of its voxels")
        self._cell = _flat(voxel, self.cells).to(device)
        self._vertex = _flat(corner, self.shape).to(device)
        self.mass = mass.to(device, dtype)
        self._inverse_mass = torch.where(mass > 0, 1.0 / mass, 0.0).to(device, dtype)
        self._fields = None if fields is None else fields.to(device, dtype)
        self._compiled = compiled
        self._stage: Any = torch.compile(_stage) if compiled else _stage

    # ---- The operator -------------------------------------------------------------------------------------

    def conductances(self, D: Tensor) -> tuple[Tensor, ...]:
        """The weights of the edges along each axis, (batch, X, Y, Z) less one along it; D: (batch, cells),
        mm^2/day.
        """
        if D.ndim != 2 or D.shape[1] != len(self._cell):
            raise GliodeError(f"D: shape {tuple(D.shape)}, expected (batch, {len(self._cell)} cells)")
        box, found = _box(D, self._cell, self.cells), []
        for axis in AXES:
            around = box
            for other in AXES:
                if other != axis:
                    around = _pairs(pad(around, _ends(other, 1, 1)), other)
            found.append(around * (self.volume / (4.0 * self.spacing[axis - 1] ** 2)))
        return tuple(found)

    def stiffness(self, w: Sequence[Tensor], u: Tensor) -> Tensor:
        """K(w) u, dual, (batch, X, Y, Z); on the tape."""
        return _stiffness(u, *w)

    def box(self, u: Tensor) -> Tensor:
        """States (batch, n) as boxes."""
        return _box(u, self._vertex, self.shape)

    def states(self, box: Tensor) -> Tensor:
        """Boxes as states (batch, n)."""
        return box.flatten(1).index_select(1, self._vertex)

    # ---- What the flow and the cohort need ----------------------------------------------------------------

    @property
    def together(self) -> int | None:
        """Tumours that go together: all."""
        return None

    def weights(self, theta: Tensor) -> tuple[Tensor, ...]:
        """The conductances of D = sum_k theta_k field_k, theta (batch, K)."""
        return self.conductances(theta if self._fields is None else theta @ self._fields)

    def numbers(self, values: Tensor) -> Tensor:
        """A number for each tumour (batch,), to broadcast with states."""
        return values.view(-1, 1, 1, 1)

    def split(self, u: Tensor) -> list[Any]:
        """The parts of a batch that go their own ways: one."""
        return [...]

    def bound(self, *w: Tensor) -> Tensor:
        """A bound of each tumour's eigenvalues of M^-1 K(w), (batch, 1, 1, 1), 1/day (Gershgorin)."""
        rows = sum(
            pad(x.abs() + x, _ends(axis, 0, 1)) + pad(x.abs() + x, _ends(axis, 1, 0))
            for axis, x in zip(AXES, w, strict=True)
        )
        if any(bool((x < 0).any()) for x in w):
            raise GliodeError("diffusion: D is negative somewhere")
        return (self._inverse_mass * rows).amax(AXES, keepdim=True)

    @torch.no_grad()
    def advance(
        self,
        weights: Sequence[Tensor],
        a: Tensor,
        base: Tensor | None,
        coefficients: Tensor,
        u: Tensor | None = None,
        transposed: bool = False,
        products: tuple[Tensor, Sequence[Tensor]] | None = None,
        spare: Tensor | None = None,
    ) -> Tensor:
        """g base + f a - t L a + h u, in memory of its own; see `batched.Operator`."""
        g, f, t, h, c = coefficients.unbind(0)
        if self._compiled:
            # One graph for all stages: what is absent is there with the factor 0; aliases and views, of which
            # torch makes graphs of their own, are detached.
            g, base = (torch.zeros_like(g), a) if base is None else (g, base)
            h, u = (torch.zeros_like(h), a) if u is None else (h, u)
            a, base, u, *weights = (x.detach() for x in (a, base, u, *weights))
        z: Tensor = self._stage(a, base, u, self._inverse_mass, g, f, t, h, transposed, *weights)
        if products is not None:
            y, totals = products
            b = self._inverse_mass * a
            for axis, total in zip(AXES, totals, strict=True):
                total.addcmul_(c * b.diff(dim=axis), y.diff(dim=axis))
        return z

    def rate(self, weights: Sequence[Tensor], u: Tensor) -> Tensor:
        """M^-1 K(w) u on the tape."""
        return self._inverse_mass * _stiffness(u, *weights)


def _stiffness(u: Tensor, *w: Tensor) -> Tensor:
    parts = []
    for axis, x in zip(AXES, w, strict=True):
        flux = pad(x * u.diff(dim=axis), _ends(axis, 1, 1))
        parts.append(flux.diff(dim=axis))
    return -(parts[0] + parts[1] + parts[2])


def _stage(
    a: Tensor,
    base: Tensor | None,
    u: Tensor | None,
    inverse_mass: Tensor,
    g: Tensor,
    f: Tensor,
    t: Tensor,
    h: Tensor,
    transposed: bool,
    *w: Tensor,
) -> Tensor:
    """One expression for the whole stage, so that a compiler can make one pass over memory of it."""
    rate = _stiffness(inverse_mass * a, *w) if transposed else inverse_mass * _stiffness(a, *w)
    z = f * a - t * rate
    if base is not None:
        z = z + g * base
    return z if u is None else z + h * u


def _ends(axis: int, before: int, after: int) -> list[int]:
    """The widths for torch's pad of zeros at the ends of one axis of a (batch, X, Y, Z)."""
    widths = [0] * 6
    widths[2 * (3 - axis)], widths[2 * (3 - axis) + 1] = before, after
    return widths


def _pairs(x: Tensor, axis: int) -> Tensor:
    """Sums of neighbours along an axis."""
    size = x.shape[axis] - 1
    return x.narrow(axis, 0, size) + x.narrow(axis, 1, size)


def _flat(index: Tensor, shape: Sequence[int]) -> Tensor:
    """(k, 3) places in a box as (k,) places in its flat form."""
    return (index[:, 0] * shape[1] + index[:, 1]) * shape[2] + index[:, 2]


def _box(values: Tensor, place: Tensor, shape: Sequence[int]) -> Tensor:
    """(batch, k) values at their places of boxes (batch, *shape), 0 elsewhere."""
    empty = values.new_zeros(len(values), shape[0] * shape[1] * shape[2])
    return empty.index_copy(1, place, values).view(-1, *shape)
