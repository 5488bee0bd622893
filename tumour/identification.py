"""From scans to the tumour's parameters: where it started, how fast it spreads and grows, how old it is, how
sure.

Unknowns m = (log D_white, log D_grey, log rho, x, y, z, log age), a Gaussian prior in m, and scans F(m) +
noise on the grid of an anatomy of spacing h. The estimate is the posterior's maximum, found by
Levenberg-Marquardt first on a mesh of spacing 2h (a seventh of the cost, several starting seeds), there again
with the defect F_h - F_2h, then on h.

Discretisation error. A front of width sqrt(D/rho) is only a few voxels thick, so that a mesh's own error can
exceed that of the data. It is estimated, at the estimate, from e = F_h - F_2h. Measured on synthetic tumours
(not those of the benchmark) against meshes of h/2, F - F_h is near e/3 (Richardson's factor for order 2) with
a rest of about 0.4 |e| that is alike in all images of a patient and over centimetres. So the likelihood
compares

    y  with  F_h(m) + e/3,   variance sd^2 + (0.4 a)^2,   a the local root mean square of e,

and what is alike enters the posterior as a covariance E E^T of the residuals: a (0.6 x bumps of 16 and of 32
mm), and e/6 for the factor 1/3. It inflates the posterior through the Godambe information of the estimate, H
(H + J^T E E^T J)^-1 H with H = J^T J, in place of H (Varin, Reid & Firth 2011; for discretisation error in
inverse problems Kaipio & Somersalo 2007). Weighing the data by the inverse of I + E E^T instead made
intervals too short: it trusts the shape of E more than its size deserves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.cluster import vq
from scipy.special import ndtri
from torch import Tensor

from inverse.optimizers import gauss_newton
from inverse.optimizers.iteration import Result
from inverse.problem import LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import GradientTolerance, MaxIterations, State, StepTolerance
from inverse.uncertainty import Combination, Laplace
from solvers.errors import GliodeError
from solvers.fem.diffusion import Scheme
from solvers.spaces import GramSpace
from tumour.anatomy import Anatomy
from tumour.growth import GrowthLaw
from tumour.model import PARAMETERS, UNITS, Seed, TumourModel, domain_of
from tumour.patients import Scan, camera, visible
from tumour.therapy import Treatment

LOGARITHMIC = ("D_white", "D_grey", "rho", "age")
MEAN, MEAN_SD, LOCAL, COMMON, BUMPS = 1.0 / 3.0, 1.0 / 6.0, 0.4, 0.6, (16.0, 32.0)
"""Discretisation error in units of F_h - F_2h: mean, its sd, independent part, part common to bumps (mm)."""

DEFECTS = 2
"""Rounds of defect correction on the coarse mesh."""

FARTHEST = 5.0
"""Prior standard deviations that a parameter may be from its median."""

EXPLAINED = 3.0
"""A coarse fit of a misfit below this, per datum in units of the noise, ends the search for other seeds."""


@dataclass(frozen=True)
class Prior:
    """Gaussian prior: medians and standard deviations of the logarithms (positions: mm about the outlines'
    centre).

    ratio: D_white / D_grey.
    """

    D_white: tuple[float, float] = (0.3, 1.0)
    ratio: tuple[float, float] = (6.0, 0.5)
    rho: tuple[float, float] = (0.02, 0.7)
    age: tuple[float, float] = (350.0, 0.8)
    position: float = 15.0

    def __post_init__(self) -> None:
        for name in ("D_white", "ratio", "rho", "age"):
            median, sd = getattr(self, name)
            if not (median > 0 and sd > 0):
                raise GliodeError(
                    f"prior.{name}: median {median} and sd {sd} of the logarithm must be positive"
                )
        if not self.position > 0:
            raise GliodeError(f"prior.position: {self.position} mm must be positive")

    def mean(self, centre: np.ndarray) -> Tensor:
        """(7,) with the seed at `centre`."""
        D, ratio = self.D_white[0], self.ratio[0]
        logs = [math.log(D), math.log(D / ratio), math.log(self.rho[0])]
        return torch.tensor([*logs, *centre, math.log(self.age[0])], dtype=torch.float64)

    def covariance(self) -> Tensor:
        """(7, 7); D_grey = D_white / ratio with independent ratio."""
        sd = [self.D_white[1], 0.0, self.rho[1], *[self.position] * 3, self.age[1]]
        covariance = torch.diag(torch.tensor(sd, dtype=torch.float64).square())
        covariance[0, 1] = covariance[1, 0] = self.D_white[1] ** 2
        covariance[1, 1] = self.D_white[1] ** 2 + self.ratio[1] ** 2
        return covariance


@dataclass(frozen=True)
class Settings:
    """How to identify. starts: seeds tried on the coarse mesh; level: of the credible intervals; region: mm
    around the
    visible tumour in which voxels count; step: days, of the fine model (twice on the coarse one)."""

    prior: Prior = field(default_factory=Prior)
    starts: int = 3
    level: float = 0.9
    region: float = 20.0
    step: float = 5.0
    max_iterations: int = 25
    discretisation_error: bool = True

    def __post_init__(self) -> None:
        if self.starts < 1 or self.max_iterations < 1:
            raise GliodeError("identify: starts and max_iterations must be at least 1")
        if not 0 < self.level < 1:
            raise GliodeError(f"identify.level: {self.level} is not in (0, 1)")
        if min(self.region, self.step) <= 0:
            raise GliodeError("identify: region and step must be positive")


@dataclass(frozen=True)
class Estimate:
    """One quantity: its value, unit and credible interval; variance_ratio: posterior over prior variance (of
    the
    logarithm where it is positive by nature): what the data leave open, 1 where they say nothing."""

    value: float
    unit: str
    interval: tuple[float, float]
    variance_ratio: float


DERIVED: dict[str, tuple[str, str, float, dict[str, float]]] = {
    "infiltration_length": ("sqrt(D_white/rho)", "mm", 1.0, {"D_white": 0.5, "rho": -0.5}),
    "front_speed": ("2 sqrt(D_white rho)", "mm/day", 2.0, {"D_white": 0.5, "rho": 0.5}),
    "growth_times": ("rho age", "", 1.0, {"rho": 1.0, "age": 1.0}),
}
"""Name: formula, unit, factor, exponents. One scan fixes the first and the last."""


@dataclass(frozen=True)
class Identification:
    """What was found.

    estimates: by parameter; derived: of the quantities in DERIVED; combinations: which the data fix;
    posterior: the Laplace posterior of m; misfit: 1/2 ||whitened residual||^2 and data: how many; counts:
    solves by level ("fine", "coarse"); forward_equivalents: all solves in units of one fine forward run (a
    coarse one weighted by its share of unknowns times steps); alternatives: other minima of the coarse search
    with their misfit above the best; states: densities at the visits.
    """

    estimates: dict[str, Estimate]
    derived: dict[str, Estimate]
    combinations: list[Combination]
    posterior: Laplace
    misfit: float
    data: int
    stopping: dict[str, Any]
    counts: dict[str, dict[str, int]]
    forward_equivalents: float
    history: list[dict[str, float]]
    alternatives: list[dict[str, float]]
    states: list[Tensor]
    model: TumourModel


Save = Callable[[dict[str, np.ndarray]], None]


class _Level:
    """The forward map m -> images in the region, on one mesh."""

    def __init__(
        self, model: TumourModel, anatomy: Anatomy, region: np.ndarray, scans: Sequence[Scan], shown: Tensor
    ) -> None:
        self.model, self._shown = model, shown
        self.days = sorted({scan.day for scan in scans})
        self._look = camera(model, anatomy, region)
        self._wanted = [[scan.modality for scan in scans if scan.day == day] for day in self.days]
        self.age_steps: int | None = None
        self.box: tuple[Tensor, Tensor] | None = None
        self.size = int(shown.sum())

    def states(self, m: Tensor) -> list[Tensor]:
        values = {name: m[k].exp() if name in LOGARITHMIC else m[k] for k, name in enumerate(PARAMETERS)}
        return self.model.states(values, self.days, self.age_steps)

    def __call__(self, m: Tensor) -> Tensor:
        if self.box is not None and bool(((m < self.box[0]) | (m > self.box[1])).any()):
            # Not a number: the optimizer takes a shorter step, and no age of centuries is ever run.
            return m.sum() * torch.full((self.size,), torch.nan, dtype=torch.float64)
        images = [self._look(u, wanted) for u, wanted in zip(self.states(m), self._wanted, strict=True)]
        return torch.stack([image for visit in images for image in visit])[self._shown]


class Identifier:
    """Identification in stages: coarse from several seeds, coarse with the defect, fine.

    anatomy: at the spacing h of the fine mesh, the scans on its grid. save: called after each iteration with
    a flat dict of arrays; giving it back as `resume` goes on from there with the same result. progress:
    called with a line of text and the fraction done.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        scans: Sequence[Scan],
        settings: Settings | None = None,
        law: GrowthLaw | None = None,
        seed: Seed | None = None,
        scheme: Scheme = "rkl2",
        rtol: float = 1e-8,
        therapy: Sequence[Treatment] = (),
        save: Save | None = None,
        resume: Mapping[str, np.ndarray] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        if not scans:
            raise GliodeError("scans: none given; at least one image of one visit is needed")
        for scan in scans:
            if scan.values.shape != anatomy.shape:
                raise GliodeError(
                    f"scan of day {scan.day:g}: shape {scan.values.shape}, the anatomy has {anatomy.shape}"
                )
        if min(scan.day for scan in scans) != 0.0:
            raise GliodeError("scans: days count from the first scan, so the earliest must be day 0")
        self.anatomy, self.settings = anatomy, settings or Settings()
        self.scans = sorted(scans, key=lambda scan: scan.day)
        self._save, self._progress = save, progress
        self._memory: dict[str, np.ndarray] = dict(resume or {})
        self.region = visible(anatomy, self.scans, self.settings.region)
        # (scans, voxels of the region): which of them each scan covers.
        self.shown = torch.from_numpy(np.stack([scan.mask[self.region] for scan in self.scans]))
        for scan, covered in zip(self.scans, self.shown, strict=True):
            if not bool(covered.any()):
                raise GliodeError(
                    f"scan of day {scan.day:g} ({scan.modality.kind}): covers no voxel near the tumour; leave"
                    " it out or correct its mask"
                )
        self.data = torch.cat([torch.from_numpy(s.values[self.region & s.mask]) for s in self.scans])
        levels = torch.tensor([scan.sd for scan in self.scans], dtype=torch.float64)
        self.sd = levels[self.shown.nonzero()[:, 0]]
        seed = seed or Seed()

        def model(on: Anatomy, step: float) -> TumourModel:
            return TumourModel(domain_of(on), law, seed, step, scheme, rtol, therapy=therapy)

        fine = model(anatomy, self.settings.step)
        coarse = model(anatomy.coarsen(2), 2 * self.settings.step)
        self.fine = _Level(fine, anatomy, self.region, self.scans, self.shown)
        self.coarse = _Level(coarse, anatomy, self.region, self.scans, self.shown)
        self._coarse_weight = coarse.domain.n_global / fine.domain.n_global * fine.step / coarse.step
        self._counts = {"coarse": dict.fromkeys(("forward", "adjoint", "tangent"), 0)}
        self._counts["fine"] = dict(self._counts["coarse"])
        self._history: list[dict[str, float]] = []

    def _seeds(self) -> np.ndarray:
        """Starting seeds (k, 3) in mm: the centre of the first visit's innermost image, then centres of its
        clusters.
        """
        first = [scan for scan in self.scans if scan.day == 0.0]
        inner = next((scan for scan in first if scan.modality.kind == "enhancing"), first[0])
        values = ndimage.median_filter(np.where(self.region & inner.mask, inner.values, 0.0), 3)
        voxels = np.argwhere(values > 0.5 * values.max())
        points = voxels @ self.anatomy.affine[:3, :3].T + self.anatomy.affine[:3, 3]
        seeds = [points.mean(0)]
        if self.settings.starts > 1 and len(points) >= 4 * self.settings.starts:
            more, _ = vq.kmeans2(points, self.settings.starts, rng=0, minit="++")
            seeds += [s for s in more if np.linalg.norm(s - seeds[0]) > 5.0]
        return np.array(seeds[: self.settings.starts])

    def run(self) -> Identification:
        """Identify."""
        seeds = self._seeds()
        prior = self.settings.prior.mean(seeds[0])
        covariance = self.settings.prior.covariance()
        reach = FARTHEST * covariance.diagonal().sqrt()
        self.coarse.box = self.fine.box = (prior - reach, prior + reach)
        precision = torch.linalg.inv(covariance)
        self._space = GramSpace(len(PARAMETERS), lambda a: precision @ a, lambda d: covariance @ d)
        self._prior = Tikhonov(self._space, reference=prior)

        found = self._search(seeds, prior)
        best = min(found, key=lambda result: result.value)
        alternatives = [
            {**self._values(r.m), "above": r.value - best.value}
            for r in found
            if float(torch.linalg.vector_norm(r.m[3:6] - best.m[3:6])) > 4.0
        ]
        m = best.m
        self.fine.age_steps = self.fine.model.steps_for(float(m[6].exp()))
        # Defect correction: the coarse map plus e behaves as the fine one near m, at a seventh of its cost.
        for k in range(DEFECTS):
            e = self._error(f"defect{k}", m)
            problem = self._corrected(self.coarse, e)
            m = self._fit(f"defect{k}", problem, m, "coarse", 0.2 + 0.1 * k, 3e-3).m
        e = self._error("fine", m)
        problem = self._corrected(self.fine, e)
        jacobian = self._jacobian("fine", problem, m)
        result = self._fit("fine", problem, m, "fine", 0.7, 5e-4, jacobian)
        error = e if self.settings.discretisation_error else None
        posterior = self._posterior(result.m, jacobian, error, problem.noise, covariance)
        if bool(((result.m - m).abs() > posterior.sd).any()):
            jacobian = self._jacobian("moved", problem, result.m)
            posterior = self._posterior(result.m, jacobian, error, problem.noise, covariance)
        return self._report(result, posterior, alternatives)

    def _search(self, seeds: np.ndarray, prior: Tensor) -> list[Result]:
        """Fits on the coarse mesh, from the seed of least misfit on, until one explains the data
        (`EXPLAINED`).
        """
        problem = self._problem(self.coarse, self.data, self.sd)
        starts = []
        for k, seed in enumerate(seeds):
            start = prior.clone()
            start[3:6] = torch.from_numpy(seed)
            make = partial(self._value, problem, start)
            value = self._kept(f"start{k}", make, {"coarse": {"forward": 1}})
            starts.append((float(value), k, start))
        found: list[Result] = []
        for _, k, start in sorted(starts, key=lambda entry: entry[:2]):
            problem = self._problem(self.coarse, self.data, self.sd)
            found.append(self._fit(f"coarse{k}", problem, start, "coarse", 0.05 + 0.1 * len(found), 3e-3))
            if found[-1].state.misfit < EXPLAINED * len(self.data) / 2:
                break
        return found

    def _problem(self, level: _Level, data: Tensor, sd: Tensor) -> LeastSquares:
        return LeastSquares(self._space, level, data, sd, regularizer=self._prior)

    @staticmethod
    def _value(problem: LeastSquares, m: Tensor) -> Tensor:
        return torch.tensor(problem.value(m), dtype=torch.float64)

    def _corrected(self, level: _Level, e: Tensor) -> LeastSquares:
        """A level's problem for data shifted by what it is expected to miss, with its independent part."""
        defect = e if level is self.coarse else torch.zeros_like(e)
        if not self.settings.discretisation_error:
            return self._problem(level, self.data - defect, self.sd)
        sd = torch.sqrt(self.sd**2 + (LOCAL * self._size(e)) ** 2)
        return self._problem(level, self.data - defect - MEAN * e, sd)

    def _error(self, stage: str, m: Tensor) -> Tensor:
        """e = F_h - F_2h at m, (data,)."""

        def difference() -> Tensor:
            with torch.no_grad():
                return self.fine(m) - self.coarse(m)

        return self._kept(f"{stage}.error", difference, {"fine": {"forward": 1}, "coarse": {"forward": 1}})

    def _size(self, e: Tensor) -> Tensor:
        """The local root mean square of e in each image (a Gaussian window of one voxel)."""
        sizes = []
        for image, scan in zip(e.split(self.shown.sum(1).tolist()), self.scans, strict=True):
            covered = self.region & scan.mask
            volume = np.zeros(covered.shape)
            volume[covered] = image.numpy() ** 2
            weight = ndimage.gaussian_filter(covered.astype(np.float64), 1.0)[covered]
            mean = ndimage.gaussian_filter(volume, 1.0)[covered] / weight
            sizes.append(np.sqrt(np.maximum(mean, 0.0)))
        return torch.from_numpy(np.concatenate(sizes))

    def _posterior(
        self, m: Tensor, jacobian: Tensor, e: Tensor | None, sd: Tensor, covariance: Tensor
    ) -> Laplace:
        """The Laplace posterior, its information reduced by the discretisation error's common part."""
        if e is not None:
            size = self._size(e)
            at = torch.from_numpy(np.argwhere(self.region) * self.anatomy.spacing)
            columns = [MEAN_SD * (jacobian.mT @ (e / sd))[:, None]]
            # By voxel, all images together.
            alike = torch.zeros(len(at), jacobian.shape[1], dtype=torch.float64).index_add(
                0, self.shown.nonzero()[:, 1], jacobian * (COMMON * size / sd)[:, None]
            )
            columns += [alike.mT @ _bumps(at, length).to_dense() for length in BUMPS]
            Q = torch.cat(columns, 1)
            H = jacobian.mT @ jacobian
            root = torch.linalg.cholesky(H + Q @ Q.mT + 1e-12 * torch.diag(H.diagonal()))
            jacobian = torch.linalg.solve_triangular(root, H, upper=False)
        return Laplace(m, jacobian, covariance, PARAMETERS, LOGARITHMIC)

    def _fit(
        self,
        stage: str,
        problem: LeastSquares,
        start: Tensor,
        level: str,
        done: float,
        tolerance: float,
        jacobian: Tensor | None = None,
    ) -> Result:
        """Levenberg-Marquardt; goes on from a saved state of this stage."""
        saved = {k.split("/", 1)[1]: v for k, v in self._memory.items() if k.startswith(stage + "/")}
        count = self._counts[level]
        before = dict(count)

        def after(state: State) -> None:
            for key in [key for key in self._memory if key.startswith(stage + "/")]:
                del self._memory[key]
            self._memory.update({f"{stage}/{k}": v for k, v in state.state_dict().items()})
            if self._save is not None:
                self._save(self._memory)
            if self._progress is not None:
                self._progress(f"{stage}: iteration {state.iteration}, misfit {state.misfit:.6g}", done)

        result = gauss_newton.minimise(
            problem,
            saved or start,
            damping=1e-6,
            jacobian_updates=True,
            jacobian=jacobian,
            stopping=(
                GradientTolerance(1e-4),
                StepTolerance(tolerance),
                MaxIterations(self.settings.max_iterations),
            ),
            callback=after,
        )
        for name in count:
            count[name] = before[name] + result.counts[name]
        self._history += [{"stage": len(self._history), **entry} for entry in result.history]
        return result

    def _jacobian(self, stage: str, problem: LeastSquares, m: Tensor) -> Tensor:
        """The Jacobian of the whitened residuals: a dual-number pass for each parameter."""
        level = "coarse" if problem.forward is self.coarse else "fine"
        n = len(PARAMETERS)
        return self._kept(
            f"{stage}.jacobian", lambda: problem.jacobian(m), {level: {"forward": n, "tangent": n}}
        )

    def _kept(self, name: str, make: Callable[[], Tensor], cost: Mapping[str, Mapping[str, int]]) -> Tensor:
        """A tensor of an interrupted run, or made now and saved; its solves are counted either way."""
        if name not in self._memory:
            self._memory[name] = make().numpy()
            if self._save is not None:
                self._save(self._memory)
        for level, solves in cost.items():
            for kind, number in solves.items():
                self._counts[level][kind] += number
        return torch.from_numpy(self._memory[name])

    def _values(self, m: Tensor) -> dict[str, float]:
        return {
            n: math.exp(float(x)) if n in LOGARITHMIC else float(x)
            for n, x in zip(PARAMETERS, m, strict=True)
        }

    def _report(
        self, result: Result, posterior: Laplace, alternatives: list[dict[str, float]]
    ) -> Identification:
        values, intervals = posterior.estimates(), posterior.intervals(self.settings.level)
        ratio = (posterior.covariance.diagonal() / posterior.prior_covariance.diagonal()).tolist()
        with torch.no_grad():
            states = self.fine.states(result.m)
        self._counts["fine"]["forward"] += 1
        weights = {"fine": 1.0, "coarse": self._coarse_weight}
        return Identification(
            estimates={
                n: Estimate(values[n], UNITS[n], intervals[n], r)
                for n, r in zip(PARAMETERS, ratio, strict=True)
            },
            derived={name: self._derived(posterior, *how[1:]) for name, how in DERIVED.items()},
            combinations=posterior.identifiability(),
            posterior=posterior,
            misfit=result.state.misfit,
            data=len(self.data),
            stopping={"rule": result.stopped_by, **result.numbers},
            counts=self._counts,
            forward_equivalents=sum(weights[k] * sum(v.values()) for k, v in self._counts.items()),
            history=self._history,
            alternatives=alternatives,
            states=states,
            model=self.fine.model,
        )

    def _derived(self, posterior: Laplace, unit: str, factor: float, powers: Mapping[str, float]) -> Estimate:
        """factor * prod(parameter^power): log-normal, as its parameters are."""
        c = torch.tensor([powers.get(name, 0.0) for name in PARAMETERS], dtype=torch.float64)
        centre, variance = float(c @ posterior.mean), float(c @ posterior.covariance @ c)
        spread = float(ndtri(0.5 + self.settings.level / 2)) * math.sqrt(variance)
        low, value, high = (factor * math.exp(centre + k * spread) for k in (-1, 0, 1))
        return Estimate(value, unit, (low, high), variance / float(c @ posterior.prior_covariance @ c))


def _bumps(at: Tensor, length: float) -> Tensor:
    """Trilinear hat functions on a grid of `length` mm at points (n, 3): a sparse (n, hats) partition of
    unity.
    """
    grid = (at - at.min(0).values) / length
    low = grid.floor().long()
    shape = (low.max(0).values + 2).tolist()
    rows, columns, values = [], [], []
    for corner in np.ndindex(2, 2, 2):
        c = torch.tensor(corner)
        values.append(torch.where(c.bool(), grid - low, 1 - (grid - low)).prod(1))
        i, j, k = (low + c).T
        columns.append((i * shape[1] + j) * shape[2] + k)
        rows.append(torch.arange(len(at)))
    index = torch.stack([torch.cat(rows), torch.cat(columns)])
    size = (len(at), shape[0] * shape[1] * shape[2])
    return torch.sparse_coo_tensor(index, torch.cat(values), size).coalesce()
