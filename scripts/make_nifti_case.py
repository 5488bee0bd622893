"""Make a folder of NIfTI files as a clinic might send it, from the MNI152 brain.

    python scripts/make_nifti_case.py --out FOLDER [--spacing 1 1 3] [--density NAME=FILE]...

The folder holds white.nii.gz, grey.nii.gz, fluid.nii.gz (probabilities) and t1.nii.gz, and for every
--density (a map of u in [0, 1] as simulate.py writes it) a tumour label map NAME.nii.gz in the BraTS
convention. Voxels are anisotropic, axes permuted and flipped on purpose: so the way from a user's files is
exercised.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from solvers.errors import GliodeError
from tumour.anatomy import Anatomy, mni152
from tumour.nifti import Grid, average_onto, read_nifti, reorient, write_nifti

# Least cell density u that a scan shows as: oedema on FLAIR, enhancing on T1Gd, necrotic within it.
OEDEMA, ENHANCING, NECROTIC = 0.16, 0.6, 0.95


def label_map(density: np.ndarray) -> np.ndarray:
    """BraTS labels (2 oedema, 4 enhancing, 1 necrotic) as int16 of cell density u, any shape."""
    bands = (density >= OEDEMA, density >= ENHANCING, density >= NECROTIC)
    return np.select(bands[::-1], (1, 4, 2)).astype(np.int16)


def write_case_folder(
    folder: str | Path,
    anatomy: Anatomy,
    segmentation: Mapping[str, np.ndarray] | None = None,
    orientation: str = "LSP",
) -> list[Path]:
    """Write the anatomy's maps and a label map `<name>.nii.gz` for each density; return the paths.

    segmentation: name -> u (nx, ny, nz) in [0, 1] on the anatomy's grid, labelled by `label_map`
    orientation: where the stored axes point, such as "LPS" (DICOM's) or "LSP"
    Raises GliodeError for an orientation that is none, or a density of another shape.
    """
    if len(orientation) != 3 or any(len(set(pair) & set(orientation)) != 1 for pair in ("LR", "PA", "IS")):
        raise GliodeError(
            f"orientation {orientation}: give one letter each of L/R, P/A and I/S, such as LPS."
        )
    arrays = {"white": anatomy.white, "grey": anatomy.grey, "fluid": anatomy.fluid}
    if anatomy.t1 is not None:
        arrays["t1"] = anatomy.t1
    for name, density in (segmentation or {}).items():
        if np.shape(density) != anatomy.shape:
            raise GliodeError(
                f"{name}: the density has shape {np.shape(density)}, the anatomy {anatomy.shape}."
            )
        arrays[name] = label_map(density)
    paths = []
    for name, array in arrays.items():
        paths.append(Path(folder) / f"{name}.nii.gz")
        write_nifti(paths[-1], *reorient(array, anatomy.affine, orientation))
    return paths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a folder of NIfTI tissue maps and scans from MNI152.")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument(
        "--spacing", type=float, nargs=3, default=[1.0, 1.0, 3.0], metavar="MM", help="R, A, S sides"
    )
    parser.add_argument("--orientation", default="LSP", help="where the stored axes point (default LSP)")
    parser.add_argument(
        "--density", action="append", default=[], metavar="NAME=FILE", help="map of u, any grid"
    )
    options = parser.parse_args(arguments)
    try:
        anatomy = mni152(1.0).resample(options.spacing)
        segmentation = {}
        for pair in options.density:
            name, equals, file = pair.partition("=")
            if not (name and equals):
                raise GliodeError(
                    f"--density {pair}: write NAME=FILE, such as day60=out/maps/density_day60.nii.gz."
                )
            volume = read_nifti(file)
            grid = Grid(anatomy.shape, anatomy.affine)
            segmentation[name] = average_onto(volume.data, volume.grid.affine, grid)
        for path in write_case_folder(options.out, anatomy, segmentation, options.orientation):
            print(path)
    except GliodeError as error:
        print(f"make_nifti_case: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
