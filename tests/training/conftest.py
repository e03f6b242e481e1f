"""Training files small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ditkit.training.trainer import train
from training_recipes import options

TINY_DIT = {
    "name": "tiny",
    "task": "class-to-image",
    "seed": 3,
    "steps": 6,
    "batch_size": 8,
    "precision": "no",
    "data": {"kind": "emoji", "split": "train", "groups": ["keycap", "flag"]},
    "optimizer": {"lr": 1e-3, "clip_grad_norm": 1.0},
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "ema": {"decay": 0.9},
    "log_every": 1,
    "checkpoint_every": 2,
    "tracker": None,
    "task_options": {
        "arch": "dit",
        "process": "flow",
        "pixels": 8,
        "model": {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2},
    },
}


@pytest.fixture
def training_file(tmp_path: Path):
    """Writes a training file with the given changes and returns its path."""

    def write(output: str = "run", **changes: Any) -> Path:
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / output), **TINY_DIT, **changes}))
        return path

    return write


@pytest.fixture
def teacher(training_file, tmp_path: Path) -> str:
    """The export of a short training of a DiT."""
    return str(train(training_file("teacher", steps=2, task_options=options("dit"))))
