"""Anatomy, NIfTI files and voxel averages, against closed forms and plain NumPy."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.make_nifti_case import label_map, main, write_case_folder
from solvers.errors import GliodeError
from tumour.anatomy import Anatomy, from_labels, from_nifti, mni152, read_segmentation
from tumour.nifti import Grid, average_onto, read_nifti, reorient, write_nifti

ORIENTATIONS = ["RAS", "LPS", "LAS", "PIR", "SPL", "IRP", "ASL"]
SHAPE = (12, 10, 8)
AFFINE = np.array([[1.0, 0, 0, -7.5], [0, 1.5, 0, 3], [0, 0, 3, -20], [0, 0, 0, 1]])
CENTRE = AFFINE[:3, :3] @ [6, 5, 4] + AFFINE[:3, 3]


def tissues(seed: int = 0) -> dict[str, np.ndarray]:
    """A brick of brain with a random mixture, one voxel short of the faces, in steps of 1/64."""
    white = np.random.default_rng(seed).integers(0, 49, SHAPE) / 64
    parts = {"white": white, "grey": 0.75 - white, "fluid": np.full(SHAPE, 0.25)}
    inside = np.zeros(SHAPE)
    inside[1:-1, 1:-1, 1:-1] = 1
    return {name: part * inside for name, part in parts.items()}


def example(affine: np.ndarray = AFFINE) -> Anatomy:
    return build(affine=affine, t1=np.arange(960.0).reshape(SHAPE))


def build(**changes: Any) -> Anatomy:
    return Anatomy(**{**tissues(), "affine": AFFINE, "source": "example", **changes})


def turned(degrees: float = 30) -> np.ndarray:
    """AFFINE turned about z and tipped about x."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = AFFINE.copy()
    affine[:3, :3] = (
        [[c, -s, 0], [s, c, 0], [0, 0, 1]] @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ affine[:3, :3]
    )
    return affine


def save(
    folder: Path, affine: np.ndarray = AFFINE, codes: str = "RAS", /, **arrays: np.ndarray
) -> dict[str, Path]:
    for name, array in arrays.items():
        write_nifti(folder / f"{name}.nii.gz", *reorient(array, affine, codes))
    return {name: folder / f"{name}.nii.gz" for name in arrays}


def load(path: Path) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_filename(path)


