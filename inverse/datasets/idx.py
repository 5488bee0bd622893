"""IDX files (the format of MNIST and Fashion-MNIST), checked, from a folder that the user names.

An IDX file is two zero bytes, a code of the type, the number d of dimensions, d sizes of 4 bytes, then the
values, all big-endian (LeCun, Cortes and Burges, "The MNIST database of handwritten digits", 1998). Nothing
here reaches the network.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError

MAX_BYTES = 2**30  # of values: EMNIST, the largest of the family, has 547 MB; more is a broken header
MAX_DIMENSIONS = 32  # of a NumPy array in every version
DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
Stream = IO[bytes] | gzip.GzipFile
SIDE, CLASSES = 28, 10  # of MNIST and Fashion-MNIST


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file, plain or gzipped (told by its first bytes, not its name), native byte order.

    Memory is taken for the values only after the header was checked: MAX_BYTES at most. GliodeError naming
    the file and the way out: no such file, not IDX, an unknown type, no or too many dimensions, a size that
    is 0 or too large, values missing or left over, a damaged gzip stream.
    """
    path = Path(path)
    if not path.is_file():
        raise GliodeError(f"{path}: no such file. Give the path of an IDX file, gzipped or not.")
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _read(raw, path)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _read(stream, path)
    except (
        OSError,
        EOFError,
        zlib.error,
    ) as error:  # a bad check sum is an OSError, a truncation an EOFError
        raise GliodeError(f"{path}: not readable ({error}). Copy or fetch the file again.") from error


def mnist(
    folder: str | Path, train: bool = True, size: int = SIDE, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Pictures (n, size^2) in [0, 1], row after row, and labels (n,) int64, of MNIST or Fashion-MNIST.

    train: the 60,000 (train-*) or the 10,000 (t10k-*); files are named train-images-idx3-ubyte or
    train-images.idx3-ubyte, labels idx1, with or without .gz. size: 28, or 14 for the means of 2 x 2 pixels.
    GliodeError: a file missing or broken (`read_idx`), pictures that are not 28 x 28 bytes, labels beyond 9
    or not as many as the pictures.
    """
    if size not in (SIDE, SIDE // 2):
        raise GliodeError(f"mnist: size must be {SIDE} or {SIDE // 2}, got {size}")
    folder = Path(folder)
    stem = "train" if train else "t10k"
    images_path = _find(folder, f"{stem}-images", "idx3-ubyte")
    labels_path = _find(folder, f"{stem}-labels", "idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE):
        raise GliodeError(
            f"{images_path}: holds {images.dtype} of shape {images.shape}, not n pictures of {SIDE} x {SIDE}"
            " bytes. Put the images file of MNIST or Fashion-MNIST there."
        )
    if labels.dtype != np.uint8 or labels.ndim != 1 or labels.max() >= CLASSES:
        raise GliodeError(
            f"{labels_path}: holds {labels.dtype} of shape {labels.shape} up to {labels.max()}, not one label"
            f" below {CLASSES} a picture. Put the labels file of MNIST or Fashion-MNIST there."
        )
    if len(labels) != len(images):
        raise GliodeError(
            f"{labels_path}: has {len(labels)} labels for the {len(images)} pictures of {images_path.name}."
            " Take both files from one download."
        )
    pictures = torch.from_numpy(images).to(dtype) / 255
    if size != SIDE:
        pictures = pictures.reshape(-1, size, 2, size, 2).mean((2, 4))
    return pictures.flatten(1), torch.from_numpy(labels).long()


def _read(stream: Stream, path: Path) -> np.ndarray:
    head = _take(stream, 4, path)
    if head[:2] != b"\0\0" or head[2] not in DTYPES:
        raise GliodeError(
            f"{path}: begins with bytes {head.hex(' ')}, so it is no IDX file (00 00, a type"
            f" {', '.join(f'{code:02x}' for code in DTYPES)}, the number of dimensions). Fetch it again."
        )
    dtype = np.dtype(DTYPES[head[2]])
    if not 0 < head[3] <= MAX_DIMENSIONS:
        raise GliodeError(
            f"{path}: claims {head[3]} dimensions, not 1 to {MAX_DIMENSIONS}. Fetch the file again."
        )
    shape = tuple(int(n) for n in np.frombuffer(_take(stream, 4 * head[3], path), ">u4"))
    expected = math.prod(shape) * dtype.itemsize  # whole numbers of Python: no overflow
    if not 0 < expected <= MAX_BYTES:
        raise GliodeError(
            f"{path}: its header claims {' x '.join(map(str, shape))} values, {expected} bytes;"
            f" there must be some, and at most {MAX_BYTES} bytes. Fetch the file again, or cut it up."
        )
    values = np.frombuffer(_take(stream, expected, path), dtype).reshape(shape)
    if stream.read(1):  # at the end of a gzip stream this also compares the check sum
        raise GliodeError(
            f"{path}: goes on after the {expected} bytes of values that its header claims. Fetch it again."
        )
    return values.astype(dtype.newbyteorder("="))


def _take(stream: Stream, count: int, path: Path) -> bytes:
    found = stream.read(count)
    if len(found) < count:
        raise GliodeError(
            f"{path}: truncated, {len(found)} bytes where {count} are due. Copy or fetch the file again."
        )
    return found


def _find(folder: Path, stem: str, kind: str) -> Path:
    if not folder.is_dir():
        raise GliodeError(f"{folder}: no such folder. Give the one that holds the files of MNIST.")
    names = [f"{stem}{joint}{kind}{end}" for joint in "-." for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise GliodeError(f"{folder}: has none of {', '.join(names)}. Put one there, as downloaded.")
