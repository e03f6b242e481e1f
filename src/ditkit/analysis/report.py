"""A comparison as one HTML file that needs nothing else: pictures, plots and table inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ditkit.analysis.pictures import to_image
from ditkit.analysis.plots import Point, scatter
from ditkit.analysis.result import BenchResult, Row, label
from ditkit.analysis.videos import gif

if TYPE_CHECKING:
    from ditkit.analysis.tune import TuneResult

_KINDS = {
    "dense": "dense sampling",
    "whole": "nothing left out",
    "method": "ditkit",
    "peer": "other libraries",
    "plain": "plain sampling with fewer steps",
}


@dataclass(frozen=True)
class Section:
    """A further part of the page: a plot, lines, or text as it is."""

    title: str
    plot: Markup | None = None
    lines: Sequence[str] = ()
    text: str = ""
    explain: str = ""


def render(
    result: BenchResult,
    title: str,
    *,
    told: str | None = None,
    sections: Sequence[Section] = (),
    others: Sequence[BenchResult] = (),
) -> str:
    """The report's HTML. Prompts, labels and notes are escaped: they are text from outside.

    Args:
        result: rows and pictures of a comparison.
        title: heading and name of the page.
        told: the sentence under it; None for `headline(result)`.
        sections: parts to show before the settings.
        others: comparisons of other models, of which the pictures and the headline are shown.
    """
    columns = result.columns()
    numbered = list(enumerate(result.rows, start=1))
    return _template().render(
        title=title,
        shown=[_shown(result, told), *map(_shown, others)],
        kinds={kind: text for kind, text in _KINDS.items() if any(row.kind == kind for row in result.rows)},
        sections=sections,
        columns=[name for name, _ in columns],
        rows=[{"number": i, "row": row, "cells": [show(row) for _, show in columns]} for i, row in numbered],
        plots=[Markup(plot) for plot in _plots(numbered) if plot],
        facts={**result.settings, **result.machine},
    )


def render_tune(result: TuneResult) -> str:
    """A search's report: its front drawn on held-out prompts, all trials, the recipe, what was left out."""
    assert result.held is not None
    on_front = {trial.number for trial in result.front}
    ordered = sorted(result.trials, key=lambda trial: trial.number in on_front)  # the front on top
    points = [
        Point(
            trial.outcome.time_ratio,
            trial.outcome.error,
            str(trial.number),
            f"{trial.recipe.describe()}: {trial.outcome.time_ratio:.3f} x time, {trial.outcome.error:.4f}",
            "method" if trial.number in on_front else "tried",
        )
        for trial in ordered
    ]
    plot = scatter(points, "time, relative to dense", "error on the prompts of the search", "method")
    left_out = [f"{name}: {why}" for name, why in result.space.left_out.items()]
    recipe = yaml.safe_dump(result.recipe.model_dump(mode="json", by_alias=True), sort_keys=False)
    sections = [
        Section("The recipe", text=recipe),
        Section(
            "All trials",
            plot=Markup(plot),
            explain=f"{len(result.trials)} settings, numbered as they were tried; the line joins those that "
            "no other one beats in time and error.",
        ),
        Section("Not tried", lines=left_out),
        Section("Failed", lines=result.failures),
    ]
    shown = [section for section in sections if section.plot or section.lines or section.text]
    return render(result.held, "ditkit tune", told=result.headline(), sections=shown)


def _shown(result: BenchResult, told: str | None = None) -> dict[str, Any]:
    """What the page says and shows of one comparison: a row of pictures or clips for each way to draw."""
    moving = bool(result.clips)
    drawn, embed = (result.clips, embedded_clip) if moving else (result.pictures, embedded)
    return {
        "moving": moving,
        "headline": headline(result) if told is None else told,
        "prompts": result.prompts,
        "galleries": [
            {"number": i, "row": row, "label": label(row), "pictures": map(embed, drawn[row.label])}
            for i, row in enumerate(result.rows, start=1)
            if row.label in drawn
        ],
    }


def headline(result: BenchResult) -> str:
    """One true sentence: the fastest of our methods that is nearer to dense than plain sampling is."""
    plain = {row.steps: row for row in result.rows if row.kind == "plain"}
    better = [
        row
        for row in result.rows
        if row.kind == "method"
        and row.latent_error is not None
        and row.time_ratio is not None
        and row.time_ratio < 1
        and _nearer(row, plain.get(row.steps_computed or 0))
    ]
    if not better:
        return "In this run no method was both faster than dense sampling and nearer to it than fewer steps."
    best = min(better, key=lambda row: row.time_ratio or 1.0)
    text = (
        f"{best.label} took {best.time_ratio:.2f} of dense sampling's time, "
        f"with a relative error of {best.latent_error:.3f} in the final latents"
    )
    equal = plain.get(best.steps_computed or 0)
    if equal is not None and equal.latent_error is not None:
        text += f"; plain sampling with the same {equal.steps} computed steps has {equal.latent_error:.3f}"
    return text + "."


def _nearer(row: Row, other: Row | None) -> bool:
    """Whether the row is nearer to dense than the other is; true when there is no other."""
    if other is None or row.latent_error is None or other.latent_error is None:
        return True
    return row.latent_error < other.latent_error


def embedded(picture: np.ndarray) -> str:
    """A picture (H, W, 3) in [0, 1] as a `data:` address of a PNG."""
    stream = io.BytesIO()
    to_image(picture).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def embedded_clip(clip: np.ndarray) -> str:
    """A clip (F, H, W, 3) in [0, 1] as a `data:` address of a GIF."""
    return "data:image/gif;base64," + base64.b64encode(gif(clip)).decode("ascii")


def _plots(numbered: list[tuple[int, Row]]) -> list[str]:
    def points(x_of: Any) -> list[Point]:
        return [
            Point(x_of(row), row.latent_error, str(i), f"{row.label}: error {row.latent_error:.4f}", row.kind)
            for i, row in numbered
            if row.latent_error is not None and x_of(row) is not None
        ]

    return [
        scatter(points(lambda row: row.time_ratio), "time, relative to dense", "error of the final latents"),
        scatter(
            points(lambda row: row.flops_ratio), "FLOPs, relative to dense", "error of the final latents"
        ),
    ]


@lru_cache(maxsize=1)
def _template() -> Any:
    loader = PackageLoader("ditkit.analysis", "templates")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "report.html.jinja"
    )
