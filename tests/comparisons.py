"""Comparisons of architectures at a size of seconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

SIZE = {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2}
TINY: dict[str, Any] = {
    "equal": "flops",
    "budget": {"reference": "dit", "steps": 6},
    "seeds": [0, 1],
    "run": {
        "batch_size": 8,
        "data": {"groups": ["keycap", "flag"]},
        "optimizer": {"lr": 1e-3},
        "ema": {"decay": 0.5},
        "task_options": {"process": "flow", "pixels": 8},
    },
    "evaluation": {"points": 2, "pictures": 12, "draws": 2, "sampling_steps": 2},
    "models": [{"name": name, "arch": name, "model": dict(SIZE)} for name in ("dit", "lit")],
}
BROKEN = {"name": "broken", "arch": "dit", "model": {"hidden_size": 33}}


def written(folder: Path, **changes: Any) -> Path:
    """A comparison's file with changes at its top."""
    file = {"output": str(folder / "out"), **copy.deepcopy(TINY), **changes}
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(file))
    return path
