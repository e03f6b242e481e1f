"""Every sparse attention of the registry: time against its density, and the claims of the papers.

    python -m benchmarks.methods.sparse_attention --threads 1

One attention call of each method takes turns with dense attention on a picture of 4,096 tokens and a clip
of 8,192; the figures are ratios of medians. The target is 1.35 x density x dense time, and 10 % of dense for
what the method does beside. Then the papers' claims: what DraftAttention's map keeps, Re-ttention's errors
along a trajectory, GRAT's on trained micro-flux.

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

import ditkit
from benchmarks.methods.sparse_quality import QKV, Call, Grid, draft, queries_keys_values, re_ttention
from benchmarks.record import Claim, arguments, write
from ditkit import registry
from ditkit.analysis.bench import machine
from ditkit.analysis.metrics import relative_l2
from ditkit.methods.clear import LocalWindow
from ditkit.methods.draft_attention import DraftAttention
from ditkit.methods.grat import GRAT
from ditkit.methods.re_ttention import ReTtention
from ditkit.seams import executors
from ditkit.seams.layout import TokenLayout
from ditkit.seams.steps import Step

console = Console()
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WITHIN, BESIDE = 1.35, 0.10
# A picture and a clip.
GRIDS: dict[str, Grid] = {"picture": (1, 64, 64), "clip": (8, 32, 32)}
SETTINGS = (
    "grat:pattern=block,group=8x16",
    "grat:pattern=block",
    "grat",
    "draft-attention:sparsity=0.75",
    "draft-attention:sparsity=0.9",
    "re-ttention",
    "re-ttention:band=exact",
    "local-window:frame_radius=1",
    "sla",
    "sparse-vdit:uniform=diagonal",
)
Attend = Callable[[], Any]


def model(width: int) -> torch.nn.Module:
    """A transformer of one block, for methods that ask for a model."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=2,
    ).requires_grad_(False)


def served(method: Any, layout: TokenLayout, qkv: QKV) -> tuple[Attend, Call, Any, Any]:
    """One sparse call of a method, with its strategy and plan."""
    heads, _, channels = qkv[0].shape[1:]
    with ditkit.apply(model(heads * channels), method, count_flops=False) as run:
        seam = run.hosts[0].attention
        strategy, call = seam.strategy, Call(seam.modules()[0][0])
    plan = strategy.plan(layout, heads, qkv[0].device)

    def attend() -> torch.Tensor:
        return strategy.attend(*qkv, None, None, call, plan)

    if hasattr(strategy, "begin"):
        # A full step first, for what keeps something, then one that is neither warm-up nor full.
        warmup = strategy.options.warmup_of(None, 40) if isinstance(method, ReTtention) else 0
        for index in (warmup, 40 - 1):
            strategy.begin(Step(index, 40, 0.0, "0", 0))
            if index == warmup:
                attend()
    attend()
    return attend, call, strategy, plan


