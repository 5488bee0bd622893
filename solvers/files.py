"""Writing files so that a reader, or a run that resumes, never sees half of one."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from solvers.errors import GliodeError

Array = np.ndarray[Any, np.dtype[Any]]


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` when the block ends well, and goes when it does not.

    The name keeps its ending, because writers choose their format by it. The data are on the disk before
    the name changes, so a crash leaves the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, record: Any) -> None:
    """Write JSON, atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_arrays(path: str | Path, key: str, arrays: Mapping[str, Array]) -> None:
    """Write named arrays as .npz without pickles, atomically; `key` says what they belong to."""
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        names = np.frombuffer(json.dumps({"key": key, "names": list(arrays)}).encode(), dtype=np.uint8)
        numbered: dict[str, Any] = {f"array{place}": array for place, array in enumerate(arrays.values())}
        np.savez(stream, about=names, **numbered)


def read_arrays(path: str | Path, key: str) -> dict[str, Array] | None:
    """What `write_arrays` wrote; None where there is no file, or one with another key.

    Raises GliodeError naming the file where it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            about = json.loads(data["about"].tobytes())
            if about["key"] != key:
                return None
            return {name: data[f"array{place}"] for place, name in enumerate(about["names"])}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise GliodeError(f"{path}: damaged or no restart file ({error}); start anew with --fresh") from error
