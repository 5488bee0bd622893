"""A run in pieces against `TumourModel.states`, and a case's parts against their definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import meshio
import numpy as np
import pytest
import torch

from solvers.errors import GliodeError
from solvers.fem.mesh import Domain
from tumour import case as cases
from tumour import case_sections as sections
from tumour import study
from tumour.anatomy import Anatomy
from tumour.case_sections import Identify
from tumour.identification import Prior, Settings
from tumour.model import TumourModel, domain_of
from tumour.nifti import write_nifti
from tumour.simulation import Snapshot, grow, on_grid, plan
from tumour.therapy import Radiotherapy, Resection, Treatment

PARAMETERS = {"D_white": 0.3, "D_grey": 0.05, "rho": 0.03, "x": 11.0, "y": 9.0, "z": 14.0, "age": 91.0}


def block(n: int = 8, side: float = 3.0) -> Anatomy:
    """A block of white and grey matter in a rim of nothing."""
    white = np.zeros((n, n, n))
    white[1:-1, 1:-1, 1:-1] = 0.7
    white[1:4, 1:-1, 1:-1] = 0.2
    grey = np.where(white > 0, 1 - white, 0.0)
    return Anatomy(white, grey, np.zeros_like(white), np.diag([side, side, side, 1.0]))


def treated(domain: Domain) -> TumourModel:
    kept = domain.interpolate(lambda x: (x[:, 0] > 12).astype(float))
    therapy: list[Treatment] = [
        Radiotherapy(20.0),
        Radiotherapy(21.0),
        Radiotherapy(-30.0),
        Resection(60.0, kept),
    ]
    return TumourModel(domain, step=4.0, therapy=therapy)


@pytest.mark.mpi
def test_growing_step_by_step_gives_the_states_of_the_model() -> None:
    model = treated(domain_of(block()))
    found = grow(model, PARAMETERS, [0.0, 45.0, 60.0])
    states = model.states(
        {k: torch.tensor(v, dtype=torch.float64) for k, v in PARAMETERS.items()}, [0.0, 45.0, 60.0]
    )
    for u, v in zip(found.values(), states, strict=True):
        torch.testing.assert_close(u, v, rtol=0, atol=1e-13)


def test_going_on_from_any_snapshot_gives_the_same_bits() -> None:
    """Each with a model of its own, as after a restart."""
    domain, snapshots = domain_of(block()), list[Snapshot]()
    whole = grow(treated(domain), PARAMETERS, [-50.0, 0.0, 60.0], tick=snapshots.append)
    assert len(snapshots) == sum(s.steps for s in plan(treated(domain), 91.0, [-50.0, 0.0, 60.0]))
    for start in snapshots[::7] + snapshots[-1:]:
        again = grow(treated(domain), PARAMETERS, [-50.0, 0.0, 60.0], start)
        assert list(again) == list(whole) and all(torch.equal(again[day], whole[day]) for day in whole)


def test_the_plan_meets_days_and_treatments() -> None:
    model = treated(domain_of(block()))
    stretches = plan(model, 91.0, [0.0, 60.0])
    assert [s.end for s in stretches] == [-30, 0, 20, 21, 60]
    assert [s.steps for s in stretches] == [16, 8, 5, 1, 10]  # 61, 30, 20, 1, 39 days by at most 4
    assert [len(s.treatments) for s in stretches] == [1, 0, 1, 1, 1]
    with pytest.raises(GliodeError, match="must come after the seed, day -91"):
        plan(model, 91.0, [-91.0, 0.0])
    with pytest.raises(GliodeError, match="therapy: day -30 is before the seed"):
        plan(model, 20.0, [0.0])


def test_a_finer_mesh_comes_onto_the_grid_with_its_integral() -> None:
    coarse, fine = block(8, 3.0), block(8, 3.0).resample(1.5)
    domain = domain_of(fine)
    u = domain.interpolate(lambda x: 0.3 + 0.01 * x[:, 0] - 0.005 * x[:, 2])
    volume = on_grid(domain, u, coarse)
    assert volume.shape == coarse.shape
    assert volume.sum() * 27 == pytest.approx(domain.integral(u), rel=1e-12)
    centres = np.argwhere(coarse.brain) * 3.0
    np.testing.assert_allclose(
        volume[coarse.brain], 0.3 + 0.01 * centres[:, 0] - 0.005 * centres[:, 2], atol=1e-12
    )


def case_with(**parts: Any) -> cases.Case:
    data: dict[str, Any] = {
        "anatomy": {"source": "mni152"},
        "truth": {"D_white": 0.3, "D_grey": 0.1, "rho": 0.02, "position": [11, 9, 14], "age": 50},
        "visits": [{"day": 0}],
    }
    return cases.parse(data | parts)


def test_cavities_from_a_ball_and_from_a_file(tmp_path: Path) -> None:
    brain = block()
    domain = domain_of(brain)
    ball = {"kind": "resection", "day": 0, "centre": [12, 12, 12], "radius": 5}
    where = np.linalg.norm(np.argwhere(brain.brain | True).reshape(8, 8, 8, 3) * 3.0 - 12, axis=-1) <= 5
    write_nifti(tmp_path / "cavity.nii.gz", where, brain.affine)
    file = {"kind": "resection", "day": 0, "cavity": str(tmp_path / "cavity.nii.gz")}
    of_ball, of_file = study.treatments(case_with(therapy=[ball, file]), domain)
    assert isinstance(of_ball, Resection) and isinstance(of_file, Resection)
    inside = np.linalg.norm(domain.points - 12, axis=1) <= 5
    assert inside.any() and np.array_equal(of_ball.kept.numpy(), 1.0 - inside)
    removed = of_file.kept.numpy() == 0
    assert removed.any() and np.linalg.norm(domain.points[removed] - 12, axis=1).max() < 5 + 1.5 * 3**0.5
    far = {"kind": "resection", "day": 0, "centre": [99, 0, 0], "radius": 5}
    with pytest.raises(GliodeError, match="does not meet the brain"):
        study.treatments(case_with(therapy=[far]), domain)


def test_radiotherapy_is_five_days_on_two_off() -> None:
    course = {"kind": "radiotherapy", "day": 3, "fractions": 7, "dose": 1.8}
    found = study.treatments(
        case_with(visits=[{"day": 0}, {"day": 20}], therapy=[course]), domain_of(block())
    )
    assert [t.day for t in found] == [3, 4, 5, 6, 7, 10, 11]
    assert all(isinstance(t, Radiotherapy) and t.dose == 1.8 for t in found)


def test_a_meshs_labels_become_tissue(tmp_path: Path) -> None:
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=float)
    cells, file = [("tetra", np.array([[0, 1, 2, 3], [1, 2, 3, 4]]))], tmp_path / "two.vtu"
    meshio.Mesh(points, cells, cell_data={"tissue": [[4, 7]], "other": [[1, 1]]}).write(file)

    def domain(**keys: Any) -> Domain:
        anatomy = {"source": "mesh", "path": str(file), "white": 7, "grey": [4, 5], **keys}
        return study.domain_for(case_with(anatomy=anatomy), None)

    found = domain(labels="tissue")
    large = found.cell_volumes > 0.2  # 1/6 and 1/3
    assert torch.equal(found.cell_data["white"], large.double())
    assert torch.equal(found.cell_data["grey"], 1 - large.double())
    with pytest.raises(GliodeError, match=r"two\.vtu: has cell data \['other', 'tissue'\]; name one"):
        domain()
    with pytest.raises(GliodeError, match=r"two\.vtu: has no cell data 'tisue'"):
        domain(labels="tisue")
    with pytest.raises(
        GliodeError, match=r"two\.vtu: cells labelled 4 in 'tissue' are neither white nor grey"
    ):
        domain(labels="tissue", grey=5)
    with pytest.raises(GliodeError, match=r"truth\.position: \[11\.0, 9\.0, 14\.0\] mm is not in the mesh"):
        study.require_seed_inside(case_with(), None, found)


@pytest.mark.mpi
def test_simulated_scans_show_the_images_and_noise_of_their_own() -> None:
    """A linear density: every voxel's mean is the value at its centre."""
    brain = block(16, 1.5)
    model = TumourModel(domain_of(brain))
    u = model.domain.interpolate(lambda x: 0.2 + 0.02 * x[:, 0])
    scans = [
        {"kind": "density", "noise": 0.01},
        {"kind": "oedema", "noise": 0.02, "level": 0.3, "width": 1.0},
    ]
    case = case_with(visits=[{"day": 0, "scans": scans}, {"day": 9, "scans": scans[:1]}], noise_seed=3)
    found = study.simulated_scans(case, model, brain, [u, u])
    assert [(s.day, s.modality.kind) for s in found] == [(0, "density"), (0, "oedema"), (9, "density")]
    clean = 0.2 + 0.02 * np.argwhere(brain.brain)[:, 0] * 1.5
    noises = [found[0].values[brain.brain] - clean, found[2].values[brain.brain] - clean]
    outline = 1 / (1 + np.exp(-(clean - 0.3)))  # nearly linear across a voxel at this width
    noises.append(found[1].values[brain.brain] - outline)
    for noise, sd in zip(noises, (0.01 * clean.max(), 0.01 * clean.max(), 0.02), strict=True):
        assert noise.std() == pytest.approx(sd, rel=0.1) and abs(noise.mean()) < 4 * sd / len(clean) ** 0.5
    assert abs(np.corrcoef(noises)[np.triu_indices(3, 1)]).max() < 5 / len(clean) ** 0.5
    again = study.simulated_scans(case, model, brain, [u, u])
    assert all(np.array_equal(a.values, b.values) for a, b in zip(found, again, strict=True))


