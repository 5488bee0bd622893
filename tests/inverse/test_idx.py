"""IDX files come back as they were written; a broken one is refused by name; MNIST's folders are read."""

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from inverse.datasets import idx, mnist, read_idx
from solvers.errors import GliodeError

CODES = {0x08: "B", 0x09: "b", 0x0B: "h", 0x0C: "i", 0x0D: "f", 0x0E: "d"}
"""Types of IDX and their letters in `struct`."""


def encode(code: int, shape: tuple[int, ...], values: Sequence[float]) -> bytes:
    """An IDX file, by struct alone."""
    head = struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape)
    return head + struct.pack(f">{len(values)}{CODES[code]}", *values)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


GOOD = encode(0x08, (2, 3), [1, 2, 3, 4, 5, 255])


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_type_comes_back(code: int, zipped: bool, tmp_path: Path) -> None:
    values = [0, 1, 2, 3, 100, 127] if code == 0x08 else [0, -1, 2, -128, 100, 127]
    content = encode(code, (3, 1, 2), values)
    array = read_idx(write(tmp_path / "values", gzip.compress(content) if zipped else content))
    assert array.shape == (3, 1, 2) and array.dtype.isnative
    assert array.dtype == np.dtype(CODES[code]) and array.flatten().tolist() == values
    array += 1  # its own memory


def test_bytes_decide_what_is_gzipped_not_the_name(tmp_path: Path) -> None:
    assert read_idx(write(tmp_path / "plain.gz", GOOD)).tolist() == [[1, 2, 3], [4, 5, 255]]
    assert read_idx(write(tmp_path / "zipped", gzip.compress(GOOD))).tolist() == [[1, 2, 3], [4, 5, 255]]


