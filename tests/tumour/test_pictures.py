"""Pictures of a result folder: geometry against closed forms and voxel counts, files, errors."""

from __future__ import annotations

import base64
import json
import re
import shutil
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from scripts import visualise
from solvers.errors import GliodeError
from tumour.pictures import KINDS, closeups, display, glass, make, plots, rendering, style, turning
from tumour.pictures.rendering import Layer, View
from tumour.pictures.results import Estimate, Inapplicable, Map, ResultFolder
from tumour.pictures.slices import PLANES, Window
from tumour.pictures.surfaces import Surfaces, isosurface, regrid

SIZE = (800, 600)
SEED, FOUND = np.array([30.0, -20.0, 25.0]), np.array([32.0, -21.0, 26.5])
PAGE_DATA = r'const data = "([^"]*)"'
PAGE_SCENE = r"const scene = (.*);\n"


def block_means(image: nibabel.Nifti1Image, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and affine on voxels `factor` times larger."""
    values = np.asarray(image.dataobj, dtype=float)
    values = values[tuple(slice(0, size // factor * factor) for size in values.shape)]
    blocks = [part for size in values.shape for part in (size // factor, factor)]
    affine = image.affine @ np.diag([factor, factor, factor, 1.0])
    affine[:3, 3] = image.affine[:3, 3] + image.affine[:3, :3] @ np.full(3, (factor - 1) / 2)
    return values.reshape(blocks).mean(axis=(1, 3, 5)), affine


def points_of(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def front(points: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """A travelling front's profile: u = 1/2 on a sphere that is a little longer front to back, 6 mm wide."""
    far = np.linalg.norm((points - centre) / np.array([1.0, 1.25, 0.9]), axis=-1)
    return 1.0 / (1.0 + np.exp((far - radius) / 6.0))


def estimate(value: float, truth: float | None, unit: str = "mm") -> dict[str, object]:
    width = 0.1 * abs(value)
    return {"value": value, "unit": unit, "interval": [value - width, value + width], "truth": truth}


def report() -> dict[str, object]:
    parameters = {
        "D_white": estimate(0.26, 0.3, "mm^2/day"),
        "rho": estimate(0.047, 0.045, "1/day"),
        "age": estimate(217.0, None, "day"),
        **{f"seed_{axis}": estimate(FOUND[i], SEED[i]) for i, axis in enumerate("xyz")},
    }
    rows: list[dict[str, float | None]] = [
        {"iteration": k, "stage": k // 8, "misfit": 10.0 + 0.5**k, "gradient_norm": 0.3**k} for k in range(12)
    ]
    rows[-1]["gradient_norm"] = None
    return {
        "case": "synthetic <1>",
        "kind": "identify",
        "estimates": parameters,
        "stopping": {"rule": "StepTolerance", "step": 1e-5},
        "level": 0.9,
        "counts": {"forward": 20, "adjoint": 12},
        "history": rows,
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result on MNI152 at 4 mm: densities of two days, made by formulas; recovered differs from true."""
    folder = tmp_path_factory.mktemp("result")
    (folder / "maps").mkdir()
    white, affine = block_means(load_mni152_wm_template(resolution=1), 4)
    grey, _ = block_means(load_mni152_gm_template(resolution=1), 4)
    labels, _ = ndimage.label(white + grey >= 0.5)
    brain = labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1
    points = points_of(brain.shape, affine)
    maps = {"white": white, "grey": grey, "brain": brain}
    for day, radius in ((0, 12.0), (60, 20.0)):
        maps[f"truth_day{day}"] = brain * front(points, SEED, radius)
        maps[f"density_day{day}"] = brain * front(points, FOUND, radius + 1.0)
        maps[f"scan_day{day}_oedema"] = brain / (1 + np.exp(-(front(points, SEED, radius) - 0.16) / 0.03))
    for name, values in maps.items():
        write(folder, name, values, affine)
    write(folder, "t1", *block_means(load_mni152_template(resolution=1), 2))
    (folder / "result.json").write_text(json.dumps(report()))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "result", ignore=shutil.ignore_patterns("pictures")))


@pytest.fixture(scope="module")
def surfaces(original: Path) -> Surfaces:
    return Surfaces(ResultFolder(original))


def write(folder: Path, name: str, values: np.ndarray, affine: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), folder / "maps" / f"{name}.nii.gz")


def change(folder: Path, **entries: object) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def overwrite(folder: Path, name: str, value: float) -> None:
    path = folder / "maps" / f"{name}.nii.gz"
    image = nibabel.Nifti1Image.from_filename(path)
    nibabel.save(nibabel.Nifti1Image(np.full(image.shape, value, dtype=np.float32), image.affine), path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=float)


OTHERS = ["fields", "source"]  # of other searches, tested with their scripts


# -- the files ---------------------------------------------------------------------------------------------


def test_every_picture_is_made_at_the_size_asked_for_and_shows_something(folder: Path) -> None:
    made = make(folder, size=SIZE)
    assert [note.partition(":")[0] for note in made.notes] == OTHERS
    assert [path.stem for path in made.paths] == [*(k for k in KINDS[:-1] if k not in OTHERS), "turn"]
    for path in made.paths[:-1]:
        image = pixels(path)
        assert image.shape == (SIZE[1], SIZE[0], 3), path.name
        assert image.std() > 10, path.name
        quarters = [half for rows in np.array_split(image, 2) for half in np.array_split(rows, 2, axis=1)]
        assert min(quarter.std() for quarter in quarters) > 3, path.name


def test_pictures_are_deterministic(original: Path, tmp_path: Path) -> None:
    kinds = ["glass", "slices", "html"]
    copies = [Path(shutil.copytree(original, tmp_path / str(number))) for number in range(2)]
    first, second = (make(copy, kinds, SIZE).paths for copy in copies)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"rule": "StepTolerance"}, "step tolerance"),
        ("max_iterations", "max iterations"),
        (None, "not recorded"),
    ],
)
def test_the_stopping_rule_is_told_in_words(folder: Path, stored: object, words: str) -> None:
    change(folder, stopping=stored)
    assert plots.stopping(ResultFolder(folder)) == words


def test_estimates_have_the_digits_that_their_intervals_justify() -> None:
    narrow = plots.numbers(Estimate("seed_y", -13.99371, "mm", (-14.0125, -13.9779), -14.0))
    assert narrow == {
        "truth": "\N{MINUS SIGN}14.000",
        "estimate": "\N{MINUS SIGN}13.994",
        "interval": "\N{MINUS SIGN}14.012 to \N{MINUS SIGN}13.978",
    }
    assert plots.numbers(Estimate("age", 217.4, "day", (150.2, 310.9), None))["interval"] == "150 to 311"
    assert plots.numbers(Estimate("rho", 0.0247, "1/day", None, None)) == {
        "truth": "",
        "estimate": "0.0247",
        "interval": "",
    }


def test_the_names_of_the_pictures_agree() -> None:
    assert tuple(kind.value for kind in visualise.Kind) == KINDS


# -- surfaces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)])
def test_isosurface_of_a_ball_in_any_orientation(signs: tuple[int, int, int]) -> None:
    affine = np.diag([*(np.array(signs) * [1.5, 2.0, 2.5]), 1.0])
    affine[:3, 3] = [40.0, -30.0, 12.0]
    shape = (48, 40, 34)
    centre = affine[:3, :3] @ (np.array(shape) / 2) + affine[:3, 3]
    distance = np.linalg.norm(points_of(shape, affine) - centre, axis=-1)
    for smoothing in (0, 40):
        ball = isosurface(regrid(Map(30.0 - distance, affine)), 10.0, smoothing)
        assert ball.is_manifold
        assert ball.volume == pytest.approx(4 / 3 * np.pi * 20.0**3, rel=0.01)
        assert np.allclose(ball.center, centre, atol=0.1)
        outwards = np.einsum("ij,ij->i", np.asarray(ball.active_normals), np.asarray(ball.points) - centre)
        assert (outwards > 0).all()


def test_volume_of_the_true_surface_is_that_of_its_voxels(surfaces: Surfaces) -> None:
    results = surfaces.results
    for outline in results.outlines(60.0):
        field = results.map(outline.name)
        voxels = np.count_nonzero(field.values > outline.edge) * abs(np.linalg.det(field.affine[:3, :3]))
        assert isosurface(field, outline.edge).volume == pytest.approx(voxels, rel=0.06), outline
        assert surfaces.of(outline).volume == pytest.approx(voxels, rel=0.06), outline


def test_a_density_that_fills_the_grid_is_closed_at_its_edge() -> None:
    box = isosurface(Map(np.ones((6, 7, 8)), np.diag([2.0, 2.0, 2.0, 1.0])), 0.5)
    assert box.is_manifold
    assert box.bounds[1] - box.bounds[0] == pytest.approx(12.0)


@pytest.mark.parametrize("spacing", [0.7, 1.0, 2.0, 3.0, 4.0])
def test_regridding_keeps_integral_and_place(spacing: float) -> None:
    affine = np.diag([-spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [5.0, 6.0, 7.0]
    middle = affine[:3, :3] @ [12.0, 13.0, 14.0] + affine[:3, 3]
    away = np.linalg.norm(points_of((25, 27, 29), affine) - middle, axis=-1) / spacing
    values = np.exp(-(away**2) / 8)
    field = Map(values, affine)
    other = regrid(field)
    assert 1.0 <= other.spacing <= 2.3
    assert other.values.sum() * other.voxel_volume == pytest.approx(
        values.sum() * field.voxel_volume, rel=1e-9
    )
    centres = [
        np.tensordot(m.values, points_of(m.values.shape, m.affine), 3) / m.values.sum()
        for m in (field, other)
    ]
    assert np.allclose(centres[0], centres[1], atol=1e-9)


def test_the_shell_encloses_the_brain(surfaces: Surfaces) -> None:
    brain = surfaces.results.map("brain")
    inside = brain.points(np.argwhere(brain.values > 0.5))
    points = np.asarray(surfaces.shell.points)
    assert surfaces.shell.is_manifold
    assert np.abs(points.min(axis=0) - inside.min(axis=0)).max() < 4.0
    assert np.abs(points.max(axis=0) - inside.max(axis=0)).max() < 4.0
    cortex = np.asarray(surfaces.shell["cortex"])
    assert cortex.min() >= 0 and cortex.max() <= 1 and cortex.std() > 0.1


def test_offset_between_concentric_balls() -> None:
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    distance = np.linalg.norm(points_of((44, 44, 44), affine) - 32.25, axis=-1)
    small, large = (isosurface(Map(40.0 - distance, affine), 40.0 - radius) for radius in (20.0, 23.0))
    assert np.allclose(closeups.offset(large, small)["offset"], 3.0, atol=0.1)
    assert np.allclose(closeups.offset(small, large)["offset"], -3.0, atol=0.1)


# -- views -------------------------------------------------------------------------------------------------


def test_scale_and_place_in_a_rendering() -> None:
    """A ball of 20 mm radius is drawn where the view says, as large as the scale bar says."""
    display.require()
    centre = np.array([12.0, -7.0, 31.0])
    affine = np.eye(4)
    affine[:3, 3] = centre - 25.0
    distance = np.linalg.norm(points_of((51, 51, 51), affine) - centre, axis=-1)
    ball = isosurface(Map(40.0 - distance, affine), 20.0)
    corners = centre + 40.0 * np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)])
    view = View.fit(corners, np.array([0.6, 0.8, 0.5]), SIZE, (0.1, 0.05, 0.6, 0.95))
    drawn = rendering.render([Layer(ball, "#0072B2")], view, plain=True).sum(axis=2) < 530  # half covered
    rows, columns = np.nonzero(drawn)
    assert view.shares(40.0) * SIZE[0] == pytest.approx(np.ptp(columns) + 1, abs=2)
    column, row = view.pixels(centre[None])[0]
    assert (columns.min() + columns.max()) / 2 == pytest.approx(column, abs=1)
    assert (rows.min() + rows.max()) / 2 == pytest.approx(row, abs=1)
    depth = rendering.front(ball, view)
    assert depth[round(row), round(column)] == pytest.approx(centre @ view.towards + 20.0, abs=0.05)
    assert np.isinf(depth[0, 0])


def test_fit_fills_its_box() -> None:
    points = np.random.default_rng(3).normal(size=(200, 3)) * [30.0, 60.0, 20.0] + [5.0, -4.0, 9.0]
    box = (0.05, 0.2, 0.7, 0.9)
    view = View.fit(points, np.array([-1.0, 1.0, 0.7]), SIZE, box)
    column, row = (view.pixels(points) / [SIZE[0] - 1, SIZE[1] - 1]).T
    low, high = np.array([column.min(), 1 - row.max()]), np.array([column.max(), 1 - row.min()])
    assert (low > np.array(box[:2]) - 2e-3).all() and (high < np.array(box[2:]) + 2e-3).all()
    assert np.allclose((low + high) / 2, [0.375, 0.55], atol=2e-3)
    assert max((high - low) / [0.65, 0.7]) == pytest.approx(1.0, abs=5e-3)


def test_points_behind_their_own_surface_are_hidden(surfaces: Surfaces) -> None:
    behind = glass.hidden(surfaces.shell, np.array([1.0, 0.0, 0.0]))
    x = np.asarray(surfaces.shell.points)[:, 0]
    assert behind[x > x.max() - 5].max() < 0.05
    assert behind[x < x.min() + 5].min() == 1.0


@pytest.mark.parametrize(
    ("limit", "length"), [(0.7, 0.5), (1.0, 1.0), (19.9, 10.0), (20.0, 20.0), (83.0, 50.0)]
)
def test_scale_bars_have_round_lengths(limit: float, length: float) -> None:
    assert style.nice_length(limit) == pytest.approx(length)


# -- slices ------------------------------------------------------------------------------------------------


def test_slices_are_radiological() -> None:
    """The patient's right (+x) and front (+y, sagittal) are on the left; head and front are up."""
    for plane in PLANES:
        across, upwards, points = Window(plane, SEED, np.zeros(3), (30.0, 20.0), 0.5).grid()
        assert across[0] == 30.0 and across[-1] == -30.0
        assert upwards[0] == -20.0 and upwards[-1] == 20.0
        assert (points[..., plane.normal] == SEED[plane.normal]).all()
        assert (points[3, 5, [plane.across, plane.upwards]] == [across[5], upwards[3]]).all()
    assert [plane.letters for plane in PLANES] == [tuple("RLPA"), tuple("RLIS"), tuple("APIS")]


def test_a_tumour_on_the_right_is_coloured_on_the_left_of_the_picture(folder: Path) -> None:
    with_tumour = pixels(make(folder, ["slices"], SIZE).paths[0])
    colourful = np.ptp(with_tumour, axis=2) > 40
    axial = colourful[int(0.1 * SIZE[1]) : int(0.49 * SIZE[1]), int(0.07 * SIZE[0]) : int(0.33 * SIZE[0])]
    columns = np.nonzero(axial.any(axis=0))[0]
    assert columns.mean() < axial.shape[1] / 2
    rows = np.nonzero(axial.any(axis=1))[0]
    assert rows.mean() > axial.shape[0] / 2  # behind the brain's middle: below it


def test_without_a_t1_the_tissue_is_shown(folder: Path) -> None:
    (folder / "maps" / "t1.nii.gz").unlink()
    assert pixels(make(folder, ["slices"], SIZE).paths[0]).std() > 10


# -- the page ----------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_holds_the_surfaces(folder: Path, surfaces: Surfaces) -> None:
    path = make(folder, ["html"]).paths[0]
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 15e6
    assert not re.search(r"https?:|\bsrc\s*=|\bhref\s*=|@import|url\(|import\s*\(|fetch\(", page)
    assert "synthetic &lt;1&gt;" in page and "synthetic <1>" not in page
    assert not re.search(r"@[A-Z]+@", page)
    scene = json.loads(re.search(PAGE_SCENE, page).group(1))  # type: ignore[union-attr]
    data = zlib.decompress(base64.b64decode(re.search(PAGE_DATA, page).group(1)))  # type: ignore[union-attr]
    assert [layer["name"] for layer in scene["layers"]][:3] == ["Brain", "Truth, u = 0.6", "Truth, u = 0.16"]
    offset, volumes = 0, {}
    for layer in scene["layers"]:
        count, indices = layer["points"], layer["indices"]
        places = np.frombuffer(data, "<u2", 3 * count, offset).reshape(-1, 3) / 65535
        shape = np.frombuffer(data, "<i2", 4 * count, offset + 6 * count).reshape(-1, 4) / 32767
        order = np.cumsum(np.frombuffer(data, "<i4", indices, offset + 14 * count))
        offset += 14 * count + 4 * indices
        assert np.allclose(np.linalg.norm(shape[:, :3], axis=1), 1.0, atol=1e-3)
        a, b, c = (np.array(scene["low"]) + places * scene["span"])[order.reshape(-1, 3)].transpose(1, 0, 2)
        volumes[layer["name"]] = np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6  # divergence theorem
    assert offset == len(data)
    for outline in surfaces.results.outlines(60.0)[:2]:
        found = volumes[f"Truth, u = {outline.level:g}"]
        assert found == pytest.approx(surfaces.of(outline).volume, rel=0.01)


def test_large_surfaces_are_decimated_on_the_page(
    folder: Path, surfaces: Surfaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turning, "TRIANGLES", 5_000)
    page = turning.draw(surfaces, folder / "turn.html").read_text(encoding="utf-8")
    scene = json.loads(re.search(PAGE_SCENE, page).group(1))  # type: ignore[union-attr]
    assert 1_000 < scene["layers"][0]["indices"] / 3 < 10_000


# -- other results -----------------------------------------------------------------------------------------


def test_a_patient_without_truth_is_compared_with_the_scan(folder: Path) -> None:
    for path in (folder / "maps").glob("truth_*"):
        path.unlink()
    results = ResultFolder(folder)
    labels = [(outline.label, outline.level, outline.edge) for outline in results.outlines(60.0)]
    assert labels == [("Recovered", 0.16, 0.16), ("Recovered", 0.6, 0.6), ("Scan", 0.16, 0.5)]
    assert len(make(folder, ["glass", "growth"], SIZE).paths) == 2


def test_a_simulation_leaves_out_what_it_cannot_have(folder: Path) -> None:
    change(folder, kind="simulate", estimates={}, history=[], parameters={"x": 1.0, "y": 2.0, "z": 3.0})
    for path in (folder / "maps").glob("truth_*"):
        path.unlink()
    made = make(folder, size=SIZE)
    assert {path.name for path in made.paths} == {"glass.png", "slices.png", "growth.png", "turn.html"}
    assert [note.split(":")[0] for note in made.notes] == ["convergence", "estimates", *OTHERS]
    assert (ResultFolder(folder).seed()[0] == [1.0, 2.0, 3.0]).all()


def test_zero_density_still_has_slices(folder: Path) -> None:
    for path in [*(folder / "maps").glob("truth_*"), *(folder / "maps").glob("scan_*")]:
        path.unlink()
    for day in (0, 60):
        overwrite(folder, f"density_day{day}", 0.0)
    made = make(folder, size=SIZE)
    assert {path.name for path in made.paths} == {"slices.png", "convergence.png", "estimates.png"}
    notes = [note for note in made.notes if note.partition(":")[0] not in OTHERS]
    assert all("density_day60.nii.gz is zero everywhere" in note for note in notes)
    with pytest.raises(Inapplicable, match="is zero everywhere"):
        make(folder, ["glass"], SIZE)


def test_one_day_has_no_growth(folder: Path) -> None:
    (folder / "maps" / "density_day0.nii.gz").unlink()
    with pytest.raises(Inapplicable, match="two or more days"):
        make(folder, ["growth"], SIZE)


def test_the_day_with_something_to_compare_is_shown(folder: Path) -> None:
    shutil.copy(folder / "maps" / "density_day60.nii.gz", folder / "maps" / "density_day-12.5.nii.gz")
    shutil.copy(folder / "maps" / "density_day60.nii.gz", folder / "maps" / "density_day120.nii.gz")
    results = ResultFolder(folder)
    assert list(results.days("density")) == [-12.5, 0.0, 60.0, 120.0]
    assert results.day == 60.0


def test_the_seed_is_read_from_the_estimates(folder: Path) -> None:
    found, truth = ResultFolder(folder).seed()
    assert np.allclose(found, FOUND) and truth is not None and np.allclose(truth, SEED)
    change(folder, estimates={})
    centre, unknown = ResultFolder(folder).seed()
    assert np.linalg.norm(centre - FOUND) < 6.0 and unknown is None


# -- errors ------------------------------------------------------------------------------------------------


def spoil_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_report(folder: Path) -> None:
    (folder / "result.json").unlink()


def spoil_json(folder: Path) -> None:
    (folder / "result.json").write_text("{")


def spoil_list(folder: Path) -> None:
    (folder / "result.json").write_text("[]")


def spoil_map(folder: Path) -> None:
    (folder / "maps" / "brain.nii.gz").unlink()


def spoil_bytes(folder: Path) -> None:
    (folder / "maps" / "brain.nii.gz").write_bytes(b"no image")


def spoil_values(folder: Path) -> None:
    overwrite(folder, "density_day60", float("nan"))


def spoil_densities(folder: Path) -> None:
    for path in (folder / "maps").glob("density_*"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_folder, "no such folder; make it with"),
        (spoil_report, r"result\.json is missing: the run has not finished"),
        (spoil_json, r"result\.json is not valid JSON"),
        (spoil_list, r"result\.json is not"),
        (spoil_map, r"maps/brain\.nii\.gz is missing"),
        (spoil_bytes, r"maps/brain\.nii\.gz cannot be read"),
        (spoil_values, r"maps/density_day60\.nii\.gz holds values that are not finite"),
        (spoil_densities, r"maps/density_day<T>\.nii\.gz is missing"),
    ],
)
def test_a_spoiled_folder_is_one_clear_line(folder: Path, spoil: object, message: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(GliodeError, match=message) as caught:
        make(folder, size=SIZE)
    assert "\n" not in str(caught.value)


def test_a_malformed_estimate_names_its_key(folder: Path) -> None:
    change(folder, estimates={"rho": {"unit": "1/day"}})
    with pytest.raises(GliodeError, match=r"estimates\.rho needs value"):
        make(folder, ["estimates"], SIZE)


def test_a_malformed_history_is_named(folder: Path) -> None:
    change(folder, history=[{"misfit": 1.0}])
    with pytest.raises(GliodeError, match="history needs iteration"):
        make(folder, ["convergence"], SIZE)


def test_unknown_kinds_and_sizes(folder: Path) -> None:
    with pytest.raises(GliodeError, match="'film' is not one of glass"):
        make(folder, ["film"])
    with pytest.raises(GliodeError, match="size 100x9000: each side is between"):
        make(folder, size=(100, 9000))


def test_where_nothing_renders_the_flat_pictures_are_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "PROBE", "raise SystemExit(1)")
    display.require.cache_clear()
    try:
        made = make(folder, size=SIZE)
        assert {path.name for path in made.paths} == {
            "slices.png",
            "convergence.png",
            "estimates.png",
            "turn.html",
        }
        notes = [note for note in made.notes if note.partition(":")[0] not in OTHERS]
        assert len(notes) == 2 and all("apt-get install libegl1" in note for note in notes)
    finally:
        display.require.cache_clear()


def test_the_script_prints_paths_or_one_line(folder: Path) -> None:
    import typer

    program = typer.Typer(pretty_exceptions_enable=False)
    program.command()(visualise.main)
    run = CliRunner().invoke
    done = run(program, [str(folder), "--only", "convergence", "--only", "estimates", "--size", "640x480"])
    assert done.exit_code == 0
    written = [folder / "pictures" / f"{kind}.png" for kind in ("convergence", "estimates")]
    assert done.stdout.split() == [str(path) for path in written]
    assert pixels(folder / "pictures" / "estimates.png").shape == (480, 640, 3)
    assert run(program, [str(folder), "--size", "640"]).exit_code == 2
    failed = run(program, [str(folder / "none")])
    assert failed.exit_code == 2
    assert len(failed.output.strip().splitlines()) == 1 and "no such folder" in failed.output
