"""NIfTI files in and out, checked, and exact volume averages between voxel grids.

A grid is a shape and an affine A (4, 4) from voxel index to RAS millimetres; voxel i fills the brick
A(i - 1/2 ... i + 1/2). What is read comes out in the closest canonical (RAS) orientation: axes are permuted
and flipped, never interpolated, so that a result goes back onto the file's own grid voxel by voxel.
"""

from __future__ import annotations

import gzip
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from scipy import ndimage, sparse

from solvers.errors import GliodeError

MAX_VOXELS = 1_000_000_000  # 8 GB as float64: beyond any head scan, so a broken header or the wrong file
SLACK = 1e-3  # rounding that a stored probability may show beyond [0, 1]
_UNREADABLE = (ImageFileError, HeaderDataError, WrapStructError, OSError, EOFError, ValueError, zlib.error)


@dataclass(frozen=True, eq=False)
class Grid:
    """Voxels of `shape` (nx, ny, nz) placed by `affine` (4, 4): voxel index -> RAS mm."""

    shape: tuple[int, ...]
    affine: np.ndarray


@dataclass(frozen=True, eq=False)
class Volume:
    """A file's float64 `data` on its RAS `grid`; `stored` is the grid in the file's own orientation."""

    data: np.ndarray
    grid: Grid
    stored: Grid
    path: Path


def check_affine(affine: np.ndarray, name: str) -> None:
    """Raise GliodeError naming `name` unless voxels are bricks: finite, not flat, square to 0.06 degrees.

    Sides may differ and the whole may be turned.
    """
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.any(affine[3] != (0, 0, 0, 1)):
        raise GliodeError(
            f"{name}: the affine is not a finite 4x4 matrix ending in 0 0 0 1; repair the header."
        )
    size = voxel_sizes(affine)
    axes = affine[:3, :3] / np.where(size > 0, size, 1)
    if abs(np.linalg.det(axes)) < 1e-3:  # unit columns: 0 when two axes coincide or one has no length
        raise GliodeError(
            f"{name}: the affine is not invertible (voxel size {_triple(size)} mm); repair the header."
        )
    shear = np.abs(axes.T @ axes - np.eye(3)).max()
    if shear > 1e-3:
        raise GliodeError(
            f"{name}: the affine is sheared (cosine {shear:.2g} between voxel axes). Resample the file to"
            " rectangular voxels first, for example with nilearn.image.resample_img(image, numpy.eye(3))."
        )


