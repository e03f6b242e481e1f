"""Does `tune` keep its error budget? Forty draws of search, validation and test prompts from one pool.

Every setting of one search draws all prompts of the pool once; then a draw is arithmetic: the choice is made
by eight prompts, validated on eight others, and tested on the rest, which it never saw.

    python -m benchmarks.methods.tune [--budgets 0.01 0.02 0.05] [--trials 60]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

import ditkit
from benchmarks.record import Claim, arguments, write
from ditkit.analysis import contestants as who
from ditkit.analysis.bench import machine
from ditkit.analysis.metrics import relative_l2_each
from ditkit.analysis.sampling import Sampling, sample
from ditkit.analysis.selection import FASTER, Outcome, choose, over, shortlist
from ditkit.analysis.tune import Trial, TuneResult, tune
from ditkit.data.emoji import EmojiDataset

console = Console()


def captions(count: int) -> list[str]:
    """So many captions of the emoji set, in a fixed random order."""
    known = EmojiDataset(groups=["single"]).captions
    return [known[i] for i in np.random.default_rng(0).permutation(len(known))[:count]]


def pool_errors(pipe: Any, trials: list[Trial], prompts: list[str], sampling: Sampling) -> np.ndarray:
    """The error of every setting on every prompt of the pool, (trials, prompts)."""
    dense = sample(pipe, prompts, sampling).latents
    assert dense is not None
    rows = []
    for trial in track(trials, "errors on the pool", console=console):
        contestant = who.from_recipe(trial.recipe)
        steps = contestant.steps or sampling.steps
        with contestant.attach(pipe, False):
            drawn = sample(pipe, prompts, Sampling(steps, sampling.guidance, seed=sampling.seed)).latents
        assert drawn is not None
        rows.append(relative_l2_each(drawn, dense))
    return np.array(rows)


def draws(trials: list[Trial], errors: np.ndarray, budget: float, number: int) -> dict[str, Any]:
    """Choose, validate and test `number` times from re-split prompts."""
    random = np.random.default_rng(1)
    ratios = [trial.outcome.time_ratio for trial in trials]
    kept, naive, chosen, slower = 0, 0, [], 0
    for _ in range(number):
        order = random.permutation(errors.shape[1])
        search, held, test = order[:8], order[8:16], order[16:]
        outcomes = [Outcome(r, tuple(e[search])) for r, e in zip(ratios, errors, strict=True)]

        def validate(i: int, held: np.ndarray = held) -> Outcome:
            return Outcome(ratios[i], tuple(errors[i, held]))

        taken = choose(shortlist(outcomes, budget), outcomes, budget, validate)
        within = [i for i, one in enumerate(outcomes) if one.error <= budget]
        fastest = min(within, key=lambda i: ratios[i], default=None)
        naive += fastest is None or over(errors[fastest, test].tolist()) <= budget
        if taken is None:
            kept += 1
            continue
        index = taken[0]
        kept += over(errors[index, test].tolist()) <= budget
        slower += ratios[index] >= 1
        chosen.append(ratios[index])
    return {
        "budget": budget,
        "draws": number,
        "kept": kept,
        "kept_without_margin": naive,
        "found": len(chosen),
        "slower_than_dense": slower,
        "median_time_ratio": float(np.median(chosen)) if chosen else math.nan,
    }


def claims(found: list[dict[str, Any]], runs: list[tuple[float, TuneResult, float]]) -> list[Claim]:
    where = "micro-flux, 28 steps"
    made = [
        Claim(
            "tune",
            f"{where}, budget {each['budget']:g}: keeps it on held-out prompts in 95 % of "
            f"{each['draws']} draws",
            "ditkit",
            f"{each['kept']} of {each['draws']} draws, median time {each['median_time_ratio']:.2f} of dense; "
            f"without margin and validation {each['kept_without_margin']} of {each['draws']}",
            each["kept"] >= 0.95 * each["draws"] and not each["slower_than_dense"],
            "one search's settings; prompts re-split, 8 to search, 8 to validate, the rest to test",
        )
        for each in found
    ]
    for budget, result, seconds in runs:
        measured = result.recipe.measured
        what = (
            "dense sampling"
            if result.chosen is None
            else f"{result.recipe.describe()}: time {measured.time_ratio:.2f}, error {measured.error:.4f}"
        )
        faster = result.chosen is None or (measured.time_ratio or math.inf) < FASTER
        made.append(
            Claim(
                "tune",
                f"{where}, budget {budget:g}: {len(result.trials)} trials in at most 4 minutes, "
                "never slower than dense",
                "ditkit",
                f"{seconds / 60:.1f} minutes; {what}",
                faster and seconds <= 240,
            )
        )
    return made


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01, 0.02, 0.05])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--pool", type=int, default=64, help="prompts")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--searches", type=int, default=1, help="so many of the budgets are searched for")
    options: argparse.Namespace = parser.parse_args()
    pipe = ditkit.load("micro-flux")
    pipe.set_progress_bar_config(disable=True)
    runs: list[tuple[float, TuneResult, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for budget in options.budgets[-options.searches :]:
            start = time.perf_counter()
            result = tune(
                pipe, budget, Path(folder) / f"{budget:g}", trials=options.trials, name="micro-flux"
            )
            runs.append((budget, result, time.perf_counter() - start))
            console.print(result.headline(), highlight=False)
    trials = list({t.recipe.describe(): t for _, result, _ in runs for t in result.trials}.values())
    errors = pool_errors(pipe, trials, captions(options.pool), Sampling(28))
    found = [draws(trials, errors, budget, options.draws) for budget in options.budgets]
    for each in found:
        console.print(each)
    write(
        options.json,
        claims(found, runs),
        machine(pipe),
        draws=found,
        settings=[{"recipe": t.recipe.describe(), "time_ratio": t.outcome.time_ratio} for t in trials],
    )


if __name__ == "__main__":
    main()
