"""The channel with a cylinder of the DFG benchmarks (Schäfer & Turek 1996), meshed by quadrilaterals.

The channel is [0, 2.2] x [0, 0.41], the cylinder has radius 0.05 around (0.2, 0.2). Four blocks lead from the
cylinder to the sides of [0, 0.41]^2, one goes on downstream. Nine nodes a cell: edges on the cylinder are
curved.
"""

from __future__ import annotations

from typing import Any

import basix.ufl
import dolfinx
import numpy as np
import ufl
from mpi4py import MPI

from solvers.errors import GliodeError
from solvers.fem.compat import cell_partitioner

LENGTH, HEIGHT, RADIUS, CENTRE = 2.2, 0.41, 0.05, (0.2, 0.2)

Array = np.ndarray[Any, np.dtype[Any]]


def cylinder_channel(n: int, comm: MPI.Comm = MPI.COMM_SELF) -> dolfinx.mesh.Mesh:
    """The channel with n cells along each quarter of the cylinder and across the channel downstream.

    About 6.5 n^2 cells. n even, so that (0.15, 0.2) and (0.25, 0.2), where the benchmark takes the
    pressure, are vertices.
    """
    if n < 4 or n % 2:
        raise GliodeError(f"cylinder: n must be even and at least 4, got {n}")
    blocks = _blocks(n) if comm.rank == 0 else []
    element = basix.ufl.element("Lagrange", "quadrilateral", 2, shape=(2,))
    points, cells = _merge(blocks) if blocks else (np.zeros((0, 2)), np.zeros((0, 9), np.int64))
    ghosts = cell_partitioner(dolfinx.mesh.GhostMode.none)
    return dolfinx.mesh.create_mesh(comm, cells=cells, x=points, e=ufl.Mesh(element), partitioner=ghosts)


def on_cylinder(x: Array) -> Any:
    """Points (2 or 3, n) on the cylinder."""
    return np.hypot(x[0] - CENTRE[0], x[1] - CENTRE[1]) < RADIUS * (1 + 1e-6)


def at_inflow(x: Array) -> Any:
    """Points at x = 0."""
    return np.isclose(x[0], 0.0)


def not_outflow(x: Array) -> Any:
    """Points of the boundary off the outflow, the corners of which belong to the walls."""
    return (x[0] < LENGTH - 1e-9) | np.isclose(x[1], 0.0) | np.isclose(x[1], HEIGHT)


def _blocks(n: int) -> list[Array]:
    """Nodes of each block, (2 a + 1, 2 b + 1, 2)."""
    s = np.linspace(0.0, 1.0, 2 * n + 1)[:, None]
    radial = _graded(n, 2.2)[None, :, None]
    corners = [(HEIGHT, 0.0), (HEIGHT, HEIGHT), (0.0, HEIGHT), (0.0, 0.0)]
    result = []
    for k in range(4):
        angle = np.pi / 2 * (k - 0.5 + s)
        inner = np.array(CENTRE) + RADIUS * np.concatenate([np.cos(angle), np.sin(angle)], 1)
        outer = (1 - s) * np.array(corners[k]) + s * np.array(corners[(k + 1) % 4])
        # Radial lines first, counter-clockwise second: positively oriented cells.
        result.append(np.swapaxes((1 - radial) * inner[:, None] + radial * outer[:, None], 0, 1))
    x = HEIGHT + (LENGTH - HEIGHT) * _graded(5 * n // 2, 1.0)
    y = HEIGHT * s[:, 0]
    return [*result, np.stack(np.meshgrid(x, y, indexing="ij"), -1)]


def _graded(cells: int, growth: float) -> Array:
    """2 cells + 1 nodes on [0, 1]; the last cell is exp(growth) times the first."""
    return np.expm1(growth * np.linspace(0.0, 1.0, 2 * cells + 1)) / np.expm1(growth)


def _merge(blocks: list[Array]) -> tuple[Array, Array]:
    """Points (n, 2) and cells (m, 9), with what blocks share given once."""
    points = np.concatenate([b.reshape(-1, 2) for b in blocks])
    _, first, number = np.unique(points.round(9), axis=0, return_index=True, return_inverse=True)
    number, cells, offset = number.reshape(-1), [], 0
    # Basix: vertices, then the edges (0, 1), (0, 2), (1, 3), (2, 3), then the inside.
    places = [(0, 0), (2, 0), (0, 2), (2, 2), (1, 0), (0, 1), (2, 1), (1, 2), (1, 1)]
    for block in blocks:
        grid = offset + np.arange(block[..., 0].size).reshape(block.shape[:2])
        a, b = (size - 1 for size in grid.shape)
        corner = np.stack([grid[i : i + a : 2, j : j + b : 2] for i, j in places], -1)
        cells.append(number[corner.reshape(-1, 9)])
        offset += grid.size
    return points[first], np.concatenate(cells).astype(np.int64)