def test_scans_from_files(tmp_path: Path) -> None:
    brain = block()
    truth = np.where(brain.brain, 0.5, 0.0)
    write_nifti(tmp_path / "pet.nii.gz", truth, brain.affine)
    labels = np.zeros(brain.shape, dtype=int)
    labels[3:6, 3:6, 3:6], labels[4:6, 4:6, 4:6], labels[4, 4, 4] = 2, 4, 1
    write_nifti(tmp_path / "seg.nii.gz", labels, brain.affine)

    def scans(kind: str, name: str) -> list[Any]:
        visit = {"day": 0, "scans": [{"kind": kind, "file": str(tmp_path / name), "noise": 0.1}]}
        return study.read_scans(case_with(visits=[visit]), brain)

    (pet,) = scans("density", "pet.nii.gz")
    assert np.allclose(pet.values, truth) and pet.sd == pytest.approx(0.05)
    core, whole = scans("segmentation", "seg.nii.gz")
    assert (core.modality.kind, whole.modality.kind) == ("enhancing", "oedema")
    assert np.array_equal(core.values, (labels == 4) | (labels == 1)) and np.array_equal(
        whole.values, labels > 0
    )
    write_nifti(tmp_path / "percent.nii.gz", 100 * truth, brain.affine)
    with pytest.raises(GliodeError, match=r"percent\.nii\.gz: density reaches 50; give it as a fraction"):
        scans("density", "percent.nii.gz")
    write_nifti(
        tmp_path / "far.nii.gz", truth, brain.affine + 500 * np.eye(4)[:, [3, 0, 1, 2]] * (np.arange(4) == 3)
    )
    with pytest.raises(GliodeError, match=r"far\.nii\.gz: shows no oedema in the brain"):
        scans("oedema", "far.nii.gz")


def test_the_keys_of_identify_are_the_settings_with_their_defaults() -> None:
    keys, prior = Identify.model_fields, sections.Prior.model_fields
    assert set(keys) | {"step"} == {field.name for field in dataclasses.fields(Settings)}
    assert set(prior) == {field.name for field in dataclasses.fields(Prior)}
    assert study.settings_of(case_with()) == Settings()
    changed = {"prior": {"rho": {"median": 0.1, "sd": 0.2}, "position": 3}, "starts": 1, "level": 0.5}
    found = study.settings_of(case_with(identify=changed, model={"step": 2}))
    assert found == Settings(prior=Prior(rho=(0.1, 0.2), position=3.0), starts=1, level=0.5, step=2.0)


def test_laws_and_seeds_come_from_the_case() -> None:
    parts = {"growth": {"law": "gompertz", "eps": 0.01}, "seed": {"width": 2}, "step": 3, "tolerance": 1e-6}
    model = study.model_for(case_with(model=parts), domain_of(block()))
    assert (model.law.name, model.seed.width, model.step, model.operator.rtol) == ("gompertz", 2, 3, 1e-6)
    rate = model.law.rate(torch.tensor(0.5)).item()
    assert rate == pytest.approx(0.5 * np.log(1.01 / 0.51))