def ball(shape: tuple[int, ...], affine: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    points = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    return (np.linalg.norm(points - centre, axis=-1) <= radius).astype(float)


# ---- orientation and grids


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_any_orientation_gives_the_same_brain_and_goes_back_exactly(codes: str, tmp_path: Path) -> None:
    parts = tissues()
    anatomy = from_nifti(**save(tmp_path, AFFINE, codes, **parts, t1=np.arange(960.0).reshape(SHAPE)))
    for name, part in parts.items():
        np.testing.assert_array_equal(getattr(anatomy, name), part)
    np.testing.assert_array_equal(anatomy.t1, np.arange(960.0).reshape(SHAPE))
    np.testing.assert_allclose(anatomy.affine, AFFINE, rtol=0, atol=1e-13)
    np.testing.assert_allclose(anatomy.spacing, [1, 1.5, 3])

    anatomy.write(tmp_path / "back.nii.gz", anatomy.white)
    stored, back = load(tmp_path / "white.nii.gz"), load(tmp_path / "back.nii.gz")
    assert nib.aff2axcodes(back.affine) == tuple(codes)
    np.testing.assert_array_equal(back.get_fdata(), stored.get_fdata())
    np.testing.assert_array_equal(back.affine, stored.affine)


@pytest.mark.parametrize("codes", ["RAS", "PIR"])
def test_a_turned_scan_keeps_its_place(codes: str, tmp_path: Path) -> None:
    parts = tissues()
    anatomy = from_nifti(**save(tmp_path, turned(), codes, **parts))
    np.testing.assert_array_equal(anatomy.white, parts["white"])
    np.testing.assert_allclose(anatomy.affine, turned(), atol=1e-5)  # the header is float32
    anatomy.write(tmp_path / "back.nii", anatomy.grey)
    np.testing.assert_array_equal(
        load(tmp_path / "back.nii").get_fdata(), load(tmp_path / "grey.nii.gz").dataobj
    )


def test_index_and_contains() -> None:
    anatomy = example(turned())
    voxels = np.array(
        [[0, 0, 0], [1, 1, 1], [0.51, 1, 1], [0.49, 1, 1], [10, 8, 6], [10.6, 8, 6], [-30, 2, 2], [3, 3, 99]]
    )
    points = voxels @ anatomy.affine[:3, :3].T + anatomy.affine[:3, 3]
    np.testing.assert_allclose(anatomy.index(points), voxels, atol=1e-12)
    assert anatomy.contains(points).tolist() == [False, True, True, False, True, False, False, False]
    assert not anatomy.contains(np.array([[np.nan, 0, 0], [np.inf, 0, 0]])).any()


def test_coarsen_is_the_block_mean_of_the_padded_map() -> None:
    anatomy = example()
    coarse = anatomy.coarsen(3)
    assert coarse.shape == (4, 4, 3)
    for name in ("white", "grey", "fluid", "t1"):
        padded = np.pad(getattr(anatomy, name), [(0, 0), (0, 2), (0, 1)])
        blocks = padded.reshape(4, 3, 4, 3, 3, 3).mean(axis=(1, 3, 5))
        np.testing.assert_allclose(getattr(coarse, name), blocks, rtol=1e-14, atol=1e-16)
    np.testing.assert_array_equal(coarse.affine[:3, :3], 3 * AFFINE[:3, :3])
    np.testing.assert_allclose(coarse.index(CENTRE), (np.array([6, 5, 4]) - 1) / 3, atol=1e-14)
    assert anatomy.coarsen(1).white.tolist() == anatomy.white.tolist()


def test_resample_by_a_fraction_is_exact() -> None:
    anatomy = example()
    parts = anatomy.resample(anatomy.spacing * 2.5)
    halves = (
        anatomy.white.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    )  # 24 x 20 x 16 half voxels, five to a new one
    blocks = np.pad(halves, [(0, 1), (0, 0), (0, 4)]).reshape(5, 5, 4, 5, 4, 5).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(parts.white, blocks, rtol=1e-13, atol=1e-16)


def test_resample_anisotropic_voxels_keeps_volume_and_corner() -> None:
    anatomy = example(turned())
    cubes = anatomy.resample(2.7)
    np.testing.assert_allclose(cubes.spacing, 2.7)
    assert cubes.shape == (5, 6, 9)  # 12, 15 and 24 mm
    for name in ("white", "grey", "fluid"):
        volume = getattr(anatomy, name).sum() * 4.5
        assert getattr(cubes, name).sum() * 2.7**3 == pytest.approx(volume, rel=1e-12)
    corner = anatomy.affine @ [-0.5, -0.5, -0.5, 1]
    np.testing.assert_allclose(cubes.index(corner[:3]), -0.5, atol=1e-12)


def test_coarsened_results_go_back_to_the_stored_grid(tmp_path: Path) -> None:
    coarse = from_nifti(**save(tmp_path, AFFINE, "SPL", **tissues())).coarsen(2)
    density = np.random.default_rng(1).random(coarse.shape)
    coarse.write(tmp_path / "u.nii", density)
    image = load(tmp_path / "u.nii")
    assert nib.aff2axcodes(image.affine) == ("S", "P", "L")
    back = nib.as_closest_canonical(image).get_fdata()
    np.testing.assert_allclose(back, density.repeat(2, 0).repeat(2, 1).repeat(2, 2), rtol=1e-6)


def test_average_between_turned_grids() -> None:
    fine = Grid((40, 40, 40), np.diag([1.0, 1, 1, 1]))
    coarse = Grid((30, 30, 30), np.array(turned(20)))
    coarse.affine[:3, :3] *= 1.2
    coarse.affine[:3, 3] = np.array([20.0, 20, 20]) - coarse.affine[:3, :3] @ [14.5, 14.5, 14.5]
    centre = np.array([19.0, 21, 20])
    fractions = average_onto(ball(fine.shape, fine.affine, centre, 9), fine.affine, coarse)
    assert fractions.min() >= 0
    assert fractions.max() == 1
    volume = fractions.sum() * np.linalg.det(coarse.affine[:3, :3])
    assert volume == pytest.approx(ball(fine.shape, fine.affine, centre, 9).sum(), rel=0.01)
    where = [np.average(i, weights=fractions) for i in np.indices(coarse.shape)]
    np.testing.assert_allclose(coarse.affine[:3, :3] @ where + coarse.affine[:3, 3], centre, atol=0.1)


# ---- fractions, labels, islands


def test_fluid_is_what_is_left_inside(tmp_path: Path) -> None:
    parts = tissues()
    parts["white"][5:7, 4:6, 3:5] = 0.125  # a ventricle, closed in
    parts["grey"][5:7, 4:6, 3:5] = 0
    paths = save(tmp_path, white=parts["white"], grey=parts["grey"])
    anatomy = from_nifti(**paths)
    expected = parts["fluid"].copy()
    expected[5:7, 4:6, 3:5] = 0.875
    np.testing.assert_array_equal(anatomy.fluid, expected)
    assert not anatomy.brain[5:7, 4:6, 3:5].any()


def test_sums_above_one_by_rounding_are_scaled(tmp_path: Path) -> None:
    parts = tissues()
    anatomy = from_nifti(
        **save(tmp_path, white=parts["white"], grey=parts["grey"], fluid=parts["fluid"] * 1.01)
    )
    total = anatomy.white + anatomy.grey + anatomy.fluid
    assert total.max() <= 1 + 1e-12
    assert anatomy.white[5, 5, 5] == pytest.approx(parts["white"][5, 5, 5] / 1.0025, rel=1e-6)


def test_labels(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, dtype=int)
    labels[1:-1, 1:-1, 1:-1] = 2
    labels[3:6, 2:5, 2:5] = 3
    labels[7:9, 4:6, 3:5] = 1
    (path,) = save(tmp_path, AFFINE, "PIR", seg=labels).values()
    anatomy = from_labels(path)
    for name, number in (("fluid", 1), ("grey", 2), ("white", 3)):
        np.testing.assert_array_equal(getattr(anatomy, name), labels == number)
    several = from_labels(path, {"white": [1, 3], "grey": 2})
    np.testing.assert_array_equal(several.white, np.isin(labels, (1, 3)))
    assert not several.fluid.any()


def test_islands_are_dropped_with_a_warning(tmp_path: Path) -> None:
    parts = tissues()
    for part in parts.values():
        part[9] = 0  # plane 10 is now apart: 48 of 480 voxels
        part[10, 6:] = 0
    with pytest.warns(UserWarning, match=r"white.*30 voxels in islands"):
        anatomy = from_nifti(**save(tmp_path, **parts))
    assert anatomy.brain[1:9, 1:9, 1:7].all()
    assert np.count_nonzero(anatomy.brain) == 8 * 8 * 6


def test_trailing_axes_of_one_are_no_fourth_dimension(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((2, 3, 4, 1), dtype=np.float32), np.eye(4)), tmp_path / "x.nii")
    assert read_nifti(tmp_path / "x.nii").data.shape == (2, 3, 4)


