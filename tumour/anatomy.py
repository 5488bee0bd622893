"""The brain a tumour grows in: tissue fractions on a voxel grid, from MNI152 or from a user's NIfTI files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage

from solvers.errors import GliodeError
from tumour.nifti import (
    MAX_VOXELS,
    Grid,
    Volume,
    average_onto,
    check_affine,
    listed,
    read_labels,
    read_nifti,
    read_probability,
    require_same_grid,
    write_nifti,
)

FAST_LABELS: Mapping[str, int] = {"fluid": 1, "grey": 2, "white": 3}  # the numbers of FSL's FAST
BRAIN_FRACTION = 0.5  # a voxel is brain when white + grey reach this
KEPT_FRACTION = 0.9  # of the brain's voxels, at least, must hang together


@dataclass(frozen=True, eq=False, repr=False)
class Anatomy:
    """Tissue fractions on a voxel grid, checked when made; the arrays are read-only.

    white, grey, fluid: (nx, ny, nz) volume fractions in [0, 1], their sum at most 1
    affine: (4, 4) voxel index -> RAS mm, voxels rectangular; axes as near to R, A, S as the scan allows
    t1: (nx, ny, nz) or None, for pictures; source: where it comes from, named in errors
    stored: the grid, in its own orientation, of the files read; `write` puts results there
    brain: (nx, ny, nz) bool, white + grey >= 0.5, the largest face-connected component

    Raises GliodeError when a check fails, no voxel is brain, or the largest component is under 90 % of it.
    """

    white: np.ndarray
    grey: np.ndarray
    fluid: np.ndarray
    affine: np.ndarray
    t1: np.ndarray | None = None
    source: str = "anatomy"
    stored: Grid | None = None
    brain: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._keep("affine", np.array(self.affine, dtype=np.float64))
        check_affine(self.affine, self.source)
        for name in ("white", "grey", "fluid", "t1"):
            value = getattr(self, name)
            if value is None and name == "t1":
                continue
            array = np.asarray(value, dtype=np.float64)
            if array.ndim != 3 or array.shape != np.shape(self.white):
                shapes = f"{array.shape}, white {np.shape(self.white)}"
                raise GliodeError(f"{self.source}: {name} has shape {shapes}; give 3-D arrays of one shape.")
            if not np.isfinite(array).all():
                raise GliodeError(f"{self.source}: {name} has values that are not finite.")
            if name != "t1" and not (array.min() >= 0 and array.max() <= 1 + 1e-9):
                raise GliodeError(
                    f"{self.source}: {name} runs from {array.min():.3g} to {array.max():.3g}, not in [0, 1]."
                )
            self._keep(name, array)
        most = (self.white + self.grey + self.fluid).max()
        if most > 1 + 1e-9:
            raise GliodeError(
                f"{self.source}: white + grey + fluid reach {most:.6g}; scale them to at most 1."
            )
        self._keep("brain", _largest(self.white + self.grey >= BRAIN_FRACTION, self.source))

    def _keep(self, name: str, array: np.ndarray) -> None:
        view = array.view()
        view.flags.writeable = False
        object.__setattr__(self, name, view)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.white.shape

    @property
    def spacing(self) -> np.ndarray:
        """(3,) voxel sides in mm."""
        return voxel_sizes(self.affine)

    def index(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) RAS mm -> (..., 3) real voxel coordinates; voxel i reaches from i - 1/2 to i + 1/2."""
        return apply_affine(np.linalg.inv(self.affine), np.asarray(points, dtype=np.float64))

    def contains(self, points: np.ndarray) -> np.ndarray:
        """(n, 3) RAS mm -> (n,) bool: lies in a brain voxel. Points that are not finite do not."""
        index = self.index(points)
        index = np.floor(np.where(np.isfinite(index), index, -2) + 0.5)
        on_grid = np.all((index >= 0) & (index < self.shape), axis=-1)
        voxel = np.where(on_grid[..., None], index, 0).astype(np.int64)
        return on_grid & self.brain[tuple(np.moveaxis(voxel, -1, 0))]

    def require_inside(self, point: Sequence[float] | np.ndarray, name: str) -> None:
        """Raise GliodeError, naming the key and the nearest brain voxel, unless `point` (RAS mm) is in."""
        where = np.asarray(point, dtype=np.float64)
        if where.shape != (3,) or not np.isfinite(where).all():
            raise GliodeError(
                f"{name}: {point} is no point; give three finite coordinates x, y, z in RAS mm."
            )
        if not self.contains(where):
            centres = apply_affine(self.affine, np.argwhere(self.brain))
            nearest = centres[np.linalg.norm(centres - where, axis=1).argmin()]
            gap = np.linalg.norm(nearest - where)
            raise GliodeError(
                f"{name}: {_point(where)} mm lies outside the brain of {self.source}; the nearest brain"
                f" voxel, {gap:.1f} mm away, is centred at {_point(nearest)} mm."
            )

    def coarsen(self, factor: int) -> Anatomy:
        """Exact means over factor^3 blocks from voxel (0, 0, 0) on, zeros past the far faces."""
        if isinstance(factor, bool) or not isinstance(factor, int | np.integer) or factor < 1:
            raise GliodeError(f"coarsening factor {factor}: give a whole number, 1 or more.")
        return self._zoomed(np.full(3, float(factor)))

    def resample(self, spacing: float | Sequence[float] | np.ndarray) -> Anatomy:
        """Exact volume averages on voxels of `spacing` mm (one or three numbers): same axes, same corner.

        The far faces are padded with zeros to whole voxels, so volumes are kept. A finer spacing repeats the
        averages it has; it invents no detail.
        """
        sides = np.asarray(spacing, dtype=np.float64)
        if sides.shape not in ((), (3,)) or not (np.isfinite(sides).all() and np.all(sides > 0)):
            raise GliodeError(f"spacing {spacing}: give one or three voxel sides in mm, above 0.")
        return self._zoomed(sides / self.spacing)

    def slab(self, axis: str, point: Sequence[float] | np.ndarray) -> Anatomy:
        """The layer of voxels at `point` (RAS mm, in the brain) across `axis`, "x", "y" or "z".

        One voxel thick: without flux through its faces what grows in it is two-dimensional. Of the brain it
        keeps the part that hangs together with the point's voxel inside the layer.
        """
        if axis not in ("x", "y", "z"):
            raise GliodeError(f"slice axis {axis!r}: give x (sagittal), y (coronal) or z (axial)")
        self.require_inside(point, "slice")
        across = int(np.abs(self.affine["xyz".index(axis), :3]).argmax())
        at = np.floor(self.index(np.asarray(point)) + 0.5).astype(np.int64)
        layer = tuple(slice(k, k + 1) if a == across else slice(None) for a, k in enumerate(at))
        names, _ = ndimage.label(self.brain[layer])
        at[across] = 0
        kept = names == names[tuple(at)]
        affine = self.affine.copy()
        first = np.array([s.start or 0 for s in layer])
        affine[:3, 3] += affine[:3, :3] @ first
        white, grey = (np.where(kept, part[layer], 0.0) for part in (self.white, self.grey))
        t1 = None if self.t1 is None else self.t1[layer]
        return replace(self, white=white, grey=grey, fluid=self.fluid[layer], affine=affine, t1=t1)

    def _zoomed(self, zoom: np.ndarray) -> Anatomy:
        """New voxels `zoom` (3,) times as long; the grid keeps its corner at voxel coordinates -1/2."""
        affine = np.eye(4)
        affine[:3, :3] = self.affine[:3, :3] * zoom
        affine[:3, 3] = self.affine[:3, 3] + self.affine[:3, :3] @ (zoom - 1) / 2
        shape = tuple(max(1, math.ceil(n / z - 1e-6)) for n, z in zip(self.shape, zoom, strict=True))
        if math.prod(shape) > MAX_VOXELS:
            raise GliodeError(
                f"{self.source}: resampling to {shape} voxels is too fine; give a larger spacing."
            )
        grid = Grid(shape, affine)
        white, grey, fluid = (
            average_onto(part, self.affine, grid) for part in (self.white, self.grey, self.fluid)
        )
        t1 = None if self.t1 is None else average_onto(self.t1, self.affine, grid)
        return replace(self, white=white, grey=grey, fluid=fluid, affine=affine, t1=t1)

    def write(self, path: str | Path, array: np.ndarray) -> None:
        """Write a result (nx, ny, nz) as NIfTI on the grid and in the orientation of the files read.

        Voxel by voxel; where the anatomy was coarsened or resampled, as exact volume averages.
        """
        if np.shape(array) != self.shape:
            raise GliodeError(f"{path}: the array has shape {np.shape(array)}, the anatomy {self.shape}.")
        grid = self.stored or Grid(self.shape, self.affine)
        write_nifti(path, average_onto(array, self.affine, grid), grid.affine)


