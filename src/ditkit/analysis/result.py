"""What a comparison found: rows to read in a terminal, a spreadsheet, a program or a browser."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditkit.files import write_text

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Row:
    """One contestant's figures. None: it could not be measured; `notes` say why.

    Args:
        label, kind: who it is; see `ditkit.analysis.contestants`.
        steps: denoising steps; `steps_computed` of them ran the whole model.
        seconds: median wall time of drawing all pictures, of `seconds_all`.
        time_ratio: `seconds` relative to dense, below 1 is faster: the median over the rounds of the ratio
            within a round.
        flops: floating-point operations in the transformer per picture; `flops_ratio` relative to dense.
        bytes_peak: largest tensor memory alive inside the transformer, beside the weights.
        bytes_cached: the most tensor memory held between steps beyond that of dense sampling.
        latent_error, latent_psnr: relative L2 distance and PSNR (dB) of the final latents to dense.
        picture_error, picture_psnr: the same of the pictures.
        accuracy: share of pictures that the judge holds for what the prompt names.
        latent_errors: the error of each prompt's final latents.
        ceiling: at most so many times fewer FLOPs by the methods' own counts, said before the run.
        predicted: the time ratio that was predicted before the run.
    """

    label: str
    kind: str
    steps: int
    steps_computed: int | None = None
    seconds: float | None = None
    seconds_all: list[float] = field(default_factory=list)
    time_ratio: float | None = None
    flops: float | None = None
    flops_ratio: float | None = None
    bytes_peak: int | None = None
    bytes_cached: int | None = None
    latent_error: float | None = None
    latent_psnr: float | None = None
    picture_error: float | None = None
    picture_psnr: float | None = None
    accuracy: float | None = None
    latent_errors: list[float] = field(default_factory=list)
    ceiling: float | None = None
    predicted: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class BenchResult:
    """Rows, with what is needed to read them: the settings, the machine, the pictures.

    Args:
        pictures: by label, (B, H, W, 3) in [0, 1]; not part of JSON and CSV.
        clips: by label, (B, F, H, W, 3) in [0, 1], of a model that draws clips; not part of them either.
    """

    rows: list[Row]
    prompts: list[str]
    settings: dict[str, Any]
    machine: dict[str, Any]
    pictures: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    clips: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pictures, in types that JSON has; infinite PSNR (equal pictures) is null."""
        rows = [{key: _plain(value) for key, value in dataclasses.asdict(row).items()} for row in self.rows]
        return {
            "settings": self.settings,
            "machine": self.machine,
            "prompts": self.prompts,
            "rows": rows,
        }

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        return write_text(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        text = io.StringIO()
        names = [f.name for f in dataclasses.fields(Row)]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        for row in self.as_dict()["rows"]:
            for name in ("seconds_all", "latent_errors"):
                row[name] = " ".join(f"{value:.6g}" for value in row[name])
            row["notes"] = "; ".join(row["notes"])
            writer.writerow(row)
        return write_text(path, text.getvalue())

    def to_html(
        self, path: str | os.PathLike[str], title: str = "ditkit bench", others: Sequence[BenchResult] = ()
    ) -> Path:
        """One page; of `others`, results for other models, it shows the pictures and the headline."""
        from ditkit.analysis.report import render

        return write_text(path, render(self, title, others=others))

    def columns(self, rank: int = 3) -> list[tuple[str, Callable[[Row], str]]]:
        """Title and text of the columns up to that rank that hold something."""
        return [(name, show) for name, show, least in COLUMNS if least <= rank and any(map(show, self.rows))]

    def table(self, width: int = 120) -> Table:
        """For `rich.print`: the columns that tell most in a terminal of that width."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        columns = self.columns(rank=2 if width >= 110 else 1)
        for name, _ in columns:
            if name == "sampling":
                table.add_column(name, min_width=20, overflow="fold")
            else:
                table.add_column(name, justify="right", min_width=len(max(name.split(), key=len)))
        styles = {"dense": "bold", "method": "green", "peer": "", "plain": "dim"}
        for row in self.rows:
            table.add_row(*(show(row) for _, show in columns), style=styles.get(row.kind, ""))
        return table


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def amount(value: float | None) -> str:
    """A count with a decimal prefix: 1.23 G."""
    return "" if value is None else _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def size(value: int | None) -> str:
    """Bytes with a binary prefix: 1.23 MiB."""
    return "" if value is None else _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def decibel(value: float | None) -> str:
    return "" if value is None else "equal" if math.isinf(value) else f"{value:.1f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def error(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    step = 0
    while abs(value) >= base and step < len(units) - 1:
        value /= base
        step += 1
    digits = 0 if step == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {units[step]}".rstrip()


def steps(row: Row) -> str:
    if row.steps_computed is None or row.steps_computed == row.steps:
        return str(row.steps)
    return f"{row.steps_computed} of {row.steps}"


def label(row: Row) -> str:
    """With spaces at which a narrow column can break it."""
    return row.label.replace(",", ", ") if row.kind == "method" else row.label


COLUMNS = (
    ("sampling", label, 1),
    ("steps", steps, 1),
    ("seconds", lambda row: seconds(row.seconds), 1),
    ("time / dense", lambda row: ratio(row.time_ratio), 1),
    ("predicted", lambda row: ratio(row.predicted), 2),
    ("FLOPs", lambda row: amount(row.flops), 3),
    ("FLOPs / dense", lambda row: ratio(row.flops_ratio), 2),
    ("at best", lambda row: ratio(row.ceiling and 1 / row.ceiling), 2),
    ("cached", lambda row: size(row.bytes_cached), 2),
    ("peak", lambda row: size(row.bytes_peak), 3),
    ("latent error", lambda row: error(row.latent_error), 1),
    ("latent dB", lambda row: decibel(row.latent_psnr), 3),
    ("picture error", lambda row: error(row.picture_error), 3),
    ("picture dB", lambda row: decibel(row.picture_psnr), 2),
    ("right", lambda row: percent(row.accuracy), 1),
)
"""Title and text of every column of the report, and its rank: a terminal shows 1, a wide one 2 too."""
