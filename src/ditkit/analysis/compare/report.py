"""A comparison of architectures as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from ditkit.analysis.compare.result import HEADINGS, QUANTITIES, CompareResult, Entry, Quantity, Run
from ditkit.analysis.result import amount

_EQUAL = {
    "flops": "the same training FLOPs",
    "parameters": "the same number of parameters and steps",
    "steps": "the same number of steps",
}
_AXES = (("step", "steps"), ("seconds", "seconds of training"), ("flops", "training FLOPs"))
_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]


def render(result: CompareResult, grids: Mapping[str, Sequence[Path]], truth: Path) -> str:
    """The report's HTML. Names and reasons are escaped: they are text from outside.

    Args:
        result: figures of what has run so far.
        grids: for each model, its sample grids along the training, the last one last.
        truth: the grid of true pictures.
    """
    return _template().render(
        title="Architectures compared",
        headline=headline(result),
        verdicts=result.verdicts(),
        headings=HEADINGS,
        rows=[
            {"cells": cells, "colour": _css(index), "failed": bool(entry.state)}
            for index, (cells, entry) in enumerate(zip(result.rows(), result.entries, strict=True))
        ],
        truth={quantity.title: quantity.show(result.truth[quantity.key])
               for quantity in QUANTITIES if quantity.key in result.truth},
        curves=_address(curves(result.entries), "svg+xml") if _measured(result.entries) else None,
        classes=result.classes,
        strips=[("true pictures", [_address(truth.read_bytes(), "png")]), *_strips(grids)] if grids else [],
        seed=result.settings["seeds"][0],
        facts={**_flat(result.settings), **result.machine},
    )  # fmt: skip


def headline(result: CompareResult) -> str:
    """What was done, in a sentence."""
    trained = [entry for entry in result.entries if entry.finished]
    seeds = max((len(entry.finished) for entry in trained), default=0)
    text = (
        f"{len(trained)} of {len(result.entries)} architectures trained with {_EQUAL[result.equal]} on the "
        f"same data in the same order, under {seeds} seed{'' if seeds == 1 else 's'}"
    )
    if result.equal == "flops" and trained:
        text += f": {amount(sum(entry.flops or 0 for entry in trained) / len(trained))} each"
    return text + "."


def curves(entries: Sequence[Entry]) -> bytes:
    """An SVG with a row of plots for each quantity, against steps, seconds and FLOPs."""
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "ditkit"}):
        figure = Figure(figsize=(12, 9), layout="constrained")
        axes: Any = figure.subplots(len(QUANTITIES), len(_AXES), sharey="row")
        for row, quantity in enumerate(QUANTITIES):
            for column, (key, label) in enumerate(_AXES):
                plot = axes[row][column]
                for index, entry in enumerate(entries):
                    _curve(plot, entry, key, quantity, index)
                if quantity.lower:
                    plot.set_yscale("log")
                plot.grid(alpha=0.25, which="both")
                plot.set_xlabel(label)
                if column == 0:
                    plot.set_ylabel(quantity.title)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 9), frameon=False)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _curve(plot: Any, entry: Entry, key: str, quantity: Quantity, index: int) -> None:
    """The mean over the finished runs, and a band from the least to the greatest."""
    runs = _usable(entry)
    if not runs:
        return
    across = [sum(getattr(point, key) for point in points) / len(points) for points in _together(runs)]
    values = [[getattr(point, quantity.key) for point in points] for points in _together(runs)]
    colour = _COLOURS[index % len(_COLOURS)]
    means = [sum(some) / len(some) for some in values]
    plot.plot(across, means, color=colour, marker="o", markersize=3, linewidth=1.4, label=entry.name)
    plot.fill_between(across, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)


def _usable(entry: Entry) -> list[Run]:
    return [run for run in entry.finished if run.points]


def _measured(entries: Sequence[Entry]) -> bool:
    return any(map(_usable, entries))


def _together(runs: Sequence[Run]) -> list[tuple[Any, ...]]:
    """The points of all runs of a model, which were measured at the same steps, side by side."""
    return list(zip(*(run.points for run in runs), strict=True))


def _strips(grids: Mapping[str, Sequence[Path]]) -> list[tuple[str, list[str]]]:
    return [(name, [_address(path.read_bytes(), "png") for path in paths]) for name, paths in grids.items()]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `a.b: value`; lists as they are."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key == "models":
            for model in value:
                flat[f"{prefix}{model['name']}"] = f"{model['arch']} {model['model']} {model['run'] or ''}"
        elif value is not None and key != "output":  # a path on the machine that ran it tells nobody anything
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _css(index: int) -> str:
    red, green, blue = (round(255 * part) for part in _COLOURS[index % len(_COLOURS)])
    return f"rgb({red}, {green}, {blue})"


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode("ascii")


@lru_cache(maxsize=1)
def _template() -> Any:
    loader = PackageLoader("ditkit.analysis", "templates")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "compare.html.jinja"
    )
