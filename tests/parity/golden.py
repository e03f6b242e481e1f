"""Golden tensors: files written by running the authors' own code; see the README of each golden folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

_TESTS = Path(__file__).resolve().parents[1]


def _folders(system: str) -> list[Path]:
    """Where the system's files may lie, the first to win."""
    chosen = os.environ.get("DITKIT_GOLDEN")
    if chosen:
        return [Path(chosen) / system]
    return [_TESTS / "golden" / system, _TESTS.parents[1] / "shared" / "golden" / system]


def cases(system: str) -> list[Any]:
    """One `pytest.param(path)` for every golden file of a system, each file name once.

    With `DITKIT_GOLDEN` set only `$DITKIT_GOLDEN/<system>/` is read; otherwise the files shipped in
    `tests/golden` and those of the shared folder beside the repository, where there is one.
    """
    found: dict[str, Path] = {}
    for folder in _folders(system):
        for path in sorted(folder.glob("*.safetensors")):
            found.setdefault(path.name, path)
    return [pytest.param(path, id=path.stem) for path in found.values()]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The case of a golden file, from its metadata, and all its tensors by name."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "case" not in metadata:
            raise ValueError(f"{path}: no `case` in its metadata, which has {sorted(metadata)}")
        return json.loads(metadata["case"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