def test_anatomy_is_frozen() -> None:
    anatomy = example()
    with pytest.raises(FrozenInstanceError):
        anatomy.white = anatomy.grey  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        anatomy.brain[0, 0, 0] = True


# ---- segmentations


@pytest.mark.parametrize("enhancing", [3, 4])
def test_segmentation_on_a_finer_grid_in_another_orientation(enhancing: int, tmp_path: Path) -> None:
    """Voxels of 0.5 x 0.5 x 1 mm: the fractions are counts of 2 x 3 x 3 of them."""
    fine = AFFINE @ np.diag([1 / 2, 1 / 3, 1 / 3, 1])
    fine[:3, 3] += AFFINE[:3, :3] @ (np.array([1 / 2, 1 / 3, 1 / 3]) - 1) / 2
    labels = np.zeros((24, 30, 24), dtype=int)
    drawn = np.random.default_rng(2).choice([0, 1, 2, enhancing], (8, 15, 9))
    labels[6:14, 7:22, 8:17] = drawn
    (path,) = save(tmp_path, fine, "ASL", tumour=labels).values()
    found = read_segmentation(path, example())
    for kind, number in (("necrotic", 1), ("oedema", 2), ("enhancing", enhancing)):
        counts = (labels == number).reshape(12, 2, 10, 3, 8, 3).mean(axis=(1, 3, 5))
        np.testing.assert_allclose(found[kind], counts, atol=1e-6)


def test_segmentation_half_a_voxel_off(tmp_path: Path) -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] += 0.5
    labels = np.zeros(SHAPE, dtype=int)
    labels[5, 4, 3] = 2
    (path,) = save(tmp_path, shifted, tumour=labels).values()
    oedema = read_segmentation(path, example())["oedema"]
    assert oedema[5:7, 4, 3].tolist() == [0.5, 0.5]
    assert oedema.sum() == 1


