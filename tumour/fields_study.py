"""From a case with `identify.unknown: field` to the search, and what a result folder gets of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from inverse.uncertainty.low_rank import LowRankLaplace
from solvers.errors import GliodeError
from solvers.fem.mesh import Domain
from tumour import study
from tumour.anatomy import Anatomy
from tumour.case import Case
from tumour.fields import (
    FARTHEST,
    Coefficients,
    FieldMap,
    Name,
    Reference,
    Start,
    smoothed_density,
    vertex_means,
)
from tumour.fields_search import FieldSearch, FieldSettings, FoundFields, Save
from tumour.model import TumourModel
from tumour.patients import Scan, visible
from tumour.results import day_name

SEEN = 0.05  # a field counts as seen where the density has come to this
UNITS: dict[Name, str] = {"D": "mm^2/day", "rho": "1/day"}
EXACT = 2_000  # dofs up to which the prior's pointwise variance is exact
SUB = 4  # points a direction by which a cell's share in a ball is counted


def inclusions(case: Case, domain: Domain) -> dict[Name, Tensor]:
    """The logarithms of the factors, per cell, by which the truth's inclusions change D and rho."""
    assert case.truth is not None
    corners = torch.from_numpy(domain.points)[torch.from_numpy(domain.cell_dofs.astype(np.int64))]
    found: dict[Name, Tensor] = {
        "D": torch.zeros(domain.n_cells, dtype=torch.float64),
        "rho": torch.zeros(domain.n_cells, dtype=torch.float64),
    }
    for ball in case.truth.inclusions:
        share = _share(domain, corners, torch.tensor(ball.centre, dtype=torch.float64), ball.radius)
        if domain.comm.allreduce(float(share.sum())) == 0:
            raise GliodeError(f"truth.inclusions: the ball at {ball.centre} mm does not meet the brain")
        found["D"] += math.log(ball.D) * share
        found["rho"] += math.log(ball.rho) * share
    return found


def _share(domain: Domain, corners: Tensor, centre: Tensor, radius: float) -> Tensor:
    """The share of each cell in a ball, by SUB^3 points on voxels, elsewhere by the cell's centre."""
    middle = corners.mean(1)
    if domain.grid is None:
        return ((middle - centre).norm(dim=1) <= radius).double()
    one = (torch.arange(SUB, dtype=torch.float64) + 0.5) / SUB - 0.5
    steps = torch.cartesian_prod(one, one, one) @ torch.from_numpy(domain.grid.affine[:3, :3].copy()).mT
    near = torch.zeros(domain.n_cells, dtype=torch.float64)
    for step in steps:
        near += ((middle + step - centre).norm(dim=1) <= radius).double() / len(steps)
    return near


def true_coefficients(case: Case, model: TumourModel) -> tuple[Tensor, Tensor]:
    """D per cell and rho (a number, or per owned dof where an inclusion changes it) of the case's truth."""
    assert case.truth is not None
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (case.truth.D_white, case.truth.D_grey)]
    logs = inclusions(case, model.domain)
    D, rho = model.diffusivity(*numbers) * logs["D"].exp(), torch.tensor(case.truth.rho, dtype=torch.float64)
    if any(ball.rho != 1 for ball in case.truth.inclusions):
        rho = rho * vertex_means(model.domain, logs["rho"]).exp()
    return D, rho


