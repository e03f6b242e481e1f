"""What a comparison of architectures found: figures of every run, their spread over seeds, and words."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.analysis.result import amount, seconds
from ditkit.files import write_text

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Quantity:
    """A figure that models are compared by.

    Args:
        key: field of `Point`.
        title: in tables and under plots.
        short: in a terminal.
        lower: whether less is better.
        percent: whether it is a share.
    """

    key: str
    title: str
    short: str
    lower: bool = True
    percent: bool = False

    def show(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


QUANTITIES = (
    Quantity("loss", "held-out loss", "loss"),
    Quantity("distance", "Fréchet distance of small features", "distance"),
    Quantity("recognised", "class recognised", "class", lower=False, percent=True),
)


@dataclass
class Point:
    """A run measured at a step, with the averaged weights.

    Args:
        step: optimizer steps taken.
        seconds: that those took, without measuring and saving.
        flops: of those steps.
        loss: on held-out pictures.
        distance: of drawn to true pictures, see `ditkit.analysis.quality`.
        recognised: share of drawn pictures whose nearest true one is of the class asked for.
    """

    step: int
    seconds: float
    flops: float
    loss: float
    distance: float
    recognised: float


@dataclass
class Run:
    """A model under one seed.

    Args:
        points: in order; the last one is the end when the run is `finished`.
        losses: (step, training loss).
        failure: why it ended early.
    """

    seed: int
    points: list[Point] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    finished: bool = False
    failure: str | None = None


@dataclass(frozen=True)
class Spread:
    """Mean, least and greatest of a figure over seeds."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass
class Entry:
    """A model of the comparison.

    Args:
        parameters, flops_per_step, steps: None when it could not be built.
        failure: why it could not be built or planned.
    """

    name: str
    arch: str
    parameters: int | None = None
    flops_per_step: int | None = None
    steps: int | None = None
    runs: list[Run] = field(default_factory=list)
    failure: str | None = None

    @property
    def flops(self) -> int | None:
        """Of training, in each run."""
        if self.flops_per_step is None or self.steps is None:
            return None
        return self.flops_per_step * self.steps

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    def spread(self, key: str) -> Spread | None:
        """Of a figure at the end of the finished runs; None when there is none."""
        values = [getattr(run.points[-1], key) for run in self.finished]
        if not values:
            return None
        return Spread(sum(values) / len(values), min(values), max(values), len(values))

    @property
    def state(self) -> str:
        """What went wrong, or is still to be done; empty when all runs are finished."""
        reasons = [self.failure] if self.failure else []
        reasons += [f"seed {run.seed}: {run.failure}" for run in self.runs if run.failure]
        if waiting := [str(run.seed) for run in self.runs if not run.finished and not run.failure]:
            reasons.append(f"not finished: seed {', '.join(waiting)}")
        return "; ".join(reasons)


@dataclass
class CompareResult:
    """All models, with what is needed to read their figures.

    Args:
        truth: what true pictures score, by the key of a quantity; empty before anything is drawn.
        classes: names of the classes, in the order of the sample grids.
    """

    equal: str
    entries: list[Entry]
    settings: dict[str, Any]
    machine: dict[str, Any]
    classes: list[str] = field(default_factory=list)
    truth: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything in types that JSON has."""
        models = []
        for entry in self.entries:
            at_end = {quantity.key: entry.spread(quantity.key) for quantity in QUANTITIES}
            at_end["seconds"] = entry.spread("seconds")
            figures = {key: spread and dataclasses.asdict(spread) for key, spread in at_end.items()}
            models.append({**dataclasses.asdict(entry), "flops": entry.flops, "at_end": figures})
        return {
            "equal": self.equal,
            "verdicts": self.verdicts(),
            "models": models,
            "truth": self.truth,
            "classes": self.classes,
            "settings": self.settings,
            "machine": self.machine,
        }

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        return write_text(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")

    def verdicts(self) -> list[str]:
        """For each quantity, in words: which model is best, and against which others that is sure."""
        return [text for quantity in QUANTITIES if (text := verdict(quantity, self.entries))]

    def rows(self) -> list[list[str]]:
        """The cells of the table, a row for each model; see `HEADINGS`."""
        return [_cells(entry) for entry in self.entries]

    def table(self) -> Table:
        """For `rich.print`: means, without their range; `failures` has what went wrong."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        names = [*HEADINGS[:6], *(quantity.short for quantity in QUANTITIES)]
        for name in names:
            table.add_column(name, justify="left" if name == "model" else "right")
        for entry in self.entries:
            table.add_row(*_cells(entry, ranges=False)[: len(names)])
        return table

    def failures(self) -> list[str]:
        """What failed or is not finished, and why."""
        return [f"{entry.name}: {entry.state}" for entry in self.entries if entry.state]


HEADINGS = (
    "model", "parameters", "FLOPs a step", "steps", "training FLOPs", "seconds",
    *(quantity.title for quantity in QUANTITIES), "",
)  # fmt: skip


def _cells(entry: Entry, ranges: bool = True) -> list[str]:
    figures = []
    for quantity in QUANTITIES:
        spread = entry.spread(quantity.key)
        text = quantity.show(spread.mean) if spread else ""
        figures.append(shown(quantity, spread) if spread and ranges else text)
    took = entry.spread("seconds")
    return [
        entry.name if entry.name == entry.arch else f"{entry.name} ({entry.arch})",
        amount(entry.parameters),
        amount(entry.flops_per_step),
        "" if entry.steps is None else str(entry.steps),
        amount(entry.flops),
        seconds(took and took.mean),
        *figures,
        entry.state,
    ]


def shown(quantity: Quantity, spread: Spread) -> str:
    """The mean, and the range over seeds where there are several."""
    text = quantity.show(spread.mean)
    if spread.seeds > 1:
        text += f" ({quantity.show(spread.low)} to {quantity.show(spread.high)})"
    return text


def beyond_spread(better: Spread, worse: Spread, lower: bool) -> bool | None:
    """Whether every seed of the one is better than every seed of the other; None with a single seed."""
    if min(better.seeds, worse.seeds) < 2:
        return None
    return better.high < worse.low if lower else better.low > worse.high


def verdict(quantity: Quantity, entries: Sequence[Entry]) -> str:
    """Which model is best by a quantity, and whether that exceeds the spread of the seeds, in words."""
    measured = {e.name: spread for e in entries if (spread := e.spread(quantity.key)) is not None}
    if len(measured) < 2:
        return ""
    sign = 1 if quantity.lower else -1
    best, *others = sorted(measured, key=lambda name: sign * measured[name].mean)
    what = f"{quantity.title[0].upper()}{quantity.title[1:]}"
    text = f"{what}: {best} is {'lowest' if quantity.lower else 'highest'} with "
    text += f"{shown(quantity, measured[best])}"
    sure = {name: beyond_spread(measured[best], measured[name], quantity.lower) for name in others}
    groups = {kind: [name for name in others if sure[name] is kind] for kind in (True, False, None)}
    if groups[True]:
        text += f"; the difference exceeds the spread of the seeds against {', '.join(groups[True])}"
    if groups[False]:
        text += f"; it does not exceed it against {', '.join(groups[False])}"
    if groups[None]:
        text += f"; with a single seed it cannot be told from chance against {', '.join(groups[None])}"
    return text + "."
