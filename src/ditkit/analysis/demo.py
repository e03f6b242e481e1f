"""The main job in one call: eight prompts, dense and accelerated, the same noise, side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditkit.analysis import pictures
from ditkit.analysis.bench import PROMPTS, Judge, Progress, bench
from ditkit.analysis.result import BenchResult
from ditkit.analysis.sampling import Sampling

METHODS = (
    "taylorseer:interval=3,order=2,granularity=last-block,expansion=newton",
    "taylorseer:interval=3,order=2,granularity=module,expansion=newton",
    "local-window:radius=4",
)


def demo(
    out: Path,
    model: Any = "micro-flux",
    prompts: Sequence[str] | None = None,
    sampling: Sampling | None = None,
    repeats: int = 3,
    judge: Judge | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Draw `prompts` densely and with each of `METHODS`; write what was drawn and measured into `out`.

    Writes `report.html` (self-contained), `demo.png` (everything side by side), `pictures/*.png`,
    `demo.json` and `demo.csv`.

    Args:
        out: folder, made when it is not there.
        model: a text-to-image pipeline, or what `ditkit.load` takes.
        prompts: None for eight that micro-flux knows.
        repeats: timed rounds.
        judge: gives the prompt accuracy; see `ditkit.analysis.bench`.
        name: what the report calls the model.
    """
    result = bench(
        model,
        METHODS,
        prompts or PROMPTS,
        sampling=sampling,
        repeats=repeats,
        peers=False,
        judge=judge,
        name=name,
        progress=progress,
    )
    rows = {_two_lines(row.label): result.pictures[row.label] for row in result.rows if row.kind != "plain"}
    pictures.save(pictures.sheet(rows, result.prompts), out / "demo.png")
    for label, drawn in result.pictures.items():
        for prompt, picture in zip(result.prompts, drawn, strict=True):
            name = f"{_file_name(prompt)} - {_file_name(label)}.png"
            pictures.save(pictures.to_image(picture), out / "pictures" / name)
    result.to_json(out / "demo.json")
    result.to_csv(out / "demo.csv")
    result.to_html(out / "report.html", "ditkit: dense and accelerated, side by side")
    return result


def _two_lines(label: str) -> str:
    """Name and options on lines of their own."""
    name, _, options = label.partition(":")
    return "\n".join([name, *filter(None, options.split(","))])


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
