"""Pictures to learn from: the split holds, squares and patches are what they say, seeds repeat."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from inverse.datasets import images
from inverse.datasets.images import (
    PROCEDURAL,
    TEST,
    TRAIN,
    VALIDATION,
    dead_leaves,
    ellipses,
    patches,
    photograph,
    square,
    textures,
    validation_images,
)
from solvers.errors import GliodeError


def test_no_photograph_is_in_two_parts_of_the_split() -> None:
    """Neither by name nor by its pixels."""
    names = (*TRAIN, *VALIDATION, *TEST)
    sums = {hashlib.sha256(photograph(name).numpy().tobytes()).hexdigest() for name in names}
    assert len(TEST) >= 8 and len(set(names)) == len(sums) == len(names) == 20


@pytest.mark.parametrize("name", (*TRAIN, *VALIDATION, *TEST))
def test_a_photograph_is_grey_in_the_unit_interval_and_the_callers_own(name: str) -> None:
    x = photograph(name)
    assert x.dtype == torch.float64 and x.ndim == 2 and 0 <= float(x.min()) < float(x.max()) <= 1
    x.zero_()
    assert float(photograph(name).max()) > 0


def test_colours_become_grey_by_the_weights_of_rec_709() -> None:
    """rgb2gray documents 0.2125 R + 0.7154 G + 0.0721 B; scikit-learn reads its own file."""
    from sklearn.datasets import load_sample_image

    grey = load_sample_image("china.jpg").astype(float) / 255 @ np.array([0.2125, 0.7154, 0.0721])
    np.testing.assert_allclose(photograph("china").numpy(), grey, atol=1e-12)


def test_faces_are_on_one_sheet() -> None:
    sheet = photograph("lfw_subset")
    assert sheet.shape == (250, 250)
    from importlib.util import find_spec

    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None
    faces = np.load(Path(spec.origin).parent / "data" / "lfw_subset.npy")
    np.testing.assert_array_equal(sheet[25:50, 50:75].numpy(), faces[12])


def test_a_photograph_that_is_unknown_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GliodeError, match=r"'lena'.*astronaut"):
        photograph("lena")
    monkeypatch.setitem(images._SUFFIX, "camera", "tiff")
    images._read.cache_clear()
    with pytest.raises(GliodeError, match=r"camera\.tiff is missing.*scikit-image"):
        photograph("camera")
    monkeypatch.undo()
    images._read.cache_clear()


@pytest.mark.parametrize(("side", "half", "k"), [(400, False, 2), (512, True, 2)])
def test_squares_are_central_means_of_boxes(side: int, half: bool, k: int) -> None:
    """Of a plane, whose mean over a box is its value at the centre: the middle of the picture stays there."""
    i, j = torch.meshgrid(torch.arange(side), torch.arange(side + 100), indexing="ij")
    plane = 0.3 + 0.002 * (i - (side - 1) / 2) + 0.001 * (j - (side + 99) / 2)
    found = square(plane.double(), 96)
    line = torch.arange(96, dtype=torch.float64) - 47.5
    pixel = k * (2 if half else 1)
    torch.testing.assert_close(found, 0.3 + pixel * (0.002 * line[:, None] + 0.001 * line), atol=1e-6, rtol=0)


def test_the_squares_of_the_split() -> None:
    for size in (96, 256):
        assert images.test_images(size).shape == (8, size, size)
        assert validation_images(size).shape == (3, size, size)
    assert torch.equal(images.test_images(256)[5], photograph("coins")[23:279, 64:320])
    halved = photograph("camera").reshape(256, 2, 256, 2).mean((1, 3))
    torch.testing.assert_close(images.test_images(256)[1], halved)
    with pytest.raises(GliodeError, match="between 8 and 256"):
        validation_images(300)
    with pytest.raises(GliodeError, match="holds no square of 252"):
        square(torch.zeros(200, 300), 84)


def test_a_patch_is_cut_from_its_photograph_flipped_or_turned() -> None:
    """One of the eight symmetries of each patch is found in the photograph, and all eight occur."""
    x = photograph("text").float()
    windows = {w.tobytes() for w in x.unfold(0, 12, 1).unfold(1, 12, 1).reshape(-1, 144).numpy()}
    kinds = set()
    for patch in patches(["text"], 40, 12, 3, scales=(1,)):
        for turns in range(4):
            for flipped in (False, True):
                back = (patch.flip(0) if flipped else patch).rot90(-turns)
                if back.contiguous().numpy().tobytes() in windows:
                    kinds.add((turns, flipped))
    assert len(kinds) == 8


def test_patches_repeat_by_their_seed_and_take_every_name_and_scale() -> None:
    names = ("brick", "hubble_deep_field", "dead_leaves")
    a, b, c = (patches(names, 60, 24, seed) for seed in (1, 1, 2))
    assert a.shape == (60, 24, 24) and a.dtype == torch.float32
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert float(a.min()) >= 0 and float(a.max()) <= 1
    means = a.mean((1, 2))
    assert 10 < int((means < 0.2).sum()) < 30  # the sky at night: a third of the patches


def test_a_scale_averages() -> None:
    """At half its scale a photograph is about its means over 2 x 2; a patch of white noise loses variance."""
    sheet = images._sheets("gravel", 16, (0.5,), 1, 0)[0]
    means = photograph("gravel").float().reshape(256, 2, 256, 2).mean((1, 3))
    assert sheet.shape == (256, 256)
    assert float((sheet - means).square().mean().sqrt()) < 0.15 * float(means.std())


@pytest.mark.parametrize(
    ("names", "n", "size", "scales", "message"),
    [
        (["brick", "moon"], 4, 16, (1,), "moon: test photographs"),
        (["brick"], 4, 16, (1, 2.0), r"in \(0, 1\]"),
        (["brick"], 0, 16, (1,), "ask for 1"),
        ([], 4, 16, (1,), "from 0 names"),
        (["text"], 4, 160, (0.5,), "text has.*no patch of 160"),
        (["paper"], 4, 16, (1,), "'paper'"),
    ],
)
def test_wrong_patches_are_refused(
    names: list[str], n: int, size: int, scales: tuple[float, ...], message: str
) -> None:
    with pytest.raises(GliodeError, match=message):
        patches(names, n, size, 0, scales)


@pytest.mark.parametrize("name", PROCEDURAL)
def test_procedural_pictures_repeat_and_a_longer_set_begins_alike(name: str) -> None:
    draw = PROCEDURAL[name]
    x = draw(3, 40, 5)
    assert x.shape == (3, 40, 40) and x.dtype == torch.float64
    assert float(x.min()) >= 0 and float(x.max()) <= 1 and float(x.std((1, 2)).min()) > 0.01
    assert torch.equal(x, draw(4, 40, 5)[:3]) and not torch.equal(x, draw(3, 40, 6))
    for n, size, seed in ((0, 40, 1), (1, 4, 1), (1, 40, -1)):
        with pytest.raises(GliodeError, match=name):
            draw(n, size, seed)


def test_ellipses_stay_inside_the_unit_disc() -> None:
    """Where parallel beams see all of them; and the body is at least a third of the picture."""
    line = (torch.arange(64) + 0.5) * 2 / 64 - 1
    outside = line[:, None] ** 2 + line**2 > 1.05
    x = ellipses(10, 64, 0)
    assert float(x[:, outside].abs().max()) == 0
    assert float((x > 0).double().mean((1, 2)).min()) > 0.3


def test_textures_have_the_spectrum_of_their_law() -> None:
    """E|x^(k)|^2 ~ |k|^-beta, beta 2 to 4: the mean slope over many lies between, away from the cut."""
    x = textures(40, 64, 2)
    power = torch.fft.fft2(x - x.mean((1, 2), keepdim=True)).abs().square()
    low = power[:, 1:4, 1:4].mean((1, 2))
    high = power[:, 8:24, 8:24].mean((1, 2))
    slope = (low.log() - high.log()) / np.log(16 / 2.2)
    assert 2 < float(slope.mean()) < 4


def test_dead_leaves_have_edges_and_flat_parts() -> None:
    """The gradient is heavy-tailed: kurtosis far above a Gaussian's 3, as of photographs."""
    x = dead_leaves(4, 96, 1)
    slopes = torch.cat([x.diff(dim=1).flatten(), x.diff(dim=2).flatten()])
    kurtosis = float((slopes**4).mean() / slopes.square().mean() ** 2)
    assert kurtosis > 8
