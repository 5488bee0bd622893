"""Weights and checkpoints on disk: tensors as safetensors (which run no code when read), numbers as JSON.

A checkpoint is two files, the tensors under a name of their own and checkpoint.json, which names them. The
JSON is put in place last and in one move, so a crash leaves the old checkpoint or the new one.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from solvers.errors import GliodeError
from solvers.files import atomic, write_json

RECORD = "checkpoint.json"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors, atomically."""
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, temporary)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote, on the CPU. Raises GliodeError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise GliodeError(f"{path}: missing or damaged ({error}); train anew, without resume") from error


def write_weights(path: str | Path, model: nn.Module) -> None:
    """All parameters and buffers of a model."""
    write_tensors(path, model.state_dict())


def read_weights(path: str | Path, model: nn.Module) -> None:
    """Into a model of the same architecture. Raises GliodeError where it is another one."""
    load(model, read_tensors(path), str(path))


def load(model: nn.Module, weights: Mapping[str, Tensor], label: str) -> None:
    """Copy weights into a model; `label` stands for their source in messages."""
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise GliodeError(f"{label}: these are the weights of another model: {error}") from error


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Put a checkpoint in the place of the one before."""
    name = f"checkpoint-{uuid.uuid4().hex[:12]}.safetensors"
    write_tensors(folder / name, tensors)
    write_json(folder / RECORD, finite({**record, "tensors": name}))
    for other in folder.glob("checkpoint-*.safetensors"):
        if other.name != name:
            other.unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the record of the checkpoint in a folder; None where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name = record.pop("tensors")
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise GliodeError(f"{path}: damaged ({error}); train anew, without resume") from error
    return read_tensors(folder / name), record


def finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
