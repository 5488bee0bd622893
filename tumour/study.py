"""From a case to what it describes: anatomy, mesh, model, treatments, scans."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem import mesh
from solvers.fem.mesh import Domain, FloatArray
from solvers.fem.sampling import Sampling
from tumour import anatomy as anatomies
from tumour import case_sections as sections
from tumour import growth, therapy
from tumour.anatomy import Anatomy
from tumour.case import Case, outlines_of
from tumour.growth import GrowthLaw
from tumour.identification import Prior, Settings
from tumour.imaging import Kind, Modality, add_noise, noise_sd
from tumour.model import Seed, TumourModel, domain_of
from tumour.nifti import Grid, average_onto, listed, read_nifti
from tumour.patients import Scan, camera
from tumour.therapy import Treatment

CHUNK = 20_000  # voxels imaged at once: some 200 MB
MOST = 2.0  # a density is a share of the carrying capacity: beyond this it is no noise


def anatomy_of(case: Case, spacing: float | np.ndarray | None = None) -> Anatomy | None:
    """The case's brain at a spacing in mm, one or three numbers (default: its own), None for a mesh."""
    section = case.anatomy
    if isinstance(section, sections.MeshFile):
        return None
    if isinstance(section, sections.Mni152):
        if isinstance(spacing, np.ndarray):
            return anatomies.mni152(1.0).resample(spacing)
        return anatomies.mni152(spacing or section.spacing)
    if isinstance(section, sections.NiftiMaps):
        brain = anatomies.from_nifti(section.white, section.grey, section.fluid, section.t1)
    else:
        labels = {"white": section.white, "grey": section.grey}
        if section.fluid:
            labels["fluid"] = section.fluid
        brain = anatomies.from_labels(section.path, labels, section.t1)
    spacing = section.spacing if spacing is None else spacing
    return brain if spacing is None else brain.resample(spacing)


def mesh_of(section: sections.MeshFile) -> Domain:
    """A mesh file as a domain with the cell data `white` and `grey`, from its labels."""
    domain = mesh.read(section.path)
    names = sorted(domain.cell_data)
    if section.labels is None and len(names) != 1:
        raise GliodeError(
            f"{section.path}: has cell data {names or 'of no kind'}; name one in anatomy.labels"
        )
    name = section.labels or names[0]
    if name not in names:
        raise GliodeError(f"{section.path}: has no cell data {name!r} (anatomy.labels), but {names}")
    labels = domain.cell_data[name]
    white, grey = (
        torch.isin(labels, torch.tensor(chosen, dtype=labels.dtype))
        for chosen in (section.white, section.grey)
    )
    found = set().union(*domain.comm.allgather(set(labels.tolist())))
    unknown = sorted(found - {*map(float, section.white), *map(float, section.grey)})
    if unknown:
        raise GliodeError(
            f"{section.path}: cells labelled {listed(unknown)} in {name!r} are neither white nor grey; name"
            " them in anatomy.white or anatomy.grey, or leave those cells out of the mesh"
        )
    return replace(domain, cell_data={"white": white.double(), "grey": (grey & ~white).double()})


def domain_for(case: Case, brain: Anatomy | None) -> Domain:
    """The mesh to solve on: bricks of the brain, or the case's own mesh."""
    if brain is not None:
        return domain_of(brain)
    assert isinstance(case.anatomy, sections.MeshFile)
    return mesh_of(case.anatomy)


def model_for(case: Case, domain: Domain, step: float | None = None) -> TumourModel:
    """The case's model on a domain, with its treatments; step in days (default: the model's)."""
    section = case.model
    return TumourModel(
        domain,
        law=law_of(case),
        seed=seed_of(case),
        step=step or section.step,
        scheme=section.scheme,
        rtol=section.tolerance,
        therapy=treatments(case, domain),
    )


def law_of(case: Case) -> GrowthLaw:
    """The case's growth law."""
    section = case.model.growth
    return growth.LAWS[section.law](**section.model_dump(exclude={"law"}))