def read_nifti(path: str | Path) -> Volume:
    """Read a 3-D NIfTI file (.nii or .nii.gz) in any orientation, as float64 in the closest RAS orientation.

    Warns when the header states no orientation. Raises GliodeError naming the file and the way out when it is
    missing, unreadable or truncated, no NIfTI, not 3-D, too large (judged by its header alone), not in
    millimetres, not real-valued, placed by an unusable affine, or holds values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise GliodeError(f"{path}: no such file. Give the path of a NIfTI file (.nii or .nii.gz).")
    try:
        image = nib.load(path, mmap=False)
    except _UNREADABLE as error:
        raise GliodeError(
            f"{path}: not readable as NIfTI ({error}). Copy or export the file again."
        ) from error
    if not isinstance(image, nib.Nifti1Pair):  # also the base of NIfTI-2
        kind = type(image).__name__
        raise GliodeError(
            f"{path}: is {kind}, not NIfTI. Convert it, for example with mri_convert or dcm2niix."
        )
    shape = image.shape
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise GliodeError(
            f"{path}: has shape {shape}, not 3-D. Extract one volume, e.g. nilearn.image.index_img."
        )
    shape = shape[:3]
    if min(shape) < 1 or np.prod(shape, dtype=float) > MAX_VOXELS:
        raise GliodeError(f"{path}: its header claims {shape} voxels. Crop, coarsen or re-export the file.")
    header = image.header
    if int(header["xyzt_units"]) % 8 in (1, 3):  # 0 unknown, 2 mm
        raise GliodeError(f"{path}: the header gives lengths in metres or micrometres; store it in mm.")
    if header.get_data_dtype().kind not in "biuf":
        raise GliodeError(f"{path}: holds {header.get_data_dtype()} values; store one real number a voxel.")
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        warnings.warn(
            f"{path}: the header states no orientation (sform and qform codes are 0): left and right are"
            " a guess; set the sform.",
            stacklevel=2,
        )
    stored = Grid(shape, np.array(image.affine, dtype=np.float64))
    check_affine(stored.affine, str(path))
    try:
        data = np.asarray(image.dataobj, dtype=np.float64).reshape(shape)
        if path.suffix == ".gz":
            _check_sum(path)
    except _UNREADABLE as error:
        raise GliodeError(
            f"{path}: truncated or damaged ({error}). Copy or export the file again."
        ) from error
    bad = int(np.count_nonzero(~np.isfinite(data)))
    if bad:
        raise GliodeError(
            f"{path}: {bad} of {data.size} voxels are NaN or infinite. Set them to 0 if they lie outside"
            " the brain (numpy.nan_to_num); otherwise make the map again."
        )
    data, affine = reorient(data, stored.affine, "RAS")
    return Volume(data, Grid(data.shape, affine), stored, path)


def read_labels(path: str | Path) -> Volume:
    """`read_nifti` for a label map: GliodeError also when a value is not a whole number."""
    volume = read_nifti(path)
    if np.any(volume.data != np.rint(volume.data)):
        raise GliodeError(
            f"{path}: has values that are not whole numbers, so it is no label map. Give labels, resampled by"
            " nearest neighbour only."
        )
    return volume


def read_probability(path: str | Path) -> Volume:
    """`read_nifti` for a probability, rounding clipped: GliodeError also if it leaves [0, 1] or is empty."""
    volume = read_nifti(path)
    low, high = volume.data.min(), volume.data.max()
    if low < -SLACK or high > 1 + SLACK:
        raise GliodeError(
            f"{path}: runs from {low:.4g} to {high:.4g}, but a probability lies in [0, 1]. Divide a map"
            " stored as 0..100 or 0..255 by that number, clip a spline's overshoot, read labels as labels."
        )
    if not high > 0:
        raise GliodeError(f"{path}: the tissue is empty, no voxel is above 0. Check the segmentation.")
    return replace(volume, data=np.clip(volume.data, 0, 1))


def write_nifti(path: str | Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write (nx, ny, nz) values as NIfTI in mm, making the folder: whole numbers as int16, others float32.

    Raises GliodeError for values that are not finite: a result folder is free of NaN.
    """
    array = np.asarray(array)
    if not np.isfinite(array).all():
        raise GliodeError(f"{path}: the array to be written has values that are not finite.")
    image = nib.Nifti1Image(array.astype(np.int16 if array.dtype.kind in "biu" else np.float32), affine)
    image.header.set_xyzt_units("mm")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def reorient(array: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels and their affine, with axes permuted and flipped to point along `codes` ("LPS")."""
    wanted = orientations.axcodes2ornt(tuple(codes))
    change = orientations.ornt_transform(orientations.io_orientation(affine), wanted)
    turned = np.ascontiguousarray(orientations.apply_orientation(array, change))
    return turned, affine @ orientations.inv_ornt_aff(change, array.shape) + 0.0  # no minus zeros


def require_same_grid(first: Volume, other: Volume) -> None:
    """Raise GliodeError naming both files unless shapes agree, and voxel centres to 5 % of a voxel's side."""
    if first.grid.shape != other.grid.shape:
        raise GliodeError(
            f"{first.path} and {other.path}: their shapes disagree, {first.grid.shape} and"
            f" {other.grid.shape} in RAS order. Resample one onto the other's grid."
        )
    corners = np.array(list(product(*((0, n - 1) for n in first.grid.shape))))
    off = np.linalg.norm(
        apply_affine(first.grid.affine, corners) - apply_affine(other.grid.affine, corners), axis=1
    )
    if off.max() > 0.05 * voxel_sizes(first.grid.affine).min():
        raise GliodeError(
            f"{first.path} and {other.path}: their affines disagree by up to {off.max():.3g} mm."
            " Resample one onto the other's grid, or repair the wrong header."
        )


def average_onto(array: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Volume averages, over each voxel of `grid`, of a piecewise constant map, 0 outside it.

    Where the axes of both grids are parallel (any permutation, flips, any spacings) the averages are exact:
    per axis |target cell with source cell| / |target cell|, hence the integral is kept where `grid` covers
    the map and the same grid gives the same bits back. Turned grids: the mean of nearest neighbours at k1 k2
    k3 points in each target voxel, two or more per source voxel passed along each axis.

    array: (nx, ny, nz); returns float64 of grid.shape.
    """
    change = orientations.io_orientation(np.linalg.inv(grid.affine) @ affine)
    affine = affine @ orientations.inv_ornt_aff(change, array.shape)
    array = orientations.apply_orientation(np.asarray(array, dtype=np.float64), change)
    to_source = np.linalg.inv(affine) @ grid.affine  # target voxel index -> source voxel index
    steps, start = np.diag(to_source)[:3], to_source[:3, 3]
    drift = np.abs(to_source[:3, :3] - np.diag(steps)) @ np.array(grid.shape)
    if drift.max() < 1e-2:  # parallel axes: off by under 1 % of a source voxel across the whole grid
        for axis in range(3):
            weights = _overlap(array.shape[axis], grid.shape[axis], start[axis], steps[axis])
            array = _along(weights, array, axis)
        return array
    reach = np.abs(to_source[:3, :3]).max(axis=0)  # source voxels passed along each target axis
    counts = np.maximum(2, np.ceil(2 * reach)).astype(int)
    total = np.zeros(grid.shape)
    for sub in product(*(range(n) for n in counts)):
        shift = (np.array(sub) + 0.5) / counts - 0.5
        offset = start + to_source[:3, :3] @ shift
        total += ndimage.affine_transform(
            array, to_source[:3, :3], offset, output_shape=grid.shape, order=0, mode="grid-constant"
        )
    return total / np.prod(counts)


def listed(values: Sequence[float] | np.ndarray) -> str:
    """The first ten values for a message."""
    return ", ".join(f"{value:g}" for value in values[:10]) + (", ..." if len(values) > 10 else "")


def _overlap(n_source: int, n_target: int, start: float, step: float) -> sparse.csr_matrix:
    """(n_target, n_source): |target cell j with source cell i| / |target cell j|, centres at start + j step.

    Edges within 1e-6 of a source edge are put on it, so that matching grids give weights without rounding.
    """
    edges = start + (np.arange(n_target + 1) - 0.5) * step + 0.5  # source cell i fills [i, i + 1]
    edges = np.where(np.abs(edges - np.rint(edges)) < 1e-6, np.rint(edges), edges)
    left, right = edges[:-1, None], edges[1:, None]
    cell = np.arange(n_source)
    shared = np.clip(np.minimum(right, cell + 1) - np.maximum(left, cell), 0, None)
    return sparse.csr_matrix(shared / (right - left))


def _along(weights: sparse.csr_matrix, array: np.ndarray, axis: int) -> np.ndarray:
    """weights (m, n) applied to one axis of length n."""
    front = np.moveaxis(array, axis, 0)
    out = weights @ front.reshape(front.shape[0], -1)
    return np.ascontiguousarray(np.moveaxis(out.reshape(-1, *front.shape[1:]), 0, axis))


def _check_sum(path: Path) -> None:
    """Read a gzip file to its end, where its checksum is: nibabel stops short and misses damage."""
    with gzip.open(path) as stream:
        while stream.read(1 << 22):
            pass


def _triple(values: np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
