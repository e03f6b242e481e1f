"""Training files small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import ViTConfig, ViTModel

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
    """The export of a short training of a DiT; beside it lies `vision`, a small vision transformer."""
    export = train(training_file("teacher", steps=2, task_options=options("dit")))
    vision_transformer(export.parent / "vision")
    return str(export)


def vision_transformer(folder: Path) -> Path:
    """Two layers of two heads, patches of 4 x 4, untrained."""
    torch.manual_seed(5)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=4,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture
def vision(tmp_path: Path) -> str:
    return str(vision_transformer(tmp_path / "vision"))