ZIPPED = gzip.compress(GOOD)
BROKEN = {
    "empty": (b"", "truncated, 0 bytes where 4 are due"),
    "head": (GOOD[:3], "truncated, 3 bytes where 4"),
    "sizes": (GOOD[:9], "truncated, 5 bytes where 8"),
    "values": (GOOD[:-1], "truncated, 5 bytes where 6"),
    "trailing": (GOOD + b"\0", "goes on after the 6 bytes"),
    "magic": (b"\1" + GOOD[1:], "begins with bytes 01 00 08 02"),
    "html": (b"<!DOCTYPE html>", "no IDX file"),
    "type": (b"\0\0\x0a" + GOOD[3:], "begins with bytes 00 00 0a 02"),
    "no dimension": (b"\0\0\x08\0" + b"\1", "claims 0 dimensions"),
    "dimensions": (b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"\1", "claims 255 dimensions"),
    "no value": (encode(0x08, (0, 3), []), "claims 0 x 3 values"),
    "huge": (encode(0x0E, (2**32 - 1,) * 3, []), "claims 4294967295 x 4294967295 x 4294967295 values"),
    "wrapping": (encode(0x08, (2**16,) * 4, []), "at most 1073741824 bytes"),  # 0 in 64 bits
    "zipped values": (gzip.compress(GOOD[:-1]), "truncated, 5 bytes where 6"),
    "zipped trailing": (gzip.compress(GOOD + b"\0"), "goes on after"),
    "zipped huge": (gzip.compress(encode(0x08, (2**30 + 1,), [])), "at most 1073741824 bytes"),
    "cut stream": (ZIPPED[:-10], "not readable"),
    "check sum": (ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:], "not readable .*CRC"),
    "stream": (ZIPPED[:10] + b"\xff" * 20, "not readable"),
    "after the stream": (ZIPPED + b"garbage", "not readable"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    content, message = BROKEN[kind]
    with pytest.raises(GliodeError, match=f"broken.idx: .*{message}"):
        read_idx(write(tmp_path / "broken.idx", content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(GliodeError, match=f"{path}: no such file"):
            read_idx(path)


def test_the_limit_is_on_the_bytes_of_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "doubles", encode(0x0E, (2,), [1.5, -2.5]))
    monkeypatch.setattr(idx, "MAX_BYTES", 16)
    assert read_idx(path).tolist() == [1.5, -2.5]
    monkeypatch.setattr(idx, "MAX_BYTES", 15)
    with pytest.raises(GliodeError, match="16 bytes; there must be some, and at most 15"):
        read_idx(path)


PICTURES = np.random.default_rng(0).integers(0, 256, (3, 28, 28))
LABELS = [7, 0, 9]


def pair(folder: Path, images: bytes, labels: bytes, joint: str = "-", end: str = "") -> Path:
    """A folder with MNIST's training files."""
    write(folder / f"train-images{joint}idx3-ubyte{end}", images)
    write(folder / f"train-labels{joint}idx1-ubyte{end}", labels)
    return folder


IMAGES_FILE = encode(0x08, (3, 28, 28), PICTURES.flatten().tolist())
LABELS_FILE = encode(0x08, (3,), LABELS)


@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist_is_read_under_every_name(joint: str, end: str, tmp_path: Path) -> None:
    pack = gzip.compress if end else bytes
    images, labels = mnist(pair(tmp_path, pack(IMAGES_FILE), pack(LABELS_FILE), joint, end))
    assert images.dtype == torch.float32 and images.shape == (3, 784)
    assert images.double().numpy() == pytest.approx(PICTURES.reshape(3, 784) / 255, abs=1e-7)
    assert labels.dtype == torch.int64 and labels.tolist() == LABELS


def test_the_test_files_are_the_t10k_files(tmp_path: Path) -> None:
    pair(tmp_path, IMAGES_FILE, LABELS_FILE)
    write(tmp_path / "t10k-images-idx3-ubyte", encode(0x08, (1, 28, 28), [255] * 784))
    write(tmp_path / "t10k-labels-idx1-ubyte", encode(0x08, (1,), [5]))
    images, labels = mnist(tmp_path, train=False)
    assert images.tolist() == [[1.0] * 784] and labels.tolist() == [5]


def test_pictures_of_14_by_14_are_means_of_blocks(tmp_path: Path) -> None:
    images, _ = mnist(pair(tmp_path, IMAGES_FILE, LABELS_FILE), size=14, dtype=torch.float64)
    assert images.shape == (3, 196)
    for n, row, column in [(0, 0, 0), (1, 3, 12), (2, 13, 13), (0, 13, 0)]:
        block = PICTURES[n, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert float(images[n, 14 * row + column]) == pytest.approx(block.sum() / 4 / 255, abs=1e-12)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES_FILE, encode(0x08, (2,), [1, 2]), "train-labels.*has 2 labels for the 3 pictures"),
        (IMAGES_FILE, encode(0x08, (3,), [1, 10, 2]), "train-labels.*up to 10"),
        (IMAGES_FILE, encode(0x08, (3, 1), LABELS), r"train-labels.*shape \(3, 1\)"),
        (IMAGES_FILE, encode(0x0C, (3,), LABELS), "train-labels.*holds int32"),
        (encode(0x08, (3, 28, 27), [0] * 2268), LABELS_FILE, r"train-images.*\(3, 28, 27\)"),
        (encode(0x09, (3, 28, 28), [0] * 2352), LABELS_FILE, "train-images.*holds int8"),
        (LABELS_FILE, LABELS_FILE, r"train-images.*shape \(3,\)"),
        (IMAGES_FILE[:-1], LABELS_FILE, "train-images.*truncated"),
    ],
)
def test_files_that_are_not_mnist_are_refused(
    images: bytes, labels: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(GliodeError, match=message):
        mnist(pair(tmp_path, images, labels))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(GliodeError, match="no such folder"):
        mnist(tmp_path / "absent")
    write(tmp_path / "train-images-idx3-ubyte", IMAGES_FILE)
    with pytest.raises(GliodeError, match=r"none of train-labels-idx1-ubyte, .*train-labels\.idx1-ubyte\.gz"):
        mnist(tmp_path)
    with pytest.raises(GliodeError, match="size must be 28 or 14, got 7"):
        mnist(tmp_path, size=7)
