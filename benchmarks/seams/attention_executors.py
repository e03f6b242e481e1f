"""Time of the sparse-attention executors against their ideal, density x dense time.

    python -m benchmarks.seams.attention_executors --threads 1

Random tiles of 128 tokens for each query tile and head, float32 by default, no text. Dense attention and the
executors take turns in one process; the figures are ratios of medians. A dense pass with the same mask shows
that masking alone does not pay. The disc rows are local windows, where ideal counts the discs' pairs only.

B batch, h heads, L tokens, d head dim.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.record import Claim, arguments, write
from ditkit.analysis.bench import machine
from ditkit.methods.clear import LocalWindow
from ditkit.seams import executors
from ditkit.seams.layout import TokenLayout

TILE = (1, 8, 16)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    runs: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each, measured in turns after one warm-up each; `clock` gives the time."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            run()
        for _ in range(rounds):
            for name, run in runs.items():
                start = clock()
                run()
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def random_lists(heads: int, tiles: int, density: float) -> executors.BlockLists:
    keep = max(1, round(density * tiles))
    order = torch.rand(1, heads, tiles, tiles).argsort(-1)
    return executors.BlockLists(order[..., :keep].sort(-1).values)


def measure(
    what: str,
    share: float,
    dense: Callable[[], Tensor],
    runs: dict[str, Callable[[], Tensor]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    times = interleaved({"dense": dense, **runs}, options.rounds, CLOCKS[options.clock])
    return [
        {
            "what": what,
            "executor": name,
            "density": share,
            "milliseconds": 1e3 * times[name],
            "dense_milliseconds": 1e3 * times["dense"],
            "speed_up": times["dense"] / times[name],
            "times_ideal": times[name] / (share * times["dense"]),
        }
        for name in runs
    ]


def blocks(length: int, density: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Random lists on a grid of `length` tokens."""
    layout = TokenLayout((1, length // 64, 64))
    tiling = executors.tile_grid(layout.grid, TILE)
    lists = random_lists(options.heads, len(tiling.order), density)
    dtype = getattr(torch, options.dtype)
    q, k, v = (torch.randn(1, options.heads, length, options.channels, dtype=dtype) for _ in range(3))
    plan = executors.BlockPlan(lists, tiling, layout)
    flex_plan, mask = executors.plan_blocks(lists, tiling, layout), plan.mask
    runs: dict[str, Callable[[], Tensor]] = {
        "flex": lambda: executors.flex_blocks(q, k, v, flex_plan, layout),
        "gather": lambda: executors.gather_blocks(q, k, v, lists, tiling, layout),
        "masked dense": lambda: executors.masked_dense(q, k, v, mask),
    }
    if not options.flex:
        del runs["flex"]
    what = f"{length} tokens, blocks; auto: {plan.choose(q, k, v).name}"
    return measure(what, plan.share, lambda: F.scaled_dot_product_attention(q, k, v), runs, options)


def discs(side: int, radius: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Local windows on a square grid with the text of FLUX."""
    layout = TokenLayout((1, side, side), 512, "prefix")
    q, k, v = (torch.randn(1, options.heads, layout.length, options.channels) for _ in range(3))
    method = LocalWindow(radius=radius)
    strategy = method.strategy()
    plan = strategy.plan(layout, options.heads, q.device)
    runs = {
        "gather": lambda: executors.gather_windows(q, k, v, plan.windows, layout),
        "masked dense": lambda: executors.masked_dense(q, k, v, plan.allowed),
    }
    what = f"{side} x {side} + 512 text, disc r = {radius:g}; auto: {plan.choice.name}"
    return measure(what, plan.share, lambda: F.scaled_dot_product_attention(q, k, v), runs, options)


def claims(rows: list[dict[str, Any]], settings: dict[str, Any]) -> list[Claim]:
    """The design's target for random blocks, and what the windows of CLEAR come to."""
    found = []
    for what in dict.fromkeys(row["what"] for row in rows):
        of_this = [row for row in rows if row["what"] == what]
        for density in dict.fromkeys(row["density"] for row in of_this):
            tried = [row for row in of_this if row["density"] == density]
            row = min(tried, key=lambda row: row["milliseconds"])
            measured = (
                f"{row['executor']}: {row['times_ideal']:.2f} of ideal, {row['speed_up']:.2f} x as fast"
            )
            target = float(settings["within"])
            where = f"{what.partition(';')[0]}, density {density:.2f}, {settings['dtype']}"
            if "blocks" in what:
                claim = f"{where}: within {target} of density x dense time"
                found.append(Claim("attention seam", claim, "ditkit", measured, row["times_ideal"] <= target))
            else:
                claim = f"{where}: less time than dense attention"
                found.append(Claim("local-window", claim, "arXiv 2412.16112", measured, row["speed_up"] > 1))
    return found


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192], help="tokens, multiples of 512"
    )
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--sides", type=int, nargs="*", default=[64], help="grids of the disc windows")
    parser.add_argument("--radii", type=float, nargs="*", default=[8.0, 16.0])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--channels", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--flex", action="store_true", help="compiled flex attention too; needs a C++ compiler"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a machine that is busy")
    parser.add_argument("--within", type=float, default=1.35, help="the target, times ideal")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # As in a process that has run a model: freed memory stays with it instead of being mapped again.
    torch.ones(31 << 18)
    rows = [row for n in options.lengths for share in options.densities for row in blocks(n, share, options)]
    rows += [
        row for side in options.sides for radius in options.radii for row in discs(side, radius, options)
    ]
    table = Table(title=f"{options.dtype}, {options.threads} thread(s), medians of {options.rounds}")
    for column in ("what", "executor", "density", "ms", "dense ms", "speed-up", "x ideal"):
        table.add_column(column, justify="left" if column in ("what", "executor") else "right")
    for row in rows:
        table.add_row(
            row["what"],
            row["executor"],
            f"{row['density']:.3f}",
            f"{row['milliseconds']:.1f}",
            f"{row['dense_milliseconds']:.1f}",
            f"{row['speed_up']:.2f}",
            f"{row['times_ideal']:.2f}",
        )
    Console().print(table)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write(options.json, claims(rows, settings), machine(), settings=settings, rows=rows)


if __name__ == "__main__":
    main()
