"""Checkpoints that are whole or not there: written aside, flushed, renamed; safetensors and JSON only.

A checkpoint is a folder `step-00000123/` with one `.safetensors` file per part and `state.json`, which holds
everything that is no tensor and the SHA-256 of every file. Reading checks those and falls back to the
checkpoint before, saying so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PREFIX = "step-"


class DamagedError(ValueError):
    """Every checkpoint of a run is damaged."""


@dataclass
class Checkpoint:
    """`tensors[part][name]` and JSON-able `state`, at an optimizer step."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any] = field(default_factory=dict)


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint under `folder` atomically and delete all but the newest `keep`.

    A crash at any moment leaves either the new checkpoint or none of it; nothing earlier is touched before
    the new one is in place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{checkpoint.step:08d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write_files(part, checkpoint)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)  # a full disk has better uses for it
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    _sync(folder)
    for old in found(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_files(part: Path, checkpoint: Checkpoint) -> None:
    part.mkdir()
    digests = {}
    for name, tensors in checkpoint.tensors.items():
        file = part / f"{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, file)
        _sync(file)
        digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    record = {"step": checkpoint.step, "state": checkpoint.state, "sha256": digests}
    (part / "state.json").write_text(json.dumps({**record, "self": _digest(record)}), encoding="utf-8")
    _sync(part / "state.json")
    _sync(part)


def found(folder: Path) -> list[Path]:
    """Checkpoint folders under `folder`, oldest first; half-written ones are not among them."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if (p / "state.json").is_file())


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is intact, None where there is none. A damaged one is named in a warning and
    passed over.

    Raises:
        DamagedError: there are checkpoints and none is intact; to begin anew has to be asked for.
    """
    damaged = []
    for path in reversed(found(folder)):
        try:
            return read(path)
        except (ValueError, OSError) as error:
            damaged.append(f"{path.name}: {error}")
            warnings.warn(f"skipping damaged checkpoint {path}: {error}", stacklevel=2)
    if damaged:
        raise DamagedError(
            f"no checkpoint in {folder} is intact ({'; '.join(damaged)}): bring one back, or move the folder "
            "away to begin anew"
        )
    return None


def read(path: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        ValueError: a file is missing, truncated or altered.
    """
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        # Checkpoints of the first version have no such digest.
        if record.pop("self", None) not in (None, _digest(record)):
            raise ValueError("state.json is not the file that was written")
        tensors = {}
        for name, digest in record["sha256"].items():
            file = path / name
            if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} is not the file that was written")
            tensors[file.stem] = load_file(file)
        return Checkpoint(record["step"], tensors, record["state"])
    except (KeyError, TypeError, AttributeError, OSError, SafetensorError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def pack_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's `state_dict()` into tensors and JSON; `unpack_optimizer` is the inverse."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values.setdefault(str(index), {})[key] = value
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def unpack_optimizer(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The `state_dict()` that `pack_optimizer` took apart."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    for index, entries in facts["values"].items():
        state.setdefault(int(index), {}).update(entries)
    return {"state": state, "param_groups": facts["param_groups"]}


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
