"""What a run was made by: versions, the revision of the code, the machine; one entry for each start.

`run.json` in the folder of a stage is a list, so that a run that was stopped and went on with other code says
so.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ditkit import __version__
from ditkit.files import write_text

FILE = "run.json"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")


def add_start(folder: Path, step: int, processes: int, device: str) -> None:
    """Add this start to the folder's `run.json`.

    Args:
        folder: of the stage.
        step: from which it goes on.
        processes: that share the batch.
        device: on which.
    """
    file = folder / FILE
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        starts = []
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "from_step": step,
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "ditkit": __version__,
        "git": revision(Path(__file__)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    write_text(file, json.dumps([*starts, start], indent=1) + "\n")


def revision(file: Path) -> dict[str, Any] | None:
    """The commit of the repository that keeps a file, and whether its tree has other changes; None where
    none keeps it (an installed package), or git is not there."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