def seed_of(case: Case) -> Seed:
    """The tumour at age 0."""
    return Seed(case.model.seed.amplitude, case.model.seed.width)


def settings_of(case: Case) -> Settings:
    """How to identify. Raises GliodeError for what cannot be identified yet."""
    for number, item in enumerate(case.therapy):
        if isinstance(item, sections.Resection):
            raise GliodeError(
                f"therapy[{number}]: identify.py does not look through a resection yet; leave out the visits"
                " after it and the resection itself (simulate.py takes them)"
            )
    section, prior = case.identify, case.identify.prior
    logarithmic = {name: getattr(prior, name) for name in ("D_white", "ratio", "rho", "age")}
    return Settings(
        prior=Prior(position=prior.position, **{name: (p.median, p.sd) for name, p in logarithmic.items()}),
        step=case.model.step,
        **section.model_dump(exclude={"prior", "unknown", "field"}),
    )


def treatments(case: Case, domain: Domain | None) -> list[Treatment]:
    """The case's treatments on a domain (radiotherapy needs none)."""
    found: list[Treatment] = []
    for item in case.therapy:
        day = case.day_of(item)
        if isinstance(item, sections.Radiotherapy):
            found += therapy.course(day, item.fractions, item.dose, alpha=item.alpha, beta=item.beta)
        else:
            assert domain is not None
            found.append(therapy.Resection(day, _kept(item, domain)))
    return found


def _kept(item: sections.Resection, domain: Domain) -> Tensor:
    """1 where the tumour stays, 0 in the cavity, (owned dofs,)."""
    points = domain.points[: domain.n_owned]
    if item.cavity is None:
        assert item.radius is not None
        removed = np.linalg.norm(points - np.asarray(item.centre), axis=1) <= item.radius
    else:
        volume = read_nifti(item.cavity)
        inverse = np.linalg.inv(volume.grid.affine)
        at = points @ inverse[:3, :3].T + inverse[:3, 3]
        removed = ndimage.map_coordinates(volume.data, at.T, order=0, mode="grid-constant") > 0.5
    if not domain.comm.allreduce(bool(removed.any())):
        raise GliodeError(f"therapy: the cavity of {item.cavity or item.centre} does not meet the brain")
    return torch.from_numpy(1.0 - removed)


def require_seed_inside(case: Case, brain: Anatomy | None, domain: Domain | None = None) -> None:
    """Raise GliodeError unless the true tumour starts in the brain, or else in the mesh."""
    assert case.truth is not None
    if case.truth.foci:
        raise GliodeError("truth.foci: only locate_source.py grows a tumour of several; leave it out here")
    position = np.asarray(case.truth.position)
    if brain is not None:
        brain.require_inside(position, "truth.position")
    elif domain is not None:
        try:
            Sampling(domain, position)
        except GliodeError as error:
            raise GliodeError(f"truth.position: {case.truth.position} mm is not in the mesh") from error


def truth_of(case: Case) -> dict[str, float]:
    """The true parameters by their names in `tumour.model.PARAMETERS`."""
    truth = case.truth
    assert truth is not None
    x, y, z = truth.position
    return {
        "D_white": truth.D_white,
        "D_grey": truth.D_grey,
        "rho": truth.rho,
        "x": x,
        "y": y,
        "z": z,
        "age": truth.age,
    }


def modality_of(scan: sections.Scan, kind: Kind) -> Modality:
    """How a scan of the case shows the density."""
    return Modality(kind, scan.noise, scan.width, scan.level)