def test_segmentation_in_a_turned_scan_keeps_volume(tmp_path: Path) -> None:
    shape, affine = (40, 40, 40), turned(25) @ np.diag([0.5, 1 / 3, 1 / 6, 1])
    affine[:3, 3] = CENTRE - affine[:3, :3] @ [19.5, 19.5, 19.5]
    labels = (4 * ball(shape, affine, CENTRE, 3.5)).astype(int)
    (path,) = save(tmp_path, affine, tumour=labels).values()
    volume = read_segmentation(path, example())["enhancing"].sum() * 4.5
    assert volume == pytest.approx(4 / 3 * np.pi * 3.5**3, rel=0.03)


# ---- errors: each names the file and the way out


def refuses(what: Callable[[], object], *words: str) -> None:
    with pytest.raises(GliodeError) as caught:
        what()
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"


def test_missing_file(tmp_path: Path) -> None:
    refuses(
        lambda: from_nifti(tmp_path / "no.nii.gz", tmp_path / "no.nii"),
        r"no\.nii\.gz",
        "no such file",
        "Give",
    )
    refuses(lambda: read_nifti(tmp_path), "no such file")


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_truncated_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_nifti(path, np.random.default_rng(0).random(SHAPE), AFFINE)
    whole = path.read_bytes()
    for length in (0, 3, 100, 400, len(whole) - 100, len(whole) - 9):
        path.write_bytes(whole[:length])
        refuses(lambda: read_nifti(path), re.escape(str(path)), "not readable|truncated", "Copy or export")


def test_not_nifti(tmp_path: Path) -> None:
    (tmp_path / "text.nii").write_text("not an image " * 99)
    refuses(lambda: read_nifti(tmp_path / "text.nii"), r"text\.nii", "not readable as NIfTI")
    nib.save(nib.MGHImage(np.ones(SHAPE, dtype=np.float32), np.eye(4)), tmp_path / "x.mgz")
    refuses(lambda: read_nifti(tmp_path / "x.mgz"), r"x\.mgz", "MGHImage, not NIfTI", "mri_convert")


def test_damaged_compression(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    write_nifti(path, np.random.default_rng(0).random(SHAPE), AFFINE)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 64] = bytes(64)
    path.write_bytes(raw)
    refuses(lambda: read_nifti(path), r"x\.nii\.gz", "damaged")


@pytest.mark.parametrize("shape", [(5, 5), (4, 4, 4, 2)])
def test_not_three_dimensional(shape: tuple[int, ...], tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones(shape, dtype=np.float32), np.eye(4)), tmp_path / "x.nii")
    refuses(lambda: read_nifti(tmp_path / "x.nii"), r"x\.nii", "not 3-D", "Extract one volume")


def test_a_header_that_claims_too_much_is_refused_before_loading(tmp_path: Path) -> None:
    write_nifti(tmp_path / "x.nii", np.ones(SHAPE), AFFINE)
    raw = bytearray((tmp_path / "x.nii").read_bytes())
    raw[42:48] = np.array([2000, 2000, 2000], dtype="<i2").tobytes()
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    refuses(lambda: read_nifti(tmp_path / "x.nii.gz"), r"x\.nii\.gz", r"\(2000, 2000, 2000\)", "Crop")


def test_lengths_not_in_millimetres(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones(SHAPE, dtype=np.float32), AFFINE)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "x.nii")
    refuses(lambda: read_nifti(tmp_path / "x.nii"), r"x\.nii", "metres", "mm")


def test_values_that_are_no_real_numbers(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones(SHAPE, dtype=np.complex64), AFFINE), tmp_path / "x.nii")
    refuses(lambda: read_nifti(tmp_path / "x.nii"), r"x\.nii", "complex64", "one real number")


def test_no_orientation_in_the_header_warns(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones(SHAPE, dtype=np.float32), None)
    nib.save(image, tmp_path / "x.nii")
    with pytest.warns(UserWarning, match=r"x\.nii.*no orientation.*sform"):
        read_nifti(tmp_path / "x.nii")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad: float, tmp_path: Path) -> None:
    paths = save(tmp_path, **tissues())
    array = np.full(SHAPE, bad, dtype=np.float32)
    array[0] = 0
    nib.save(nib.Nifti1Image(array, AFFINE), paths["grey"])
    refuses(lambda: from_nifti(**paths), r"grey\.nii\.gz", "880 of 960 voxels are NaN", "nan_to_num")


