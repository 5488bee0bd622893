"""Grey photographs that scikit-image and scikit-learn ship, and patches to train on; no network.

    TRAIN, VALIDATION, TEST    names; a test photograph is never trained or tuned on
    photograph(name)           (H, W), float64 in [0, 1]
    patches(names, ...)        (n, size, size), float32: flipped, turned, scaled down; procedural ones too
    validation_images(size), test_images(size)    one square of each photograph

Their licences stand in the README.txt beside the files (china and flower: Creative Commons BY 2.0).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inverse.datasets.procedural import dead_leaves, ellipses, textures
from solvers.errors import GliodeError

TEST = ("astronaut", "camera", "chelsea", "china", "coffee", "coins", "moon", "rocket")
VALIDATION = ("clock_motion", "ihc", "flower")
TRAIN = (
    *("motorcycle_left", "brick", "grass", "gravel", "hubble_deep_field", "retina", "page", "text"),
    "lfw_subset",
)
PROCEDURAL = {"dead_leaves": dead_leaves, "ellipses": ellipses, "textures": textures}
LARGE = 500  # pixels: a photograph longer than that both ways is halved before a square is cut
SQUARE = 256  # pixels of the largest square
SCALES = (1.0, 0.75, 0.5)
SHEET = 256  # pixels of a procedural picture that patches are cut from

_SUFFIX = {"rocket": "jpg", "hubble_deep_field": "jpg", "retina": "jpg", "china": "jpg", "flower": "jpg"}


@cache
def _read(name: str) -> np.ndarray:
    known = (*TRAIN, *VALIDATION, *TEST)
    if name not in known:
        raise GliodeError(f"photograph: none is called {name!r}; there are {', '.join(known)}")
    sklearn = name in ("china", "flower")
    package, folder = ("sklearn", "datasets/images") if sklearn else ("skimage", "data")
    shipped = "scikit-learn" if sklearn else "scikit-image"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise GliodeError(f"photograph: {name} is shipped with {shipped}, which is not installed")
    suffix = "npy" if name == "lfw_subset" else _SUFFIX.get(name, "png")
    path = Path(spec.origin).parent / folder / f"{name}.{suffix}"
    if not path.is_file():
        raise GliodeError(f"photograph: {path} is missing from the installed {shipped}; install it anew")
    if suffix == "npy":  # 25 x 25 each, the first 100 are faces: one sheet of 10 by 10
        faces = np.load(path, allow_pickle=False)[:100].astype(float)
        return np.asarray(faces.reshape(10, 10, 25, 25).swapaxes(1, 2).reshape(250, 250))
    from skimage.color import rgb2gray
    from skimage.io import imread

    pixels = imread(path).astype(float) / 255
    return np.asarray(rgb2gray(pixels) if pixels.ndim == 3 else pixels).clip(0, 1)


def photograph(name: str) -> Tensor:
    """(H, W), float64 grey in [0, 1] (colours by scikit-image's rgb2gray), in full size.

    GliodeError: an unknown name, the package that ships it or the file in it missing.
    """
    return torch.from_numpy(_read(name).copy())


def square(picture: Tensor, size: int) -> Tensor:
    """The central square of a picture (H, W), (size, size).

    A picture longer than 500 both ways is halved first; then the largest k with k size <= 256 counts: the
    central square of k size pixels, means over boxes of k x k.
    """
    if not 8 <= size <= SQUARE:
        raise GliodeError(f"square: the size must lie between 8 and {SQUARE} pixels, got {size}")
    if min(picture.shape) > LARGE:
        picture = _means(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2], 2)
    k = SQUARE // size
    rows, columns = ((n - k * size) // 2 for n in picture.shape)
    if min(rows, columns) < 0:
        raise GliodeError(f"square: the picture of {tuple(picture.shape)} holds no square of {k * size}")
    return _means(picture[rows : rows + k * size, columns : columns + k * size], k)


def _means(picture: Tensor, k: int) -> Tensor:
    rows, columns = picture.shape
    return picture.reshape(rows // k, k, columns // k, k).mean((1, 3))


def test_images(size: int) -> Tensor:
    """(8, size, size) float64: `square` of each photograph of TEST; never to train or tune on."""
    return torch.stack([square(photograph(name), size) for name in TEST])


test_images.__test__ = False  # type: ignore[attr-defined]  # pytest: no test where it is imported


def validation_images(size: int) -> Tensor:
    """(3, size, size) float64: `square` of each photograph of VALIDATION."""
    return torch.stack([square(photograph(name), size) for name in VALIDATION])


def patches(names: Sequence[str], n: int, size: int, seed: int, scales: Sequence[float] = SCALES) -> Tensor:
    """(n, size, size) float32 in [0, 1], each from a random name, scale and place, flipped and turned.

    names: of photographs or of PROCEDURAL pictures (which are drawn anew, at scale 1). scales: at most 1,
    by bilinear interpolation with antialiasing; those that leave a photograph smaller than a patch are left
    out for it. GliodeError: a test photograph, a scale beyond (0, 1], a patch larger than a photograph.
    """
    held = sorted(set(names) & set(TEST))
    if held:
        raise GliodeError(f"patches: {', '.join(held)}: test photographs, never trained on; take TRAIN")
    if n < 1 or size < 1 or not names:
        raise GliodeError(f"patches: {n} of {size} pixels from {len(names)} names: ask for 1 at least")
    if not scales or not all(0 < scale <= 1 for scale in scales):
        raise GliodeError(f"patches: the scales must lie in (0, 1], got {tuple(scales)}")
    draw = np.random.default_rng([seed, 5])
    chosen = draw.integers(len(names), size=n)
    out = torch.empty(n, size, size, dtype=torch.float32)
    for number, name in enumerate(names):
        wanted = np.flatnonzero(chosen == number)
        if not len(wanted):
            continue
        sheets = _sheets(name, size, scales, len(wanted), seed)
        for place in wanted:
            sheet = sheets[int(draw.integers(len(sheets)))]
            row, column = (int(draw.integers(length - size + 1)) for length in sheet.shape)
            patch = sheet[row : row + size, column : column + size]
            patch = patch.rot90(int(draw.integers(4)))
            out[place] = patch.flip(0) if draw.integers(2) else patch
    return out


def _sheets(name: str, size: int, scales: Sequence[float], wanted: int, seed: int) -> list[Tensor]:
    """What patches of one name are cut from: a photograph at each scale, or procedural pictures."""
    if name in PROCEDURAL:
        length = max(SHEET, size)
        count = -(-wanted * size**2 // length**2)  # about as many pixels as are asked for
        return list(PROCEDURAL[name](count, length, seed).float())
    whole = photograph(name).float()
    sheets = []
    for scale in scales:
        shape = [round(scale * length) for length in whole.shape]
        if min(shape) >= size:
            sheets.append(whole if scale == 1 else _resized(whole, shape))
    if not sheets:
        raise GliodeError(
            f"patches: {name} has {tuple(whole.shape)} pixels, at most {max(scales):g} of that: no patch of "
            f"{size}; take smaller ones or leave it out"
        )
    return sheets


def _resized(picture: Tensor, shape: Sequence[int]) -> Tensor:
    resized = torch.nn.functional.interpolate(
        picture[None, None], list(shape), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0, 0].clamp(0, 1)
