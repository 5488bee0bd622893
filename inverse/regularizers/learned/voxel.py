r"""An energy of volumes on a mesh, through the exact interpolation P to its grid and the transpose:

    R(m) = h^3 R_grid(P m),    R'(m) = h^3 P^T R_grid'(P m),    h the spacing of the grid in mm.

The filters of such an energy are made for one spacing, which the mesh need not have. In L2 with the lumped
mass, modulus and Lipschitz constant are those of R_grid times h^3 gain, ||P m||^2 <= gain ||m||^2.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor

from inverse.regularizers.learned.energy import Energy, Guarantee
from solvers.errors import GliodeError
from solvers.spaces import Diagonal


class Grid(Protocol):
    """P of a mesh: solvers.fem.voxel_grid.VoxelGrid. gain: of ||P m||^2 over the lumped L2 norm's square."""

    space: Diagonal
    shape: tuple[int, int, int]
    spacing: float
    gain: float

    def sample(self, m: Tensor, /) -> Tensor:
        """P m, (batch, *shape), of m (batch, n), the same on every rank; on the tape."""
        ...


class VoxelEnergy(Energy):
    """R of fields (batch, n) of a mesh, by an energy of volumes (batch, x, y, z).

    spacing: that the energy was trained at, in mm (its card's). Raises GliodeError where the grid has
    another, or is too small for the energy's filters.
    """

    def __init__(self, energy: Energy, grid: Grid, spacing: float) -> None:
        super().__init__()
        if not math.isclose(grid.spacing, spacing, rel_tol=0.01):
            raise GliodeError(
                f"voxel energy: trained at {spacing:g} mm, the grid has {grid.spacing:g} mm: make it with "
                f"VoxelGrid(domain, {spacing:g})"
            )
        energy.require_fit(grid.shape)
        self.energy, self.grid, self.spacing = energy, grid, spacing

    def forward(self, x: Tensor) -> Tensor:
        """R(x), (batch,), the same on every rank."""
        return self.spacing**3 * self.energy(self.grid.sample(x))

    def guarantee(self) -> Guarantee:
        """In L2 of the mesh with the lumped mass; never coercive, as a mesh may know more than the grid."""
        of, factor = self.energy.guarantee(), self.spacing**3 * self.grid.gain
        return Guarantee(factor * of.modulus, factor * of.lipschitz, False)

    def settings(self) -> dict[str, Any]:
        """Of the energy of volumes: it is what a file holds."""
        return self.energy.settings()

    def require_fit(self, shape: tuple[int, ...]) -> None:
        """Raise GliodeError unless fields of this shape are of the grid's mesh."""
        if tuple(shape) != self.grid.space.shape:
            raise GliodeError(
                f"voxel energy: fields of shape {tuple(shape)}, its mesh has {self.grid.space.shape}: make "
                "the VoxelGrid of theirs"
            )
