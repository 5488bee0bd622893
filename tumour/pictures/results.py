"""Reading a result folder: result.json and the NIfTI maps, checked, with errors that name the file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from scipy import ndimage

from solvers.errors import GliodeError
from tumour.pictures.style import LEVELS

Array = np.ndarray


class Inapplicable(GliodeError):
    """A picture that this result or this machine does not allow, while others can still be made."""


@dataclass(frozen=True)
class Map:
    """A scalar on a voxel grid: `values` (nx, ny, nz), `affine` (4, 4) from voxel index to RAS mm."""

    values: Array
    affine: Array

    @property
    def voxel_volume(self) -> float:
        """Volume of one voxel, mm^3."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def spacing(self) -> float:
        """Geometric mean of the voxel's sides, mm."""
        return self.voxel_volume ** (1 / 3)

    def index(self, points: Array) -> Array:
        """Fractional voxel indices (..., 3) of RAS points (..., 3) in mm."""
        inverse = np.linalg.inv(self.affine)
        return np.asarray(points @ inverse[:3, :3].T + inverse[:3, 3])

    def points(self, index: Array) -> Array:
        """RAS points (..., 3) in mm of voxel indices (..., 3)."""
        return np.asarray(index @ self.affine[:3, :3].T + self.affine[:3, 3])

    def sample(self, points: Array, order: int = 1, prefilter: bool = True) -> Array:
        """Values at RAS points (..., 3) by splines of the given order; 0 outside the grid.

        `prefilter=False`: the values are spline coefficients already.
        """
        where = np.moveaxis(self.index(points), -1, 0)
        return np.asarray(
            ndimage.map_coordinates(self.values, where, order=order, mode="constant", prefilter=prefilter)
        )

    def volume(self, level: float) -> float:
        """Volume of the voxels with values above `level`, cm^3."""
        return float(np.count_nonzero(self.values > level)) * self.voxel_volume / 1000.0


@dataclass(frozen=True)
class Estimate:
    """One parameter of result.json; `interval` and `truth` are None where the run has none."""

    name: str
    value: float
    unit: str
    interval: tuple[float, float] | None
    truth: float | None


@dataclass(frozen=True)
class Outline:
    """The surface where map `name` equals `edge`: whose it is (`label`) and its imaging level."""

    label: str
    level: float
    name: str
    edge: float