def mni152(spacing: float) -> Anatomy:
    """The MNI152 brain (ICBM 2009a, nonlinear, symmetric; inside nilearn, no network) at `spacing` >= 1 mm.

    Exact volume averages of the 1 mm maps of white and grey matter; fluid = 1 - white - grey in nilearn's
    mask. Source: Fonov et al., NeuroImage 54 (2011) 313. Raises GliodeError below 1 mm.
    """
    if not (math.isfinite(spacing) and spacing >= 1):
        raise GliodeError(f"spacing {spacing}: MNI152 comes in voxels of 1 mm; give a spacing of 1 or more.")
    from nilearn import datasets  # here: importing it takes a second

    template = datasets.load_mni152_template(resolution=1)
    t1, grey, white, mask = (
        np.asarray(image.dataobj, dtype=np.float64)
        for image in (
            template,
            datasets.load_mni152_gm_template(resolution=1),
            datasets.load_mni152_wm_template(resolution=1),
            datasets.load_mni152_brain_mask(resolution=1),
        )
    )
    white, grey, _ = _normalised(white, grey, np.zeros_like(white))
    fluid = np.where(mask > 0, np.clip(1 - white - grey, 0, None), 0.0)
    fine = Anatomy(white, grey, fluid, template.affine, t1, source="MNI152")
    return fine if spacing == 1 else fine.resample(spacing)


