"""CLEAR's distillation on trained micro-flux: what a local window costs, and what of it fitting gives back.

The pipeline draws pictures for captions of the emoji set; a student with a local window learns from them,
with the teacher's predictions and attention outputs, training only q, k, v and output projections. Distances
to the teacher are measured on other pictures, and the latents drawn for other captions are compared with
those of full attention. Then the time of a window of one radius on growing grids.

    python -m benchmarks.methods.clear [--steps 200] [--radii 1 2]

L tokens, N image tokens.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

import ditkit
from benchmarks.record import Claim, arguments, write
from ditkit.analysis.bench import machine
from ditkit.analysis.metrics import relative_l2
from ditkit.analysis.sampling import Sampling, sample
from ditkit.fitting import run
from ditkit.fitting.clear import FitLocalWindow, distilling
from ditkit.fitting.objective import Objective
from ditkit.fitting.run import FitData
from ditkit.fitting.samples import Samples, keep, prepare
from ditkit.methods.clear import LocalWindow
from ditkit.seams.layout import TokenLayout
from ditkit.training.order import BatchNoise

console = Console()
PAPER = "arXiv 2412.16112"


def part(samples: Samples, which: slice) -> Samples:
    """Some of the samples."""
    return Samples(samples.latents[which], samples.shared, samples.rows[which], samples.divisor, samples.sign)


@torch.no_grad()
def distances(pipe: Any, held_out: Samples, fitter: FitLocalWindow, weights: str | None) -> dict[str, float]:
    """Mean losses of a student on held-out pictures, four noise draws each."""
    student = LocalWindow(radius=fitter.radius, down_factor=fitter.down_factor, weights=weights)
    batch = torch.arange(len(held_out))
    found: list[dict[str, float]] = []
    with distilling(fitter, pipe.transformer, held_out, Objective(pipe.scheduler), student) as work:
        for step in range(4):
            noise = BatchNoise(99, step, len(batch), batch, torch.device("cpu"))
            losses = work.losses(batch, noise)
            found.append({name: float(value) for name, value in losses.items()})
    return {name: statistics.mean(one[name] for one in found) for name in found[0]}


def drawn(pipe: Any, prompts: list[str], *methods: Any) -> torch.Tensor:
    with ditkit.apply(pipe, *methods, count_flops=False):
        latents = sample(pipe, prompts, Sampling(steps=28)).latents
    assert latents is not None
    return latents


def distil(pipe: Any, fitter: FitLocalWindow, prompts: tuple[str, ...], samples: Samples) -> dict[str, Any]:
    """One setting: held-out distances and errors of drawn latents, before and after."""
    train, held_out = part(samples, slice(fitter.samples)), part(samples, slice(fitter.samples, None))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "fit"
        keep(folder, train)  # the fitter finds its samples prepared
        run.run(pipe, "clear", fitter, FitData(prompts), folder)
        others = list(prompts[-8:])
        dense = drawn(pipe, others)
        plain = LocalWindow(radius=fitter.radius, down_factor=fitter.down_factor)
        return {
            "radius": fitter.radius,
            "down_factor": fitter.down_factor,
            "before": distances(pipe, held_out, fitter, None),
            "after": distances(pipe, held_out, fitter, str(folder)),
            "error before": relative_l2(drawn(pipe, others, plain), dense),
            "error after": relative_l2(drawn(pipe, others, LocalWindow(weights=str(folder))), dense),
        }


@torch.no_grad()
def scaling(rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of one attention at 32, 64 and 96 tokens a side, radius 8, without text: medians of turns."""
    seconds: dict[str, dict[int, float]] = {"window": {}, "dense": {}}
    for side in (32, 64, 96):
        q, k, v = (torch.randn(1, 2, side * side, 64) for _ in range(3))
        layout = TokenLayout((1, side, side))
        strategy = LocalWindow(radius=8, executor="gather").strategy()
        plan = strategy.plan(layout, 2, q.device)
        runs = {
            "window": lambda q=q, k=k, v=v, plan=plan, strategy=strategy: strategy.attend(
                q, k, v, None, None, _Call(), plan
            ),
            "dense": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, action in runs.items():
                start = time.perf_counter()
                action()
                if number:
                    times[name].append(time.perf_counter() - start)
        for name, values in times.items():
            seconds[name][side] = statistics.median(values)
    return seconds


class _Call:
    """A call outside any model."""

    name = "attn"

    def attended(self, share: float) -> None:
        pass


def slope(seconds: dict[int, float]) -> float:
    """Of the log of time over the log of the number of tokens, from the smallest to the largest grid."""
    first, last = min(seconds), max(seconds)
    return math.log(seconds[last] / seconds[first]) / math.log(last**2 / first**2)


def claims(results: list[dict[str, Any]], seconds: dict[str, dict[int, float]], steps: int) -> list[Claim]:
    found = []
    for one in results:
        pooled = (
            f", keys pooled over {one['down_factor']} x {one['down_factor']}"
            if one["down_factor"] > 1
            else ""
        )
        where = f"micro-flux (8 x 8 tokens), r = {one['radius']:g}{pooled}, {steps} steps"
        before, after = one["before"], one["after"]
        found.append(
            Claim(
                "local-window",
                f"{where}: distilling q, k, v, out halves the distances to the teacher on held-out pictures",
                PAPER,
                f"attention outputs {before['attention']:.4f} to {after['attention']:.4f}, velocity "
                f"{before['teacher']:.4f} to {after['teacher']:.4f}",
                after["attention"] <= before["attention"] / 2 and after["teacher"] <= before["teacher"] / 2,
                "mean squares; the paper trains 10,000 steps of 32",
            )
        )
        found.append(
            Claim(
                "local-window",
                f"{where}: drawn latents are nearer to full attention's after distillation",
                PAPER,
                f"relative L2 {one['error before']:.3f} to {one['error after']:.3f}",
                one["error after"] < one["error before"],
                "eight captions that were not trained on, 28 steps",
            )
        )
    slopes = {name: slope(times) for name, times in seconds.items()}
    found.append(
        Claim(
            "local-window",
            "r = 8, no text, 1,024 to 9,216 tokens: time grows like the tokens (exponent at most 1.2)",
            PAPER,
            f"exponent {slopes['window']:.2f}; dense attention {slopes['dense']:.2f}",
            slopes["window"] <= 1.2,
        )
    )
    return found


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--radii", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--down", type=int, default=2, help="factor of the pooled keys at the first radius")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    pipe = ditkit.load("micro-flux")
    pipe.set_progress_bar_config(disable=True)
    prompts = run.emoji_prompts()[: options.samples + 16]
    with tempfile.TemporaryDirectory() as folder:
        data = FitData(prompts[:-8])  # the last eight are only drawn
        samples = prepare(pipe, data, len(data.prompts), Path(folder), lambda what, done, total: None)
    settings = [(radius, 1) for radius in options.radii] + [(options.radii[0], options.down)]
    results = []
    for radius, factor in settings:
        fitter = FitLocalWindow(
            radius=radius,
            down_factor=factor,
            steps=options.steps,
            batch=options.batch,
            samples=options.samples,
        )
        results.append(distil(pipe, fitter, prompts, samples))
        console.print(results[-1])
    seconds = scaling(options.rounds)
    given = {name: value for name, value in vars(options).items() if name != "json"}
    found = claims(results, seconds, options.steps)
    write(options.json, found, machine(pipe), settings=given, results=results, seconds=seconds)


if __name__ == "__main__":
    main()