@dataclass(frozen=True)
class FieldStudy:
    """The forward map of a case's scans, on the anatomy's own mesh."""

    case: Case
    brain: Anatomy
    model: TumourModel
    forward: FieldMap

    @property
    def coefficients(self) -> Coefficients:
        """The unknown fields."""
        return self.forward.coefficients

    def search(
        self,
        save: Save | None = None,
        resume: Mapping[str, np.ndarray] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> FieldSearch:
        """The search that the case asks for."""
        section = self.case.identify.field
        settings = FieldSettings(
            section.regularizer,
            section.length,
            section.spread,
            section.tau,
            section.max_iterations,
            section.weights,
        )
        return FieldSearch(self.forward, settings, save, resume, progress)

    def states(self, found: FoundFields, days: Sequence[float]) -> dict[float, Tensor]:
        """Densities (owned dofs,) on days from the start on."""
        known = {self.forward.start.day: self.forward.start.u}
        later = [day for day in days if day > self.forward.start.day]
        with torch.no_grad():
            grown = dict(zip(later, self.forward.states(found.m, later), strict=True))
        return {day: u for day, u in (known | grown).items() if day in days}

    def fields(
        self,
        found: FoundFields,
        posterior: LowRankLaplace,
        tick: Callable[[int, int], None] | None = None,
    ) -> dict[str, Tensor]:
        """What is mapped, by name, at the owned dofs: estimate, sd of its logarithm, truth, exceedance."""
        maps: dict[str, Tensor] = {}
        parts, variances = self.coefficients.parts(found.m), self._variances(posterior)
        for name, a in parts.items():
            maps[name] = self._reference(name) * self.coefficients.nodal(a).exp()
            maps[f"{name}_log_sd"] = variances[name].clamp(min=0).sqrt()
        if self.case.synthetic:
            D, rho = true_coefficients(self.case, self.model)
            truth = {"D": vertex_means(self.model.domain, D), "rho": rho.expand(self.model.domain.n_owned)}
            maps |= {f"{name}_truth": truth[name] for name in parts}
        section, last, done = self.case.identify.field, self.forward.days[-1], 0

        def density(m: Tensor) -> Tensor:
            nonlocal done
            done += 1
            if tick is not None:
                tick(done, section.samples)
            return self.forward.states(m.clamp(-FARTHEST, FARTHEST), [last])[0]

        maps[f"exceedance_day{day_name(last)}"] = posterior.exceedance(
            density, section.threshold, section.samples
        )
        return maps

    def _reference(self, name: Name) -> Tensor:
        """At the owned dofs."""
        if name == "D":
            return vertex_means(self.model.domain, self.coefficients.D_reference)
        return self.coefficients.rho(None).expand(self.model.domain.n_owned)

    def _variances(self, posterior: LowRankLaplace) -> dict[Name, Tensor]:
        """Of each field's logarithm at the owned dofs."""
        if self.coefficients.by == "tissue":
            units = torch.eye(posterior.mean.numel(), dtype=torch.float64)
            covariance = torch.stack([posterior.covariance(unit) for unit in units])
            weights = torch.stack([self.coefficients.nodal(unit) for unit in units[:2, :2]], 1)
            blocks = covariance.split(2)
            return {
                name: ((weights @ block[:, 2 * k : 2 * k + 2]) * weights).sum(1)
                for k, (name, block) in enumerate(zip(self.coefficients.of, blocks, strict=True))
            }
        few = self.model.domain.n_global * len(self.coefficients.of) <= EXACT
        variance = posterior.variance(None if few else torch.Generator().manual_seed(0))
        return self.coefficients.parts(variance)

    def record(self, found: FoundFields, fields: Mapping[str, Tensor]) -> dict[str, Any]:
        """The record of result.json but for versions and seconds; fields: as `fields` gives them."""
        domain, comm = self.model.domain, self.model.domain.comm
        with torch.no_grad():
            seen = torch.stack(self.forward.states(found.m)).amax(0) > SEEN
        volume = domain.integral(seen.double())
        rows: dict[str, Any] = {}
        for name in self.coefficients.of:
            u = fields[name]
            inner = u[seen].tolist() or [math.nan]
            rows[name] = {
                "lowest": comm.allreduce(min(inner), MPI.MIN),
                "highest": comm.allreduce(max(inner), MPI.MAX),
                "mean": domain.integral(u * seen) / volume,
                "log_sd": domain.integral(fields[f"{name}_log_sd"] * seen) / volume,
                "unit": UNITS[name],
            }
            if f"{name}_truth" in fields:
                logs = fields[f"{name}_truth"].log()
                rows[name]["log_error"] = math.sqrt(domain.integral((u.log() - logs) ** 2 * seen) / volume)
                gone = (self._reference(name).log() - logs) ** 2
                rows[name]["log_error_of_reference"] = math.sqrt(domain.integral(gone * seen) / volume)
        alphas = list(dict.fromkeys(row["alpha"] for row in found.history))
        history = [
            {
                "iteration": place,
                "stage": alphas.index(row["alpha"]),
                "misfit": row["residual_norm"] ** 2 / 2,
                "gradient_norm": row["gradient_norm"],
            }
            for place, row in enumerate(found.history)
        ]
        rule = "Discrepancy" if self.coefficients.by == "vertex" else "GradientTolerance"
        return {
            "case": self.case.name,
            "kind": "identify",
            "estimates": {},
            "fields": rows,
            "misfit": found.residual_norm**2 / 2,
            "data": found.data,
            "stopping": {"rule": rule, "met": found.met, "alpha": found.alpha, "why": found.why},
            "counts": dict(found.counts),
            "history": history,
            "trail": found.trail,
        }


def restart_of(
    coefficients: Coefficients, memory: Mapping[str, np.ndarray]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A search's memory as states of the mesh and plain values, for `solvers.fem.io.write_restart`."""
    states: dict[str, Tensor] = {}
    record: dict[str, Any] = {}
    for key, value in memory.items():
        if key.endswith(".m") and coefficients.by == "vertex":
            for name, part in coefficients.parts(torch.from_numpy(value)).items():
                states[f"{key}.{name}"] = part
        else:
            record[key] = value.tolist()
    return states, record


def memory_of(
    coefficients: Coefficients, states: Mapping[str, Tensor], record: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The memory that `restart_of` took apart."""
    memory = {key: np.array(value) for key, value in record.items()}
    for key in {name.rpartition(".")[0] for name in states}:
        memory[key] = torch.cat([states[f"{key}.{name}"] for name in coefficients.of]).numpy()
    return memory


def field_study(case: Case, brain: Anatomy, scans: Sequence[Scan]) -> FieldStudy:
    """The map to identify fields by. Raises GliodeError for a start outside the brain."""
    section = case.identify.field
    model = study.model_for(case, study.domain_for(case, brain))
    coefficients = Coefficients(model, section.of, Reference(**section.reference.model_dump()), section.by)
    if section.start is None:
        first = next(s for s in scans if s.day == 0.0 and s.modality.kind == "density")
        start = Start(smoothed_density(model.domain, brain, first), 0.0)
        compared = [scan for scan in scans if scan.day > 0.0]
    else:
        brain.require_inside(section.start.position, "identify.field.start.position")
        place = torch.tensor(section.start.position, dtype=torch.float64)
        start, compared = Start(model.seed_state(place), -section.start.age), list(scans)
    region = visible(brain, scans, case.identify.region)
    return FieldStudy(case, brain, model, FieldMap(coefficients, start, compared, brain, region))