def interleaved(runs: dict[str, Attend], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, in turns after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def timings(what: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one grid: every setting, and what two of the methods do beside the sparse attention."""
    grid = GRIDS[what]
    layout = TokenLayout(grid)
    qkv = queries_keys_values(grid, options.heads, options.channels)
    qkv = tuple(x.to(getattr(torch, options.dtype)) for x in qkv)
    runs: dict[str, Attend] = {"dense": lambda: F.scaled_dot_product_attention(*qkv)}
    shares: dict[str, float] = {}
    for setting in options.settings:
        try:
            method = registry.parse_method(setting)
            attend, call, strategy, plan = served(method, layout, qkv)
        except (ValueError, KeyError, RuntimeError) as refusal:
            console.print(f"{setting}: left out, {refusal}")
            continue
        runs[setting], shares[setting] = attend, call.share
        if isinstance(method, DraftAttention):

            def choose(strategy: Any = strategy, plan: Any = plan) -> Any:
                chosen = executors.BlockLists.from_map(strategy.blocks(*qkv[:2], None, plan))
                return executors.BlockPlan(chosen, plan.tiling, layout).share

            runs[f"{setting}: choice"] = choose
        if isinstance(method, ReTtention):
            full: dict[Any, Any] = {}
            runs[f"{setting}: full step"] = lambda strategy=strategy, plan=plan, full=full: strategy._full(
                *qkv, None, None, full, plan
            )
    times = interleaved(runs, options.rounds, CLOCKS[options.clock])
    dense = times["dense"]
    return [
        {
            "what": f"{what}, {layout.length} tokens",
            "setting": name,
            "density": shares.get(name),
            "milliseconds": 1e3 * seconds,
            "of_dense": seconds / dense,
            "times_ideal": seconds / (shares[name] * dense) if name in shares else None,
        }
        for name, seconds in times.items()
    ]


def speed_claims(rows: list[dict[str, Any]], dtype: str) -> list[Claim]:
    """The target for each setting."""
    found = []
    for row in rows:
        if row["density"] is None:
            continue
        beside = {
            r["setting"].partition(": ")[2]: r
            for r in rows
            if r["what"] == row["what"] and r["setting"].startswith(f"{row['setting']}: ")
        }
        words = f"{row['of_dense']:.3f} of dense at density {row['density']:.3f}"
        words += f", {row['times_ideal']:.2f} of ideal"
        for name, other in beside.items():
            words += f"; its {name} takes {other['of_dense']:.3f} of dense"
        if "full step" in beside:
            found.append(_generation(row, beside["full step"]["of_dense"]))
        found.append(
            Claim(
                row["setting"].partition(":")[0],
                f"{row['what']}, {dtype}, {row['setting']}: within {WITHIN} x density x dense time, and "
                f"{BESIDE:.0%} of dense beside",
                "ditkit",
                words,
                row["of_dense"] <= WITHIN * row["density"] + BESIDE,
            )
        )
    return found


def _generation(row: dict[str, Any], full: float) -> Claim:
    """Re-ttention's attention over PixArt's 20 steps: 5 dense, 3 full, 12 sparse."""
    ideal = (8 + (12 + 3) * row["density"]) / 20
    taken = (5 + 3 * full + 12 * row["of_dense"]) / 20
    return Claim(
        "re-ttention",
        f"{row['what']}, {row['setting']}: 20 steps with 12 sparse take (8 + 12 kept) / 20 of dense, and a "
        "sparse pass at each full step, within 10 %",
        "arXiv 2505.22918",
        f"{taken:.3f} of dense; ideal {ideal:.3f}",
        taken <= 1.1 * ideal,
    )


def equal_density(options: argparse.Namespace) -> tuple[list[Claim], list[dict[str, Any]]]:
    """GRAT-B against the per-token window that reads as much."""
    layout = TokenLayout(GRIDS["picture"])
    qkv = queries_keys_values(layout.grid, options.heads, options.channels)
    block = GRAT(pattern="block", group=(1, 8, 16))
    share = block.density(layout.grid)
    side = layout.grid[1]
    window = min(
        (LocalWindow(radius=r / 2) for r in range(2, 2 * side)),
        key=lambda w: abs(w.density(side, side, 0) - share),
    )
    runs: dict[str, Attend] = {"dense": lambda: F.scaled_dot_product_attention(*qkv)}
    for name, method in (("group", block), ("window", window)):
        runs[name] = served(method, layout, qkv)[0]
    times = interleaved(runs, options.rounds, CLOCKS[options.clock])
    faster = times["window"] / times["group"]
    claim = Claim(
        "grat",
        "picture, 4096 tokens: at equal density at least 1.5 times as fast as a window of each token",
        "arXiv 2505.14687",
        f"{faster:.2f} times: GRAT-B {times['group'] / times['dense']:.3f} of dense at density {share:.3f}, "
        f"window of radius {window.radius:g} {times['window'] / times['dense']:.3f} of dense at "
        f"{window.density(side, side, 0):.3f}",
        faster >= 1.5,
    )
    return [claim], [{"setting": name, "seconds": seconds} for name, seconds in times.items()]


def micro_flux(prompts: int, steps: int) -> tuple[list[Claim], list[dict[str, Any]]]:
    """GRAT's order of errors on a model trained with full attention: 8 x 8 tokens in groups of 2 x 2."""
    from taylorseer_micro_flux import captions, latents

    from ditkit.analysis.sampling import Sampling

    pipe = ditkit.load("micro-flux")
    pipe.set_progress_bar_config(disable=True)
    sampling, drawn = Sampling(steps=steps), captions(prompts)
    grid, text = (1, 8, 8), 0
    block, cross = (GRAT(pattern=pattern, group=(1, 2, 2)) for pattern in ("block", "cross"))
    windows = [LocalWindow(radius=r / 4) for r in range(4, 40)]

    def like(method: GRAT) -> LocalWindow:
        share = method.density(grid, text)
        return min(windows, key=lambda w: abs(w.density(8, 8, text) - share))

    dense = latents(pipe, drawn, sampling)
    settings = {"GRAT-X": cross, "GRAT-B": block, "window": like(block), "window as GRAT-X": like(cross)}
    rows = []
    for name, method in settings.items():
        share = method.density(8, 8, text) if isinstance(method, LocalWindow) else method.density(grid, text)
        error = relative_l2(latents(pipe, drawn, sampling, method), dense)
        rows.append({"setting": name, "density": share, "error": error})
    errors = {row["setting"]: row["error"] for row in rows}
    words = "; ".join(f"{r['setting']}: error {r['error']:.3f} at density {r['density']:.2f}" for r in rows)
    where = f"micro-flux, {steps} steps, groups of 2 x 2 of 8 x 8 tokens"
    limit = "64 image tokens: no gain in time is possible there"
    return [
        Claim(
            "grat",
            f"{where}: the error of GRAT-X is below GRAT-B's, that below a window's of GRAT-B's density",
            "arXiv 2505.14687",
            words,
            errors["GRAT-X"] < errors["GRAT-B"] < errors["window"],
            limit,
        ),
        Claim(
            "grat",
            f"{where}: the error of GRAT-X is below a window's of its own density",
            "arXiv 2505.14687",
            words,
            errors["GRAT-X"] < errors["window as GRAT-X"],
            limit,
        ),
    ], rows


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--grids", nargs="*", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="methods as --with takes them")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--channels", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a machine that is busy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument(
        "--skip", nargs="*", choices=["speed", "draft", "re-ttention", "micro-flux"], default=[]
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # As in a process that has run a model: freed memory stays with it instead of being mapped again.
    torch.ones(31 << 18)
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    with torch.no_grad():
        if "speed" not in options.skip:
            rows = [row for what in options.grids for row in timings(what, options)]
            show(rows, options)
            more, figures["equal density"] = equal_density(options)
            claims += [*speed_claims(rows, options.dtype), *more]
            figures["speed"] = rows
        if "draft" not in options.skip:
            more, figures["draft"] = draft(GRIDS["clip"], options.heads, options.channels, options.seeds)
            claims += more
        if "re-ttention" not in options.skip:
            more, figures["re-ttention"] = re_ttention(
                (1, 32, 32), options.heads, options.channels, options.seeds
            )
            claims += more
    if "micro-flux" not in options.skip:
        more, figures["micro-flux"] = micro_flux(options.prompts, options.steps)
        claims += more
    for claim in claims:
        console.print(f"{'holds' if claim.holds else 'DOES NOT HOLD'}  {claim.claim}: {claim.measured}")
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write(options.json, claims, machine(), settings=settings, figures=figures)


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(title=f"{options.dtype}, {options.threads} thread(s), medians of {options.rounds}")
    for column in ("what", "setting", "density", "ms", "of dense", "x ideal"):
        table.add_column(column, justify="left" if column in ("what", "setting") else "right")
    for row in rows:
        figures = (
            "" if row[key] is None else f"{row[key]:.3f}"
            for key in ("density", "milliseconds", "of_dense", "times_ideal")
        )
        table.add_row(row["what"], row["setting"], *figures)
    console.print(table)


if __name__ == "__main__":
    main()
