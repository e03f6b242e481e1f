"""ditkit: methods for diffusion transformers, on the models of Hugging Face diffusers.

The names below are imported when first used, so that `import ditkit` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditkit.analysis.bench import bench
    from ditkit.analysis.compare.comparison import compare
    from ditkit.analysis.tune import tune
    from ditkit.hub import load
    from ditkit.methods.cg_taylor import CGTaylor
    from ditkit.methods.clear import LocalWindow
    from ditkit.methods.harmonica import HarmoniCa
    from ditkit.methods.predict_correct import PredictCorrect
    from ditkit.methods.taylorseer import TaylorSeer
    from ditkit.recipes import Recipe
    from ditkit.seams.apply import Run, apply
    from ditkit.training.trainer import train

__version__ = "0.1.0"

_HOMES = {
    "apply": "ditkit.seams.apply",
    "Run": "ditkit.seams.apply",
    "load": "ditkit.hub",
    "bench": "ditkit.analysis.bench",
    "compare": "ditkit.analysis.compare.comparison",
    "tune": "ditkit.analysis.tune",
    "Recipe": "ditkit.recipes",
    "train": "ditkit.training.trainer",
    "TaylorSeer": "ditkit.methods.taylorseer",
    "LocalWindow": "ditkit.methods.clear",
    "CGTaylor": "ditkit.methods.cg_taylor",
    "HarmoniCa": "ditkit.methods.harmonica",
    "PredictCorrect": "ditkit.methods.predict_correct",
}

__all__ = [
    "CGTaylor",
    "HarmoniCa",
    "LocalWindow",
    "PredictCorrect",
    "Recipe",
    "Run",
    "TaylorSeer",
    "__version__",
    "apply",
    "bench",
    "compare",
    "load",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ditkit' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