def from_nifti(
    white: str | Path, grey: str | Path, fluid: str | Path | None = None, t1: str | Path | None = None
) -> Anatomy:
    """Tissue probability maps in [0, 1] on one grid, in any orientation and with any voxel sizes.

    Without `fluid` it is what white and grey leave inside the brain and the cavities closed in by it. Sums
    above 1 are scaled to 1. Warns when islands apart from the largest component are left out of the brain.
    Raises GliodeError naming the file: see tumour.nifti.read_nifti; also for values outside [0, 1], an empty
    tissue, shapes or affines that disagree, sums over 1 by more than 1 % of the whole, and a brain in pieces.
    """
    paths = {"white": white, "grey": grey, "fluid": fluid}
    maps = {name: read_probability(path) for name, path in paths.items() if path is not None}
    return _assemble({name: volume.data for name, volume in maps.items()}, list(maps.values()), t1)


def from_labels(
    path: str | Path, labels: Mapping[str, int | Sequence[int]] = FAST_LABELS, t1: str | Path | None = None
) -> Anatomy:
    """One label map of tissues; `labels` gives the number, or numbers, of white, grey and (optionally) fluid.

    The default is FSL FAST's. Fluid, warnings and errors as in `from_nifti`; also for names in `labels` that
    are no tissue, values that are not whole numbers, and labels that no voxel has.
    """
    if not {"white", "grey"} <= set(labels) <= {"white", "grey", "fluid"}:
        raise GliodeError(
            f"labels {dict(labels)}: give the numbers of white, grey and (where it has one) fluid."
        )
    volume = read_labels(path)
    parts = {}
    for name, numbers in labels.items():
        parts[name] = np.isin(volume.data, np.atleast_1d(numbers)).astype(np.float64)
        if not parts[name].any():
            raise GliodeError(
                f"{path}: no voxel has the label {numbers} of {name}; the file holds"
                f" {listed(np.unique(volume.data))}. Correct `labels`."
            )
    return _assemble(parts, [volume], t1)