@pytest.mark.parametrize("scale", [100.0, 255.0, -1.0])
def test_not_a_probability(scale: float, tmp_path: Path) -> None:
    parts = tissues()
    paths = save(tmp_path, white=parts["white"], grey=parts["grey"] * scale)
    refuses(lambda: from_nifti(**paths), r"grey\.nii\.gz", r"\[0, 1\]", "Divide")


def test_shapes_disagree(tmp_path: Path) -> None:
    parts = tissues()
    paths = save(tmp_path, white=parts["white"], grey=parts["grey"][:-1], t1=parts["fluid"][:, :-1])
    refuses(
        lambda: from_nifti(paths["white"], paths["grey"]), r"white\.nii\.gz and .*grey\.nii\.gz", "shapes"
    )
    refuses(
        lambda: from_nifti(paths["white"], paths["white"], t1=paths["t1"]),
        r"white.* and .*t1\.nii",
        "Resample",
    )


def test_affines_disagree(tmp_path: Path) -> None:
    parts, off = tissues(), AFFINE.copy()
    off[2, 3] += 1
    paths = save(tmp_path, white=parts["white"]) | save(tmp_path, off, grey=parts["grey"])
    refuses(
        lambda: from_nifti(**paths), r"white\.nii\.gz and .*grey\.nii\.gz", "affines disagree by up to 1 mm"
    )
    off[2, 3] -= 1 - 0.01  # 1 % of a voxel: rounding of a header
    from_nifti(**(paths | save(tmp_path, off, grey=parts["grey"])))


@pytest.mark.parametrize("name", ["white", "grey", "fluid"])
def test_empty_tissue(name: str, tmp_path: Path) -> None:
    parts = tissues()
    parts[name] = np.zeros(SHAPE)
    refuses(lambda: from_nifti(**save(tmp_path, **parts)), rf"{name}\.nii\.gz", "empty", "Check")


def test_no_brain_left(tmp_path: Path) -> None:
    parts = {name: part / 8 for name, part in tissues().items()}
    refuses(
        lambda: from_nifti(**save(tmp_path, **parts)), r"white\.nii\.gz", "no voxel is half white or grey"
    )
    refuses(lambda: example().resample(60), "example", "finer voxels")


def test_one_file_given_twice(tmp_path: Path) -> None:
    paths = save(tmp_path, white=np.pad(np.ones((10, 8, 6)), 1))
    refuses(lambda: from_nifti(paths["white"], paths["white"]), r"white\.nii\.gz", "more than 1", "twice")


def test_unusable_affines(tmp_path: Path) -> None:
    flat, sheared = AFFINE.copy(), AFFINE.copy()
    flat[:3, 1] = flat[:3, 0]
    sheared[0, 1] = 0.3
    for affine, word in ((flat, "not invertible"), (sheared, "sheared.*resample_img")):
        nib.save(nib.Nifti1Image(np.ones(SHAPE, dtype=np.float32), affine), tmp_path / "x.nii")
        refuses(lambda: read_nifti(tmp_path / "x.nii"), r"x\.nii", word)
    refuses(lambda: example(np.eye(3)), "example", "4x4")
    refuses(lambda: example(AFFINE * np.nan), "example", "finite")
    refuses(lambda: example(np.diag([1.0, 0, 1, 1])), "example", "not invertible")


def test_brain_in_pieces(tmp_path: Path) -> None:
    parts = tissues()
    for part in parts.values():
        part[6] = 0
    refuses(
        lambda: from_nifti(**save(tmp_path, **parts)),
        r"white\.nii\.gz",
        "2 pieces, the largest 56 %",
        "Repair",
    )


def test_seed_outside_the_brain() -> None:
    anatomy = example()
    anatomy.require_inside(CENTRE, "seed.position")
    corner = AFFINE[
        :3, 3
    ]  # centre of voxel (0, 0, 0); the nearest brain voxel is (1, 1, 1), sqrt(1 + 2.25 + 9) mm off
    nearest = r"3\.5 mm away, is centred at \(-6\.5, 4\.5, -17\.0\) mm"
    refuses(
        lambda: anatomy.require_inside(corner, "seed.position"),
        r"seed\.position: \(-7\.5, 3\.0, -20\.0\)",
        nearest,
    )
    refuses(lambda: anatomy.require_inside([1, 2], "seed.position"), r"seed\.position", "three finite")
    refuses(lambda: anatomy.require_inside([1, 2, np.nan], "seed.position"), "three finite")


