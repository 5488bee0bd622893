"""From a case's section `locate` to the search, and what a result folder gets of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError
from tumour import case_sections as sections
from tumour import study
from tumour.anatomy import Anatomy
from tumour.case import Case
from tumour.model import TumourModel
from tumour.patients import Scan
from tumour.source import Known, SourceProblem
from tumour.source_foci import distances, relative_error
from tumour.source_posterior import SourcePosterior
from tumour.source_search import Settings, Source


@dataclass(frozen=True)
class Brains:
    """The case's anatomy for the scans and the search, for the defect, and for the truth."""

    coarse: Anatomy
    finer: Anatomy
    truth: Anatomy


def require_locatable(case: Case, name: str) -> None:
    """Raise GliodeError for what locate_source.py cannot go back from."""
    if isinstance(case.anatomy, sections.MeshFile):
        raise GliodeError(f"{name}: anatomy.source: a mesh has no voxels; give mni152, nifti or labels")
    if not any(visit.scans for visit in case.visits):
        raise GliodeError(f"{name}: visits: no scans; name those to go back from")
    if case.therapy:
        raise GliodeError(f"{name}: therapy: the way back through a treatment is not there yet; leave it out")
    known_of(case)


def known_of(case: Case) -> Known:
    """D, rho and the age: those of `locate`, else the truth's."""
    values = {}
    for key in ("D_white", "D_grey", "rho", "age"):
        value = getattr(case.locate, key)
        if value is None and case.truth is None:
            raise GliodeError(f"locate.{key}: missing; without a truth it must be known")
        values[key] = float(value if value is not None else getattr(case.truth, key))
    return Known(**values)


def brains_of(case: Case) -> Brains:
    """The anatomies; voxels of a slice keep their thickness at any refinement."""
    whole = study.anatomy_of(case)
    assert whole is not None
    section = case.locate.slice
    spacing = None if case.truth is None else case.truth.spacing
    if section is None:
        finer = study.anatomy_of(case, whole.spacing / 2)
        truth = whole if spacing is None else study.anatomy_of(case, spacing)
        assert finer is not None and truth is not None
        return Brains(whole, finer, truth)
    point = section.point or (None if case.truth is None else case.truth.position)
    if point is None:
        raise GliodeError("locate.slice.point: missing; name a point of the slice in the brain")
    whole.require_inside(point, "locate.slice.point")
    across = int(np.abs(whole.affine["xyz".index(section.axis), :3]).argmax())

    def layer(side: float | np.ndarray) -> Anatomy:
        sides = np.broadcast_to(side, 3).astype(np.float64).copy()
        sides[across] = whole.spacing[across]
        brain = study.anatomy_of(case, sides)
        assert brain is not None
        return brain.slab(section.axis, point)

    coarse = whole.slab(section.axis, point)
    return Brains(coarse, layer(whole.spacing / 2), coarse if spacing is None else layer(spacing))


def true_centres(case: Case, brain: Anatomy) -> np.ndarray:
    """The true foci (n, 3) in RAS mm; in a slice moved to the middle of its voxels.

    Raises GliodeError for one outside the brain or the slice.
    """
    assert case.truth is not None
    centres = np.array([case.truth.position, *case.truth.foci])
    names = ["truth.position", *(f"truth.foci[{i}]" for i in range(len(case.truth.foci)))]
    for name, centre in zip(names, centres, strict=True):
        brain.require_inside(centre, name)
    if case.locate.slice is not None:
        index, across = brain.index(centres), brain.shape.index(1)
        index[:, across] = 0.0
        centres = index @ brain.affine[:3, :3].T + brain.affine[:3, 3]
    return centres


def source_of(model: TumourModel, centres: np.ndarray) -> Tensor:
    """The sum of the model's seeds at centres (n, 3), (owned dofs,)."""
    with torch.no_grad():
        return torch.stack([model.seed_state(torch.from_numpy(c)) for c in centres]).sum(0)


def settings_of(case: Case) -> Settings:
    """How to search."""
    section = case.locate
    names = ("unknown", "regularizer", "length", "foci", "starts", "tau", "max_iterations", "level")
    weights = None if section.weights is None else str(section.weights)
    return Settings(**{name: getattr(section, name) for name in names}, weights=weights)


def problem_of(case: Case, brains: Brains, scans: list[Scan]) -> SourceProblem:
    """The problem of the case's scans."""
    return SourceProblem(
        known_of(case),
        brains.coarse,
        scans,
        study.law_of(case),
        study.seed_of(case),
        case.model.step,
        case.locate.region,
        brains.finer,
    )


def record_of(
    case: Case, problem: SourceProblem, found: Source, truth: Tensor | None, posterior: SourcePosterior | None
) -> dict[str, Any]:
    """The record of a localisation: result.json but for versions and seconds."""
    centres = None if truth is None else true_centres(case, problem.anatomy)
    first = found.foci[0]
    intervals: dict[str, tuple[float, float]] = {}
    if found.posterior is not None and len(found.foci) == 1:
        intervals = found.posterior.intervals(case.identify.level)
    estimates = {}
    for axis, value in zip("xyz", first.centre, strict=True):
        known = centres is not None and len(centres) == 1
        estimates[f"seed_{axis}"] = {
            "value": value,
            "unit": "mm",
            "interval": list(intervals[f"{axis}1"]) if f"{axis}1" in intervals else None,
            "truth": float(centres[0]["xyz".index(axis)]) if centres is not None and known else None,
        }
    record: dict[str, Any] = {
        "case": case.name,
        "kind": "locate",
        "unknown": found.unknown,
        "estimates": estimates,
        "foci": [asdict(focus) for focus in found.foci],
        "focus": f"connected, of {case.locate.level:g} times the largest density or more; its weighted centre"
        if found.unknown != "points"
        else "a seed of the model's width",
        "known": asdict(problem.growing.known),
        "residual_norm": found.residual_norm,
        "delta": found.delta,
        "data": found.data,
        "level": case.identify.level,
        "stopping": found.stopping,
        "counts": {**found.counts, "forward equivalents": round(found.forward_equivalents, 1)},
        "history": found.history,
        "search": found.first,
    }
    if truth is not None and centres is not None:
        record["truth"] = {
            "centres": centres.tolist(),
            "distances": distances(found.foci, centres),
            "error": relative_error(problem.domain, found.u, truth),
        }
    if posterior is not None:
        record["posterior"] = {
            "directions": posterior.laplace.kept,
            "information": posterior.laplace.information_gain(),
            "newton iterations": posterior.iterations,
            "threshold": posterior.threshold,
        }
    if found.posterior is not None:
        record["points"] = {
            name: {"value": value, "interval": list(found.posterior.intervals(case.identify.level)[name])}
            for name, value in found.posterior.estimates().items()
        }
    return record


def packed(memory: Mapping[str, np.ndarray], size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A search's memory as distributed states (owned dofs,) and a plain record, for a restart file."""
    states, record = {}, {}
    for name, array in memory.items():
        if array.shape == (size,) and array.dtype == np.float64:
            states[name] = torch.from_numpy(array)
        else:
            record[name] = {"dtype": array.dtype.str, "shape": array.shape, "values": array.ravel().tolist()}
    return states, json.loads(json.dumps(record))


def unpacked(states: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The memory again."""
    plain = {
        name: np.array(entry["values"], dtype=entry["dtype"]).reshape(entry["shape"])
        for name, entry in record.items()
    }
    return plain | {name: state.numpy() for name, state in states.items()}
