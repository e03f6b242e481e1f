"""What a stage logs: `metrics.jsonl` in its folder, a line of JSON for each entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ditkit.files import write_text

FILE = "metrics.jsonl"


def add(folder: Path, step: int, figures: Mapping[str, float]) -> None:
    """Add what was measured after `step` updates."""
    with (folder / FILE).open("a") as out:
        out.write(json.dumps({"step": step, **figures}) + "\n")


def forget_after(folder: Path, step: int) -> None:
    """Drop what was logged after a checkpoint: those steps will be taken again."""
    path = folder / FILE
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the line a crash cut short
    write_text(path, "".join(f"{line}\n" for line in kept))