def test_labels_at_fault(tmp_path: Path) -> None:
    parts = tissues()
    paths = save(tmp_path, seg=np.where(parts["fluid"] > 0, 2, 0), probability=parts["white"])
    refuses(
        lambda: from_labels(paths["seg"]), r"seg\.nii\.gz", "no voxel has the label 1 of fluid", "holds 0, 2"
    )
    refuses(lambda: from_labels(paths["seg"], {"white": 2}), "give the numbers of white, grey")
    refuses(lambda: from_labels(paths["seg"], {"white": 2, "grey": 2, "bone": 1}), "bone", "fluid")
    refuses(
        lambda: from_labels(paths["probability"]),
        r"probability\.nii\.gz",
        "whole numbers",
        "nearest neighbour",
    )


def test_segmentation_at_fault(tmp_path: Path) -> None:
    anatomy, labels = example(), np.zeros(SHAPE, dtype=int)
    far = AFFINE.copy()
    far[0, 3] += 8
    (path,) = save(tmp_path, seg=labels).values()
    refuses(lambda: read_segmentation(path, anatomy), r"seg\.nii\.gz", "no voxel is labelled", "1, 2, 4")
    labels[4:6, 5, 4] = 7, 2
    save(tmp_path, seg=labels)
    refuses(lambda: read_segmentation(path, anatomy), r"seg\.nii\.gz", "labels 0, 2, 7", "BraTS", "Relabel")
    labels[4:6, 5, 4] = 3, 4
    save(tmp_path, seg=labels)
    refuses(lambda: read_segmentation(path, anatomy), r"seg\.nii\.gz", "3, not both")
    labels[4:6, 5, 4] = 2
    save(tmp_path, far, seg=labels)
    refuses(lambda: read_segmentation(path, anatomy), r"seg\.nii\.gz", "only 0 %", "example", "affines")


def test_arrays_at_fault(tmp_path: Path) -> None:
    good = tissues()
    refuses(
        lambda: build(grey=good["grey"][:-1], source="here"),
        "here: grey",
        "shape",
    )
    refuses(lambda: build(grey=good["grey"] * np.nan), "grey", "not finite")
    refuses(lambda: build(fluid=good["fluid"] - 0.5), "fluid", r"\[0, 1\]")
    refuses(lambda: build(fluid=good["fluid"] * 4), "reach 1.75", "scale")
    refuses(lambda: build(t1=np.ones(3)), "t1", "shape")
    refuses(lambda: write_nifti(tmp_path / "u.nii", np.full(SHAPE, np.nan), AFFINE), r"u\.nii", "not finite")
    refuses(lambda: example().write(tmp_path / "u.nii", np.ones(3)), r"u\.nii", "shape")


def test_spacings_at_fault() -> None:
    for factor in (0, -2, 1.5, True):
        refuses(lambda: example().coarsen(factor), "factor", "whole number")  # type: ignore[arg-type]  # noqa: B023
    for spacing in (0, -1.0, np.nan, [1, 2]):
        refuses(lambda: example().resample(spacing), "spacing", "above 0")  # type: ignore[arg-type]  # noqa: B023
    refuses(lambda: example().resample(1e-3), "example", "too fine")
    for spacing in (0.5, 0, np.nan, np.inf):
        refuses(lambda: mni152(spacing), "MNI152", "1 or more")  # noqa: B023


# ---- MNI152 and the case folder


@pytest.fixture(scope="module")
def brain() -> Anatomy:
    return mni152(4.0)


def test_mni152_is_a_plausible_symmetric_brain(brain: Anatomy) -> None:
    volume = {name: getattr(brain, name).sum() * 64 / 1000 for name in ("white", "grey", "fluid")}  # ml
    assert 550 < volume["white"] < 750
    assert 850 < volume["grey"] < 1100
    assert 100 < volume["fluid"] < 400
    assert 1.4e6 < np.count_nonzero(brain.brain) * 64 < 1.9e6
    assert (brain.white + brain.grey + brain.fluid).max() <= 1 + 1e-12
    x = brain.affine[0, 0] * np.arange(brain.shape[0]) + brain.affine[0, 3]
    for part in (brain.white, brain.grey, brain.fluid):  # to 1 % of a voxel, as blocks straddle x = 0
        assert abs(np.average(x, weights=part.sum(axis=(1, 2)))) < 0.04