class ResultFolder:
    """What simulate.py or identify.py left in a folder: result.json and maps/*.nii.gz.

    Errors: GliodeError for a folder, file or map that is missing, unreadable, not finite or not 3-D.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise GliodeError(
                f"{self.path}: no such folder; make it with simulate.py or identify.py --out {self.path}"
            )
        report = self.path / "result.json"
        if not report.is_file():
            raise GliodeError(f"{report} is missing: the run has not finished; start it again, it resumes")
        try:
            self.report: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise GliodeError(f"{report} is not valid JSON ({error}); run the case again") from error
        if not isinstance(self.report, dict):
            raise GliodeError(f"{report} is not a mapping of names to values; run the case again")
        self._maps: dict[str, Map] = {}

    @property
    def pictures(self) -> Path:
        """The folder that the pictures go to."""
        return self.path / "pictures"

    @property
    def label(self) -> str:
        """What the density is: 'Recovered' from scans or 'Simulated'."""
        return "Simulated" if self.report.get("kind") == "simulate" else "Recovered"

    def has(self, name: str) -> bool:
        """Is there a maps/NAME.nii.gz?"""
        return self._file(name).is_file()

    def _file(self, name: str) -> Path:
        return self.path / "maps" / f"{name}.nii.gz"

    def map(self, name: str) -> Map:
        """The map maps/NAME.nii.gz, read once."""
        if name not in self._maps:
            file = self._file(name)
            if not file.is_file():
                raise GliodeError(
                    f"{file} is missing: the folder is not a complete result; run the case again"
                )
            try:
                image = nibabel.load(file)
                values = np.asarray(image.dataobj, dtype=np.float64)  # type: ignore[attr-defined]
                affine = np.asarray(image.affine, dtype=np.float64)  # type: ignore[attr-defined]
            except (ImageFileError, OSError, EOFError, ValueError) as error:
                raise GliodeError(f"{file} cannot be read as NIfTI ({error}); run the case again") from error
            if values.ndim != 3:
                raise GliodeError(f"{file} has shape {values.shape}; a map has three axes")
            if not np.isfinite(values).all():
                raise GliodeError(f"{file} holds values that are not finite; run the case again")
            self._maps[name] = Map(values, affine)
        return self._maps[name]

    def days(self, prefix: str, suffix: str = "") -> dict[float, str]:
        """Days of the maps PREFIX_day<T>SUFFIX.nii.gz, ascending, each with its map's name."""
        found = {}
        for file in (self.path / "maps").glob(f"{prefix}_day*{suffix}.nii.gz"):
            match = re.fullmatch(rf"{prefix}_day(-?\d+(?:\.\d+)?){suffix}\.nii\.gz", file.name)
            if match:
                found[float(match.group(1))] = file.name.removesuffix(".nii.gz")
        return dict(sorted(found.items()))

    @cached_property
    def day(self) -> float:
        """The day that single pictures show: the latest with a truth or scan to compare, else the latest."""
        days = self.days("density")
        if not days:
            raise GliodeError(
                f"{self.path}/maps/density_day<T>.nii.gz is missing: nothing to draw; run the case again"
            )
        compared = [day for day in days if len({outline.label for outline in self.outlines(day)}) > 1]
        return max(compared or days)

    def densities(self, day: float) -> dict[str, str]:
        """Names of a day's maps: 'Truth' where the case is synthetic, then 'Recovered' or 'Simulated'."""
        found = {"Truth": self.days("truth"), self.label: self.days("density")}
        return {label: days[day] for label, days in found.items() if day in days}

    def outlines(self, day: float) -> list[Outline]:
        """What a day's pictures compare: truth and recovery or, without a truth, recovery and scan."""
        densities = self.densities(day)
        found = [Outline(label, level, name, level) for label, name in densities.items() for level in LEVELS]
        if "Truth" in densities or self.label == "Simulated":
            return found
        scans = {
            level: self.days("scan", f"_{kind}")
            for level, kind in zip(LEVELS, ("oedema", "enhancing"), strict=True)
        }
        return found + [
            Outline("Scan", level, days[day], 0.5) for level, days in scans.items() if day in days
        ]

    @cached_property
    def estimates(self) -> list[Estimate]:
        """The parameters of result.json."""
        found = []
        for name, entry in self.report.get("estimates", {}).items():
            try:
                bounds, truth = entry.get("interval"), entry.get("truth")
                interval = None if bounds is None else (float(bounds[0]), float(bounds[1]))
                known = None if truth is None else float(truth)
                found.append(
                    Estimate(name, float(entry["value"]), str(entry.get("unit") or ""), interval, known)
                )
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                wanted = "value, unit, interval [low, high] or null, truth or null"
                raise GliodeError(f"{self.path}/result.json: estimates.{name} needs {wanted}") from error
        return found

    def seed(self) -> tuple[Array, Array | None]:
        """Estimated (or given, or the dense part's centre) and true position of the seed, RAS mm, (3,)."""
        found = {estimate.name: estimate for estimate in self.estimates}
        given = self.report.get("parameters") or {}
        rows = [found[name] for name in ("seed_x", "seed_y", "seed_z") if name in found]
        if len(rows) == 3:
            truth = np.array([row.truth for row in rows], dtype=float)
            return np.array([row.value for row in rows]), truth if np.isfinite(truth).all() else None
        if all(isinstance(given.get(axis), int | float) for axis in "xyz"):
            return np.array([float(given[axis]) for axis in "xyz"]), None
        density = self.map(self.days("density")[self.day])
        weights = density.values if density.values.max() > 0 else self.map("brain").values
        index = np.argwhere(weights > 0.5 * weights.max())
        return density.points(index.mean(axis=0)), None
