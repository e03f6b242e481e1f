"""What a skipped step costs, and what the seams cost when nothing is skipped.

A FLUX-type transformer of random weights (3 double and 6 single blocks, width 512, 1,024 image and 64 text
tokens). Every variant has a copy of the model of its own, brought to the point where it skips; then all run
once in each round, interleaved, so that other load on the machine hits them alike. Reported: the median over
rounds of the ratio to the dense forward of the same round.

    python -m benchmarks.seams.overhead --threads 2 --rounds 9 --json seam_overhead.json
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, TaylorSeerCacheConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import ditkit
from benchmarks.record import Claim, arguments, write
from ditkit.analysis.bench import machine
from ditkit.seams.stats import flop_counter

FAR = 10**6  # an interval that never ends: every step after the warm-up is skipped
TARGETS = {"last-block, skipped": 0.03, "module, skipped": 0.15, "no method": 1.01}
# diffusers' hook on all that TaylorSeer's paper forecasts.
EVERYWHERE = [
    r"transformer_blocks\.\d+\.(attn|ff|ff_context)",
    r"single_transformer_blocks\.\d+\.(attn|proj_mlp|proj_out)",
]


def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=512,
        pooled_projection_dim=512,
        axes_dims_rope=(8, 28, 28),
    )
    return model.eval().requires_grad_(False)


def inputs(side: int = 32, text: int = 64) -> dict[str, Any]:
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    return {
        "hidden_states": torch.randn(1, side * side, 64),
        "encoder_hidden_states": torch.randn(1, text, 512),
        "pooled_projections": torch.randn(1, 512),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def variants(given: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """Name -> one forward of that variant, ready to skip."""
    base = transformer()

    def forwards(
        model: FluxTransformer2DModel, warm: int, context: str | None = None
    ) -> Callable[[], Tensor]:
        level = [1.0]

        def forward() -> Tensor:
            level[0] -= 1e-4
            within = model.cache_context(context) if context else contextlib.nullcontext()
            with within:
                return model(**given, timestep=torch.tensor([level[0]]))[0]

        for _ in range(warm):
            forward()
        return forward

    def seer(granularity: Any, order: int = 1) -> Callable[[], Tensor]:
        model, warm = copy.deepcopy(base), order + 1
        method = ditkit.TaylorSeer(interval=FAR, order=order, warmup=warm, granularity=granularity)
        ditkit.apply(model, method, count_flops=False)
        # The authors take no difference before the last warm-up step.
        return forwards(model, warm)

    def diffusers_hook(**options: Any) -> Callable[[], Tensor]:
        model = copy.deepcopy(base)
        model.enable_cache(TaylorSeerCacheConfig(cache_interval=FAR, disable_cache_before_step=2, **options))
        return forwards(model, 4, "cond")

    empty = copy.deepcopy(base)
    ditkit.apply(empty, count_flops=False)
    return {
        "dense": forwards(base, 1),
        "no method": forwards(empty, 1),
        "last-block, skipped": seer("last-block"),
        "module, skipped": seer("module"),
        "diffusers default, skipped": diffusers_hook(),
        "diffusers attention + MLP, skipped": diffusers_hook(cache_identifiers=EVERYWHERE),
    }


def own_cost() -> float:
    """Seconds that the seam takes around one forward, measured around a forward that does nothing."""
    run = ditkit.apply(transformer(), count_flops=False)
    arguments = {**inputs(4, 4), "timestep": torch.tensor([0.5])}
    around, repeats = run.hosts[0].around, 300
    start = time.perf_counter()
    for _ in range(repeats):
        around(_nothing, (), arguments)
    seconds = (time.perf_counter() - start) / repeats
    run.remove()
    return seconds


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def measure(rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {}
    flops: dict[str, int] = {}
    with torch.inference_mode():
        running = variants(inputs())
        for name, forward in running.items():
            with flop_counter() as counter:
                forward()
            flops[name] = counter.get_total_flops()
        for _ in track(range(rounds), description="rounds"):
            for name, forward in running.items():
                start = time.perf_counter()
                forward()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        seam = own_cost()
    dense = statistics.median(seconds["dense"])
    rows = {}
    for name, times in seconds.items():
        ratios = sorted(one / other for one, other in zip(times, seconds["dense"], strict=True))
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(times),
            "of_dense": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
            "flops_of_dense": flops[name] / flops["dense"],
            "target": TARGETS.get(name),
        }
    return {
        "rows": rows,
        "seam_microseconds": 1e6 * seam,
        "seam_of_dense": seam / dense,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"one forward, {result['threads']} threads, median of {result['rounds']} rounds")
    for column in ("variant", "ms", "% of dense", "quartiles", "FLOPs %", "target %"):
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in result["rows"].items():
        low, high = row["quartiles"]
        shown.add_row(
            name,
            f"{row['milliseconds']:.1f}",
            f"{100 * row['of_dense']:.2f}",
            f"{100 * low:.2f} .. {100 * high:.2f}",
            f"{100 * row['flops_of_dense']:.2f}",
            f"{100 * row['target']:.0f}" if row["target"] else "",
        )
    shown.caption = (
        f"The seam itself: {result['seam_microseconds']:.0f} microseconds for each forward, "
        f"{100 * result['seam_of_dense']:.4f} % of dense."
    )
    return shown


def claims(result: dict[str, Any]) -> list[Claim]:
    """The design's targets beside what came out."""
    rows = result["rows"]
    default, full = (
        rows[f"diffusers {form}, skipped"]["of_dense"] for form in ("default", "attention + MLP")
    )
    theirs = f"diffusers' hook: {100 * default:.1f} % by default, {100 * full:.1f} % on attention and MLP"
    found = [
        Claim(
            "taylorseer",
            f"{name}: a step takes at most {100 * TARGETS[name]:.0f} % of a dense one",
            "ditkit",
            f"{100 * rows[name]['of_dense']:.2f} %; {theirs}",
            rows[name]["of_dense"] <= TARGETS[name],
            "FLUX-type transformer of random weights, width 512, 1,024 + 64 tokens, float32",
        )
        for name in ("last-block, skipped", "module, skipped")
    ]
    low, high = rows["no method"]["quartiles"]
    seam = Claim(
        "seams",
        "applied without a method they cost less than 1 % of a dense step",
        "ditkit",
        f"{100 * (rows['no method']['of_dense'] - 1):+.2f} % by the clock; "
        f"{result['seam_microseconds']:.0f} microseconds, {100 * result['seam_of_dense']:.4f} %, of Python",
        result["seam_of_dense"] < 0.01 and low <= 1.01,
        f"quartiles of the clock {100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %",
    )
    return [*found, seam]


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.rounds)
    Console().print(table(result))
    write(options.json, claims(result), machine(), **result["rows"])


if __name__ == "__main__":
    main()
