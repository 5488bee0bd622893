"""Make data/mni152_6mm.vtu: the MNI152 brain as tetrahedra with tissue labels, like a mesh generator's.

    python scripts/make_mesh_case.py [--spacing 6] [--out data/mni152_6mm.vtu]

Each brain voxel of the given side becomes six tetrahedra (Kuhn's split, which fits that of its neighbours),
each labelled 1 (white) or 2 (grey) by the larger fraction at its centroid in the brain at 2 mm.
"""

from __future__ import annotations

import argparse
import sys
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import meshio
import numpy as np

from solvers.errors import GliodeError
from solvers.files import atomic
from tumour.anatomy import Anatomy, mni152

WHITE, GREY = 1, 2
MESH = Path(__file__).resolve().parents[1] / "data" / "mni152_6mm.vtu"


def tetrahedra(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corner indices (points, 3) in voxel corners, and cells (6 voxels, 4), positively oriented."""
    corners = np.array(mask.shape) + 1
    paths = []
    for order in permutations(range(3)):
        path = np.zeros((4, 3), dtype=int)
        for step, axis in enumerate(order, start=1):
            path[step:, axis] = 1
        even = np.linalg.det(path[1:] - path[0]) > 0
        paths.append(path if even else path[[0, 2, 1, 3]])
    at = np.argwhere(mask)[:, None, None, :] + np.array(paths)  # voxels, 6, 4, 3
    number = np.ravel_multi_index(tuple(np.moveaxis(at, -1, 0)), tuple(corners)).reshape(-1, 4)
    used, cells = np.unique(number, return_inverse=True)
    return np.stack(np.unravel_index(used, tuple(corners)), axis=1), cells.reshape(number.shape)


def labelled(brain: Anatomy, detail: Anatomy) -> meshio.Mesh:
    """The brain's mesh in RAS mm, cell data `tissue` taken from the finer anatomy."""
    corner, cells = tetrahedra(brain.brain)
    points = (corner - 0.5) @ brain.affine[:3, :3].T + brain.affine[:3, 3]
    voxel = np.rint(detail.index(points[cells].mean(axis=1))).astype(int)
    voxel = np.clip(voxel, 0, np.array(detail.shape) - 1)
    white, grey = detail.white[tuple(voxel.T)], detail.grey[tuple(voxel.T)]
    tissue = np.where(white > grey, WHITE, GREY).astype(np.int32)
    return meshio.Mesh(points, [("tetra", cells.astype(np.int32))], cell_data={"tissue": [tissue]})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a labelled tetrahedral mesh of the MNI152 brain.")
    parser.add_argument("--spacing", type=float, default=6.0, metavar="MM", help="brick side (default 6)")
    parser.add_argument("--out", type=Path, default=MESH, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        mesh = labelled(mni152(options.spacing), mni152(2.0))
    except GliodeError as error:
        print(f"make_mesh_case: {error}", file=sys.stderr)
        return 2
    with atomic(options.out) as temporary:
        mesh.write(temporary)
    print(f"{options.out}: {len(mesh.points)} points, {len(mesh.cells[0].data)} tetrahedra")
    return 0


if __name__ == "__main__":
    sys.exit(main())
