"""Every pair of methods on one model: time and error of each alone and of both, or the refusal.

A pair works when its error is within twice the sum of the single errors and its counted FLOPs are those that
ran; a pair that can't work must be refused before any work.

    python -m benchmarks.methods.pairs [--model micro-flux] [--weights sla=out/sla harmonica=out/harmonica]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

import ditkit
from benchmarks.record import Claim, arguments, write
from ditkit import registry
from ditkit.analysis.bench import PROMPTS, machine
from ditkit.analysis.meter import count
from ditkit.analysis.metrics import relative_l2
from ditkit.analysis.sampling import Sampling, sample
from ditkit.seams.errors import ConflictError, SeamError, UnsupportedModelError

console = Console()
# Settings at which a method does something on micro-flux; its defaults where nothing is given.
SETTINGS: dict[str, dict[str, Any]] = {
    "taylorseer": {"interval": 3, "order": 1, "granularity": "last-block"},
    "cg-taylor": {"threshold": 0.05, "warmup": 3},
    "local-window": {"radius": 4.0},
    "draft-attention": {"sparsity": 0.5, "pool": "4x4"},
    "grat": {"group": "4x4"},
    "re-ttention": {"keep": 0.5, "band": "exact"},
    "ras": {"sample_ratio": 0.5, "skip_multiple": 1},
    # Without what a fit learns: the plain rules of these methods.
    "harmonica": {"uniform": 2},
    "sparse-vdit": {"uniform": "diagonal", "block": 8, "diag_width": 2},
    "sla": {"topk": 0.5, "block_q": 8, "block_kv": 8},
}


@dataclass
class Found:
    """What one or two methods gave."""

    error: float
    seconds: float
    flops: float
    true: bool


def measure(
    pipe: Any, methods: Sequence[Any], prompts: Sequence[str], sampling: Sampling, reference: Any, rounds: int
) -> Found:
    """Error, median seconds, counted FLOPs, and whether the report counts the same."""
    with ditkit.apply(pipe, *methods) as run, count(pipe.transformer) as spent:
        drawn = sample(pipe, prompts, sampling)
        report = run.report()
    whole = report.steps == report.steps_computed + report.steps_forecast == sampling.steps
    same = report.flops is not None and abs(report.flops - spent.flops) <= 0.01 * spent.flops
    seconds = []
    for _ in range(rounds):
        with ditkit.apply(pipe, *methods, count_flops=False):
            seconds.append(sample(pipe, prompts, sampling).seconds)
    return Found(
        relative_l2(drawn.latents, reference), statistics.median(seconds), spent.flops, bool(whole and same)
    )


def claims(
    single: dict[str, Found], pairs: dict[tuple[str, str], Found | str], dense: float, where: str
) -> list[Claim]:
    made = []
    for (one, other), found in pairs.items():
        both = f"{one} + {other}"
        if isinstance(found, str):
            named = all(registry.get("method", name).target.__name__ in found for name in (one, other))
            claim = f"{both}: refused before any work, by both names"
            made.append(Claim("pairs", claim, "ditkit", found, named, where))
            continue
        limit = 2 * (single[one].error + single[other].error)
        made.append(
            Claim(
                "pairs",
                f"{both}: error within twice the sum of the single errors, statistics true",
                "ditkit",
                f"error {found.error:.4f} (alone {single[one].error:.4f} and {single[other].error:.4f}), "
                f"time {found.seconds / dense:.2f} of dense (alone {single[one].seconds / dense:.2f} and "
                f"{single[other].seconds / dense:.2f})" + ("" if found.true else "; statistics differ"),
                found.error <= limit and found.true,
                where,
            )
        )
    return made


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--model", default="micro-flux")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--texts", type=Path, help="a file with a prompt a line; None: the bench's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=FOLDER")
    options: argparse.Namespace = parser.parse_args()
    pipe = ditkit.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    sampling, prompts = Sampling(options.steps, options.guidance), list(PROMPTS[: options.prompts])
    if options.texts:
        prompts = options.texts.read_text(encoding="utf-8").splitlines()[: options.prompts]
    weights = dict(pair.split("=", 1) for pair in options.weights)
    reference = sample(pipe, prompts, sampling).latents
    dense = statistics.median(sample(pipe, prompts, sampling).seconds for _ in range(options.rounds))
    methods: dict[str, Any] = {}
    single: dict[str, Found] = {}
    alone: dict[str, str] = {}
    for name in track(registry.entries("method"), "each alone", console=console):
        given = {"weights": weights[name]} if name in weights else {}
        try:
            method = registry.construct("method", name, {**SETTINGS.get(name, {}), **given})
            single[name] = measure(pipe, [method], prompts, sampling, reference, options.rounds)
            methods[name] = method
        except (SeamError, UnsupportedModelError, registry.OptionError, ValueError) as refusal:
            alone[name] = " ".join(str(refusal).split())
            console.print(f"{name}: {alone[name]}", highlight=False)
    pairs: dict[tuple[str, str], Found | str] = {}
    for one, other in track(list(itertools.combinations(methods, 2)), "pairs", console=console):
        together = [methods[one], methods[other]]
        try:
            with ditkit.apply(pipe, *together):  # a refusal comes here, or it is a failure
                pass
        except ConflictError as refusal:
            pairs[one, other] = " ".join(str(refusal).split())
            continue
        pairs[one, other] = measure(pipe, together, prompts, sampling, reference, options.rounds)
    where = f"{options.model}, {options.steps} steps"
    write(
        options.json,
        claims(single, pairs, dense, where),
        machine(pipe),
        left_out=alone,
        single={name: vars(found) for name, found in single.items()},
        pairs={
            f"{one} + {other}": found if isinstance(found, str) else vars(found)
            for (one, other), found in pairs.items()
        },
    )


if __name__ == "__main__":
    main()