def simulated_scans(case: Case, model: TumourModel, brain: Anatomy, states: Sequence[Tensor]) -> list[Scan]:
    """The case's scans, with their noise, of the states at its visits; on the brain's grid.

    Every image has noise of its own: its generator is seeded by the case's seed and the image's number.
    """
    shown = [[modality_of(s, kind) for s in visit.scans for kind in outlines_of(s)] for visit in case.visits]
    clean = [[np.zeros(brain.shape) for _ in modalities] for modalities in shown]
    voxels = np.flatnonzero(brain.brain)
    for part in np.array_split(voxels, -(-len(voxels) // CHUNK)):
        mask = np.zeros(brain.shape, dtype=bool)
        mask.flat[part] = True
        look = camera(model, brain, mask, sub=4)
        for u, modalities, images in zip(states, shown, clean, strict=True):
            for image, seen in zip(images, look(u, modalities), strict=True):
                image.flat[part] = seen.numpy()
    scans, number = [], count()
    for visit, modalities, images in zip(case.visits, shown, clean, strict=True):
        masks = [coverage(s, brain) for s in visit.scans for _ in outlines_of(s)]
        for modality, image, mask in zip(modalities, images, masks, strict=True):
            inside = image[brain.brain]
            generator = np.random.default_rng([case.noise_seed, next(number)])
            image[brain.brain] = add_noise(inside, modality, generator)
            image[~mask] = 0.0
            scans.append(Scan(case.day_of(visit), modality, image, mask, noise_sd(inside, modality)))
    return scans


def coverage(section: sections.Scan, brain: Anatomy) -> np.ndarray:
    """Where a scan holds, (nx, ny, nz): the brain within its mask and its slices.

    Raises GliodeError where nothing is left.
    """
    covered = brain.brain.copy()
    if section.slices is not None:
        z = (np.indices(brain.shape).reshape(3, -1).T @ brain.affine[2, :3] + brain.affine[2, 3]).reshape(
            brain.shape
        )
        covered &= (z >= section.slices[0]) & (z <= section.slices[1])
    if section.mask is not None:
        volume = read_nifti(section.mask)
        covered &= average_onto(volume.data, volume.grid.affine, Grid(brain.shape, brain.affine)) > 0.5
    if not covered.any():
        raise GliodeError(
            f"visits: the mask or slices of a {section.kind} scan cover nothing of the brain; correct them"
        )
    return covered


def read_scans(case: Case, brain: Anatomy) -> list[Scan]:
    """The case's scans from their files, on the brain's grid (exact volume averages).

    Raises GliodeError naming the file where it cannot be read, shows nothing in the brain, or is not in units
    of the carrying capacity.
    """
    scans = []
    for visit in case.visits:
        for section in visit.scans:
            mask = coverage(section, brain)
            for kind, values in _images(section, brain).items():
                values = np.where(mask, values, 0.0)
                inside = values[mask]
                if not inside.max() > 0:
                    raise GliodeError(
                        f"{section.file}: shows no {kind} in the brain; is it in the same space?"
                    )
                if inside.max() > MOST:
                    raise GliodeError(
                        f"{section.file}: {kind} reaches {inside.max():.3g}; give it as a fraction in [0, 1]"
                        " (a density: of the carrying capacity)"
                    )
                modality = modality_of(section, kind)
                sd = noise_sd(inside, modality)
                scans.append(Scan(case.day_of(visit), modality, values, mask, sd))
    return scans


def digest(brain: Anatomy, scans: Sequence[Scan]) -> str:
    """A hash of the anatomy and the scans, as an identification sees them."""
    found = hashlib.sha256()
    for array in (brain.white, brain.grey, brain.affine, *(scan.values for scan in scans)):
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _images(section: sections.Scan, brain: Anatomy) -> dict[Kind, FloatArray]:
    """The images in a scan's file. T1Gd outlines the core (enhancing, necrotic), FLAIR the oedema too."""
    assert section.file is not None
    if section.kind == "segmentation":
        parts = anatomies.read_segmentation(section.file, brain)
        core = parts["enhancing"] + parts["necrotic"]
        return {"enhancing": core, "oedema": core + parts["oedema"]}
    volume = read_nifti(section.file)
    grid = Grid(brain.shape, brain.affine)
    return {section.kind: average_onto(volume.data, volume.grid.affine, grid)}
