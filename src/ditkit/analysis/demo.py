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
from ditkit.analysis.videos import save_clip

METHODS = (
    "taylorseer:interval=3,order=2,granularity=last-block,expansion=newton",
    "taylorseer:interval=3,order=2,granularity=module,expansion=newton",
    "local-window:radius=4",
)
CLIP_METHODS = ("taylorseer:interval=3,order=1,granularity=last-block,expansion=newton",)
CLIP_PROMPTS = ("red apple moving left", "rocket moving up right, camera zooms in")
CLIP_SAMPLING = Sampling(steps=20)


def demo(
    out: Path,
    model: Any = "micro-flux",
    prompts: Sequence[str] | None = None,
    sampling: Sampling | None = None,
    repeats: int = 3,
    judge: Judge | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    clips: Any = None,
) -> BenchResult:
    """Draw `prompts` densely and with each of `METHODS`; write what was drawn and measured into `out`.

    Writes `report.html` (self-contained), `demo.png` (everything side by side), `pictures/*.png`,
    `demo.json` and `demo.csv`; for clips, `clips/*.gif` and `clips.json`.

    Args:
        out: folder, made when it is not there.
        model: a text-to-image pipeline, or what `ditkit.load` takes.
        prompts: None for eight that micro-flux knows.
        repeats: timed rounds.
        judge: gives the prompt accuracy; see `ditkit.analysis.bench`.
        name: what the report calls the model.
        clips: a text-to-video pipeline, or what `ditkit.load` takes; it draws `CLIP_PROMPTS` densely and with
            each of `CLIP_METHODS`, for a row of the report. None: no such row.
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
    others = [] if clips is None else [_clips(out, clips, progress)]
    result.to_html(out / "report.html", "ditkit: dense and accelerated, side by side", others)
    return result


def _clips(out: Path, model: Any, progress: Progress | None) -> BenchResult:
    result = bench(
        model,
        CLIP_METHODS,
        CLIP_PROMPTS,
        sampling=CLIP_SAMPLING,
        repeats=1,
        peers=False,
        plain=False,
        progress=progress,
    )
    for label, drawn in result.clips.items():
        for prompt, clip in zip(result.prompts, drawn, strict=True):
            save_clip(clip, out / "clips" / f"{_file_name(prompt)} - {_file_name(label)}.gif")
    result.to_json(out / "clips.json")
    return result


def _two_lines(label: str) -> str:
    """Name and options on lines of their own."""
    name, _, options = label.partition(":")
    return "\n".join([name, *filter(None, options.split(","))])


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