def read_segmentation(path: str | Path, anatomy: Anatomy) -> dict[str, np.ndarray]:
    """A tumour label map in the BraTS convention as fractions (nx, ny, nz) in [0, 1] on the anatomy's grid.

    1 necrotic (and non-enhancing) core, 2 oedema, 4 enhancing (3 in releases since 2023). The classes are
    disjoint: the core is enhancing + necrotic, the whole tumour the sum of all three. Each is the volume
    average (tumour.nifti.average_onto) of its indicator in world coordinates: exact when the axes are
    parallel, supersampled when turned. Raises GliodeError for a file not readable, other labels, both 3 and
    4, no tumour, and a tumour of which under half lies in the brain.
    """
    volume = read_labels(path)
    found = set(np.unique(volume.data).astype(int).tolist())
    if not found <= {0, 1, 2, 3, 4} or {3, 4} <= found:
        raise GliodeError(
            f"{path}: holds the labels {listed(sorted(found))}, not those of BraTS: 1 necrotic, 2 oedema,"
            " 4 enhancing (or 3, not both: 4 is a resection cavity in 2024). Relabel it."
        )
    if found == {0}:
        raise GliodeError(f"{path}: no voxel is labelled as tumour. Give one with labels 1, 2, 4 (or 3).")
    grid = Grid(anatomy.shape, anatomy.affine)
    kinds = {"enhancing": (3, 4), "necrotic": (1,), "oedema": (2,)}
    parts = {
        kind: average_onto(np.isin(volume.data, labels), volume.grid.affine, grid)
        for kind, labels in kinds.items()
    }
    head = _filled(anatomy.brain | (anatomy.fluid >= BRAIN_FRACTION))
    inside = sum(float(part[head].sum()) for part in parts.values()) * np.prod(anatomy.spacing)
    volume_mm3 = np.count_nonzero(volume.data) * np.prod(voxel_sizes(volume.grid.affine))
    if inside < 0.5 * volume_mm3:
        raise GliodeError(
            f"{path}: only {100 * inside / volume_mm3:.0f} % of the tumour lies in the brain of"
            f" {anatomy.source}. Register both to one space; check their affines."
        )
    return {kind: np.clip(part, 0, 1) for kind, part in parts.items()}


def _assemble(parts: Mapping[str, np.ndarray], maps: Sequence[Volume], t1: str | Path | None) -> Anatomy:
    """Check that all files share a grid, fill in the fluid, scale sums to <= 1, report islands."""
    scan = None if t1 is None else read_nifti(t1)
    for other in [*maps[1:], *([scan] if scan else [])]:
        require_same_grid(maps[0], other)
    files = ", ".join(str(volume.path) for volume in maps)
    white, grey = parts["white"], parts["grey"]
    fluid = parts.get("fluid")
    if fluid is None:
        inside = _filled(white + grey >= BRAIN_FRACTION)
        fluid = np.where(inside, np.clip(1 - white - grey, 0, None), 0.0)
    total = white + grey + fluid
    excess = np.clip(total - 1, 0, None).sum() / total.sum()
    if excess > 0.01:
        raise GliodeError(
            f"{files}: the probabilities add up to more than 1 ({100 * excess:.0f} % in excess)."
            " Is one file given twice, or a map of something else?"
        )
    white, grey, fluid = _normalised(white, grey, fluid)
    t1_data = None if scan is None else scan.data
    anatomy = Anatomy(white, grey, fluid, maps[0].grid.affine, t1_data, files, maps[0].stored)
    brain = anatomy.white + anatomy.grey >= BRAIN_FRACTION
    dropped = np.count_nonzero(brain & ~anatomy.brain)
    if dropped > 0:
        warnings.warn(
            f"{files}: {dropped} voxels in islands apart from the brain are left out.", stacklevel=3
        )
    return anatomy


def _normalised(
    white: np.ndarray, grey: np.ndarray, fluid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    total = np.maximum(white + grey + fluid, 1.0)
    return white / total, grey / total, fluid / total


def _largest(mask: np.ndarray, source: str) -> np.ndarray:
    """The largest face-connected component of the brain mask."""
    names, count = ndimage.label(mask)
    if count == 0:
        raise GliodeError(
            f"{source}: no voxel is half white or grey matter. Check the maps, or use finer voxels."
        )
    sizes = np.bincount(names.ravel())[1:]
    if sizes.max() < KEPT_FRACTION * sizes.sum():
        raise GliodeError(
            f"{source}: the brain is in {count} pieces, the largest {100 * sizes.max() / sizes.sum():.0f} %"
            " of it. Repair the segmentation, or use finer voxels."
        )
    return names == 1 + int(sizes.argmax())


def _filled(mask: np.ndarray) -> np.ndarray:
    """The mask with the cavities that no path of faces joins to the outside."""
    names, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    return (names != names[0, 0, 0])[1:-1, 1:-1, 1:-1]


def _point(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.1f}" for value in values) + ")"