def test_mni152_lies_in_mni_space(brain: Anatomy) -> None:
    """The origin is the anterior commissure, on the midline under the fornix: white with fluid about."""
    np.testing.assert_array_equal(brain.spacing, 4)
    voxel = np.rint(brain.index(np.zeros(3))).astype(int)
    assert np.abs(voxel @ brain.affine[:3, :3].T + brain.affine[:3, 3]).max() <= 2
    around = tuple(slice(i - 1, i + 2) for i in voxel)
    assert brain.white[around].max() > 0.3
    assert brain.fluid[around].max() > 0.3
    deep_white, ventricle = np.array([[25.0, -20, 30]]), np.array([[6.0, 12, 12]])
    assert brain.contains(deep_white).all()
    assert brain.white[tuple(np.rint(brain.index(deep_white[0])).astype(int))] > 0.9
    assert brain.fluid[tuple(np.rint(brain.index(ventricle[0])).astype(int))] > 0.5
    brain.require_inside((25.0, -20.0, 30.0), "seed")
    refuses(lambda: brain.require_inside((80.0, 0.0, 0.0), "seed"), "seed", "MNI152")


def test_mni152_block_means_keep_the_volume(brain: Anatomy) -> None:
    from nilearn import datasets

    white = datasets.load_mni152_wm_template(resolution=1).get_fdata()
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata()
    white, grey = white / np.maximum(white + grey, 1), grey / np.maximum(white + grey, 1)
    for coarse, fine in ((brain.white, white), (brain.grey, grey)):
        assert coarse.sum() * 64 == pytest.approx(fine.sum(), rel=1e-12)
    blocks = np.pad(white, [(0, 3), (0, 3), (0, 3)]).reshape(50, 4, 59, 4, 48, 4).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(brain.white, blocks, rtol=1e-12, atol=1e-15)


def test_case_folder_reads_back(tmp_path: Path) -> None:
    anatomy = example()
    density = np.clip(1.2 - np.linalg.norm(np.indices(SHAPE).T - [6, 5, 4], axis=-1).T / 4, 0, 1)
    paths = write_case_folder(tmp_path, anatomy, {"day0": density})
    assert [path.name for path in paths] == [f"{n}.nii.gz" for n in ("white", "grey", "fluid", "t1", "day0")]
    assert nib.aff2axcodes(load(paths[0]).affine) == ("L", "S", "P")
    back = from_nifti(*paths[:4])
    for name in ("white", "grey", "fluid", "t1"):
        np.testing.assert_array_equal(getattr(back, name), getattr(anatomy, name))
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-13)
    parts = read_segmentation(paths[4], back)
    np.testing.assert_array_equal(sum(parts.values()), density >= 0.16)
    np.testing.assert_array_equal(parts["enhancing"] + parts["necrotic"], density >= 0.6)
    assert label_map(np.array([0, 0.15, 0.16, 0.6, 0.95, 1])).tolist() == [0, 0, 2, 4, 1, 1]
    refuses(lambda: write_case_folder(tmp_path, anatomy, orientation="LRS"), "LRS", "such as LPS")
    refuses(lambda: write_case_folder(tmp_path, anatomy, {"day0": density[1:]}), "day0", "shape")


def test_case_folder_script(tmp_path: Path, brain: Anatomy, capsys: pytest.CaptureFixture[str]) -> None:
    """Voxels of 2 x 2 x 4 mm divide those of the density's 4 mm, so its label map is exact."""
    density = 0.9 * ball(brain.shape, brain.affine, np.array([26.0, -20, 30]), 15)
    brain.write(tmp_path / "u.nii.gz", density)
    options = ["--out", str(tmp_path / "case"), "--spacing", "2", "2", "4", "--orientation", "PSL"]
    assert main([*options, "--density", f"day60={tmp_path / 'u.nii.gz'}"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert nib.aff2axcodes(load(written[0]).affine) == ("P", "S", "L")
    user = from_nifti(*written[:4])
    np.testing.assert_allclose(user.spacing, [2, 2, 4])
    assert user.white.sum() * 16 == pytest.approx(brain.white.sum() * 64, rel=1e-6)
    np.testing.assert_allclose(read_segmentation(written[4], brain)["enhancing"], density > 0, atol=1e-6)
    assert main([*options, "--density", "nothing"]) == 2
    assert "NAME=FILE" in capsys.readouterr().err
