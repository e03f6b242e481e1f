"""TaylorSeer on trained micro-flux: error and time at every interval, against peers and fewer steps.

First every setting draws once, for its error; then the best of either granularity is timed against dense
sampling, diffusers' hook in its three forms, cache-dit where it is installed, and plain sampling.

    python -m benchmarks.methods.taylorseer [--steps 28 50] [--intervals 2 3 4 5 6] [--prompts 8]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console

import ditkit
from benchmarks.record import Claim, arguments, write
from ditkit.analysis import bench as comparison
from ditkit.analysis.bench import bench
from ditkit.analysis.contestants import name_of
from ditkit.analysis.metrics import relative_l2
from ditkit.analysis.result import BenchResult, Row
from ditkit.analysis.sampling import Sampling, sample
from ditkit.data.emoji import EmojiDataset
from ditkit.methods.taylorseer import Granularity, TaylorSeer

console = Console()


def settings(interval: int) -> list[TaylorSeer]:
    """Both granularities; orders 0 to 2, either polynomial and reach, and diffusers' full steps."""
    forms: list[dict[str, Any]] = [
        {"order": 0},
        {"order": 1},  # where the two polynomials are one
        {"order": 1, "reach": 1.0},
        {"order": 2},
        {"order": 2, "expansion": "newton"},
        {"order": 1, "schedule": "diffusers"},
        {"order": 1, "reach": 1.0, "schedule": "diffusers"},
    ]
    return [
        TaylorSeer(interval=interval, granularity=granularity, **form)
        for granularity in get_args(Granularity)
        for form in forms
    ]


def best(errors: dict[TaylorSeer, float], granularity: str) -> TaylorSeer:
    """The setting of that granularity with the smallest error of the final latents."""
    return min((method for method in errors if method.granularity == granularity), key=lambda m: errors[m])


def captions(count: int, first: int = 0) -> list[str]:
    """So many captions of the emoji set in a fixed random order, from the `first` on."""
    known = EmojiDataset(groups=["single"]).captions
    order = np.random.default_rng(0).permutation(len(known))
    return [known[i] for i in np.sort(order[first : first + count])]


def latents(pipe: Any, prompts: list[str], sampling: Sampling, *methods: TaylorSeer) -> torch.Tensor:
    """The final latents with the methods applied."""
    with ditkit.apply(pipe, *methods, count_flops=False):
        drawn = sample(pipe, prompts, sampling).latents
    assert drawn is not None
    return drawn


def compare(
    pipe: Any,
    dense: torch.Tensor,
    sampling: Sampling,
    interval: int,
    trial: list[str],
    prompts: list[str],
    repeats: int,
) -> tuple[dict[TaylorSeer, float], BenchResult]:
    """Errors of all settings on the trial prompts, and the timed comparison of the best on the others."""
    console.rule(f"{sampling.steps} steps, interval {interval}")
    errors: dict[TaylorSeer, float] = {}
    for method in settings(interval):
        errors[method] = relative_l2(latents(pipe, trial, sampling, method), dense)
        console.print(f"{errors[method]:.4f}  {name_of(method)}")
    chosen = [best(errors, granularity) for granularity in ("last-block", "module")]
    timed = bench(pipe, chosen, prompts, sampling=sampling, repeats=repeats)
    console.print(timed.table())
    return errors, timed


def claims(steps: int, interval: int, timed: BenchResult) -> list[Claim]:
    """What is promised for this system, at one number of steps and one interval."""
    rows = [row for row in timed.rows if row.seconds is not None]
    ours = [row for row in rows if row.kind == "method"]
    peers = [row for row in rows if row.kind == "peer" and row.label.startswith("diffusers")]
    plain = {row.steps: row for row in rows if row.kind == "plain"}
    where = f"micro-flux, {steps} steps, interval {interval}"
    counts = [(row, (row.steps_computed or 0) / steps) for row in ours]
    return [
        Claim(
            "taylorseer",
            f"{where}: nearer to dense than diffusers' hook in each of its forms, in no more time",
            "ditkit",
            f"{_figures(ours)}; {_figures(peers)}",
            all(any(_nearer(row, peer) and _no_slower(row, peer) for row in ours) for peer in peers),
            "settings chosen by their error on eight other prompts; times within 2 % count as equal",
        ),
        Claim(
            "taylorseer",
            f"{where}: nearer to dense than plain sampling with as many steps as were computed",
            "ditkit",
            f"{_figures(ours)}; {_figures(plain.values())}",
            all(_nearer(row, plain[row.steps_computed or 0]) for row in ours),
        ),
        Claim(
            "taylorseer",
            f"{where}: counted FLOPs are the share of full steps, within 2 % of dense",
            "arXiv 2503.06923",
            "; ".join(f"{row.flops_ratio:.3f} for {row.steps_computed} of {steps}" for row, _ in counts),
            all(abs((row.flops_ratio or 0.0) - share) <= 0.02 for row, share in counts),
            "embedding, modulation and head run at every step",
        ),
    ]


def _nearer(row: Row, other: Row) -> bool:
    assert row.latent_error is not None
    assert other.latent_error is not None
    return row.latent_error < other.latent_error


def _no_slower(row: Row, other: Row) -> bool:
    """By the median over the rounds of the ratio within a round; within 2 % counts as equal."""
    ratios = [mine / theirs for mine, theirs in zip(row.seconds_all, other.seconds_all, strict=True)]
    return statistics.median(ratios) <= 1.02


def _figures(rows: Iterable[Row]) -> str:
    return "; ".join(f"{row.label}: error {row.latent_error:.4f}, time {row.time_ratio:.2f}" for row in rows)


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--model", default="micro-flux")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--html", type=Path, help="folder for a report per comparison")
    options = parser.parse_args()
    pipe = ditkit.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    prompts, trial = captions(options.prompts), captions(8, first=options.prompts)
    found: list[Claim] = []
    figures: dict[str, Any] = {}
    for steps in options.steps:
        sampling = Sampling(steps=steps)
        dense = latents(pipe, trial, sampling)
        for interval in options.intervals:
            errors, timed = compare(pipe, dense, sampling, interval, trial, prompts, options.repeats)
            found += claims(steps, interval, timed)
            figures[f"{steps} steps, interval {interval}"] = {
                "errors": {name_of(method): error for method, error in errors.items()},
                "timed": timed.as_dict()["rows"],
            }
            if options.html:
                title = f"TaylorSeer on micro-flux, {steps} steps, interval {interval}"
                timed.to_html(options.html / f"taylorseer-{steps}-{interval}.html", title)
            write(options.json, found, comparison.machine(pipe), prompts=prompts, figures=figures)


if __name__ == "__main__":
    main()
