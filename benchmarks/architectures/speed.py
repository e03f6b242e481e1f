"""Are the architectures that promise speed faster than a DiT? Forward times, random weights, batch 1.

    python -m benchmarks.architectures.speed [--rounds 9] [--skip dico lamamba-diff lit pt-dit]

Contenders take turns, one run of each in a round; the figures are medians over rounds of the quotient within
a round. DiCo as a whole network against DiT; LaMamba-Diff and PT-DiT by the block; LiT by the attention.
T tokens of a square grid, D width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.record import Claim, arguments, write
from benchmarks.rounds import add_options, interleaved, milliseconds, times_as_fast
from ditkit import models
from ditkit.analysis.bench import machine
from ditkit.models.dit import DiTBlock
from ditkit.models.lamamba_diff import LaMambaBlock
from ditkit.models.layers import Attention
from ditkit.models.lit import LinearAttention, linear_attention
from ditkit.models.pt_dit import Geometry, PTDiTBlock
from ditkit.seams.stats import flop_counter

console = Console()
Runs = dict[str, Callable[[], Tensor]]
Row = dict[str, Any]
GRIDS = (16, 32, 64)  # sides: 256, 1024 and 4096 tokens
RANDOM = "random weights, batch 1, float32, one CPU thread unless said otherwise"


def dico_runs(size: str, latent: int) -> Runs:
    """DiCo and DiT of a size, on latents of a side."""
    inputs = torch.randn(1, 4, latent, latent), torch.tensor([500]), torch.tensor([1])
    networks = {
        "ours": models.create(f"dico-{size}", input_size=latent).eval(),
        "DiT": models.create(f"dit-{size}/2", input_size=latent).eval(),
    }
    return {name: lambda network=network: network(*inputs).sample for name, network in networks.items()}


def lamamba_runs(side: int, width: int = 384, heads: int = 6) -> Runs:
    """A LaMamba block with states of 1 and of 16, and a DiT block of equal width."""
    maps, condition = torch.randn(1, side, side, width), torch.randn(1, width)
    ssm = {"ratio": 2.0, "dt_rank": None, "conv": 3, "conv_bias": False, "continuous": True}
    blocks = {
        state: LaMambaBlock(width, None, heads, (8, 8), True, 4.0, {**ssm, "state": state})
        for state in (1, 16)
    }
    for block in blocks.values():
        for parameter in block.parameters():  # a lone block is not initialised
            torch.nn.init.normal_(parameter, std=0.02)
    dense = DiTBlock(width, heads, 4.0)
    return {
        **{f"state {n}": lambda block=block: block(maps, condition) for n, block in blocks.items()},
        "DiT": lambda: dense(maps.flatten(1, 2), condition.unsqueeze(1)),
    }


def lit_runs(side: int, width: int = 384, heads: int = 6) -> Runs:
    """Linear attention of two heads and softmax attention: the sums alone, and the layers around them."""
    layer, dense = LinearAttention(width, 2), Attention(width, heads)
    tokens = torch.randn(1, side * side, width)
    few, many = ([torch.randn(1, n, side * side, width // n) for _ in range(3)] for n in (2, heads))
    return {
        "ours": lambda: linear_attention(few[0], few[1], few[2]),
        "softmax": lambda: F.scaled_dot_product_attention(many[0], many[1], many[2]),
        "layer": lambda: layer(tokens, (side, side)),
        "softmax layer": lambda: dense(tokens),
    }


def pt_dit_runs(side: int, width: int = 128, heads: int = 4) -> Runs:
    """A PT-DiT block, with the windows that the paper has at this grid, and a DiT block of equal width."""
    window = side // 8
    block, dense = PTDiTBlock(width, heads, True, 1e-6, True, False), DiTBlock(width, heads, 4.0)
    sides = (1, window, window)
    geometry = Geometry((1, side, side), sides, sides, "comb", torch.device("cpu"))
    windows, vectors = torch.randn(1, 64, window * window, width), torch.randn(1, 6, width)
    tokens, condition = windows.flatten(1, 2), vectors[:, :1]
    return {
        "ours": lambda: block(windows, vectors, None, geometry, None, None),
        "DiT": lambda: dense(tokens, condition),
    }


CASES: dict[str, list[tuple[str, Callable[[], Runs]]]] = {
    "dico": [
        (f"{size} {8 * latent}", lambda size=size, latent=latent: dico_runs(size, latent))
        for size in ("s", "b")
        for latent in (32, 64)
    ],
    "lamamba-diff": [(str(side * side), lambda side=side: lamamba_runs(side)) for side in (*GRIDS, 96, 128)],
    "lit": [(str(side * side), lambda side=side: lit_runs(side)) for side in GRIDS],
    "pt-dit": [(str(side * side), lambda side=side: pt_dit_runs(side)) for side in GRIDS],
}
BASELINES = {
    "dico": {"ours": "DiT"},
    "lamamba-diff": {"state 1": "DiT", "state 16": "DiT"},
    "lit": {"ours": "softmax", "layer": "softmax layer"},
    "pt-dit": {"ours": "DiT"},
}


@torch.no_grad()
def measure(skip: list[str], rounds: int, clock: str) -> dict[str, dict[str, Row]]:
    """Architecture -> case -> milliseconds of each run, and how many times as fast as its baseline."""
    found: dict[str, dict[str, Row]] = {}
    cases = [(name, *case) for name, of_one in CASES.items() if name not in skip for case in of_one]
    for name, case, build in track(cases, description="cases"):
        runs = build()
        seconds = interleaved(runs, rounds, clock)
        faster = {run: times_as_fast(seconds, run, other) for run, other in BASELINES[name].items()}
        work = {run: flops(forward) for run, forward in runs.items()}
        found.setdefault(name, {})[case] = {
            "milliseconds": milliseconds(seconds),
            "times_as_fast": faster,
            "flops": work,
        }
    return found


def flops(run: Callable[[], Tensor]) -> int:
    """Of the products of matrices, convolutions and attention in a run."""
    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


def crossing(tokens: list[int], ratios: list[float]) -> float | None:
    """The number of tokens from which a ratio stays above 1, between two measured ones by a line through the
    logarithms; None: not within what was measured."""
    if ratios[-1] <= 1:
        return None
    above = len(ratios) - 1
    while above and ratios[above - 1] > 1:
        above -= 1
    if not above:
        return float(tokens[0])
    low, high = math.log(ratios[above - 1]), math.log(ratios[above])
    share = -low / (high - low)
    return tokens[above - 1] * (tokens[above] / tokens[above - 1]) ** share


def dico_claims(rows: dict[str, Row]) -> list[Claim]:
    claims = []
    for size, published in (("s", "1.37"), ("b", "2.17")):
        small, large = (rows[f"{size} {pixels}"]["times_as_fast"]["ours"] for pixels in (256, 512))
        claims.append(
            Claim(
                "dico",
                f"DiCo-{size.upper()}: faster than DiT-{size.upper()}/2 at 256 pixels ({published} times on "
                "their GPU), and more so at 512",
                "arXiv 2505.11196",
                f"{small:.2f} times as fast at 256, {large:.2f} at 512; {times(rows[f'{size} 512'])} at 512",
                1 < small < large,
                RANDOM,
            )
        )
    return claims


def lamamba_claims(rows: dict[str, Row]) -> list[Claim]:
    claims, tokens = [], [int(case) for case in rows]
    for run in ("state 1", "state 16"):
        ratios = [row["times_as_fast"][run] for row in rows.values()]
        growth = rows["4096"]["milliseconds"][run] / rows["1024"]["milliseconds"][run]
        dense = rows["4096"]["milliseconds"]["DiT"] / rows["1024"]["milliseconds"]["DiT"]
        from_here = crossing(tokens, ratios)
        words = ", ".join(f"{ratio:.2f} at {n}" for n, ratio in zip(tokens, ratios, strict=True))
        measured = (
            f"times as fast: {words}; "
            + (f"faster from {from_here:.0f} tokens" if from_here else "not faster at these lengths")
            + f"; from 1,024 to 4,096 tokens {growth:.2f} times the time (DiT {dense:.2f})"
        )
        for claim, holds in (
            ("from some number of tokens on, its time linear", ratios[-1] > 1 and growth < 4.4),
            ("at 4,096 tokens", ratios[tokens.index(4096)] > 1),
        ):
            claims.append(
                Claim(
                    "lamamba-diff",
                    f"{run}: a block is faster than a DiT block of equal width {claim}",
                    "arXiv 2408.02615",
                    measured,
                    holds,
                    f"width 384, two shifts of windows of 8; {RANDOM}; the scan is plain PyTorch",
                )
            )
    return claims


def lit_claims(rows: dict[str, Row]) -> list[Claim]:
    words = "; ".join(
        f"{case} tokens: {row['times_as_fast']['ours']:.2f} times as fast ({times(row, 'ours', 'softmax')}), "
        f"with projections and convolution {row['times_as_fast']['layer']:.2f}"
        for case, row in rows.items()
    )
    faster = (rows[case]["times_as_fast"]["ours"] > 1 for case in ("1024", "4096"))
    growth = rows["4096"]["milliseconds"]["ours"] / rows["1024"]["milliseconds"]["ours"]
    claim = "linear attention of two heads is faster than softmax at 1,024 and 4,096 tokens, its time linear"
    return [
        Claim(
            "lit",
            claim,
            "arXiv 2501.12976",
            f"{words}; from 1,024 to 4,096 tokens {growth:.2f} times the time",
            all(faster) and growth < 4.4,
            f"width 384, softmax of six heads; {RANDOM}",
        )
    ]


def pt_dit_claims(rows: dict[str, Row]) -> list[Claim]:
    words = "; ".join(
        f"{case} tokens: {row['times_as_fast']['ours']:.2f} times as fast ({times(row)}) with "
        f"{row['flops']['ours'] / row['flops']['DiT']:.2f} of the FLOPs"
        for case, row in rows.items()
    )
    faster = {case: row["times_as_fast"]["ours"] for case, row in rows.items()}
    limit = f"width 128, windows of an eighth of the grid's side, no text; {RANDOM}"
    return [
        Claim(
            "pt-dit",
            "a block is faster than one with full attention at 4,096 tokens",
            "arXiv 2409.04005",
            words,
            faster["4096"] > 1,
            limit,
        ),
        Claim(
            "pt-dit",
            "a block takes at most 1.25 times the time of one with full attention at 256 tokens",
            "ditkit",
            words,
            faster["256"] >= 1 / 1.25,
            limit,
        ),
    ]


def times(row: Row, ours: str = "ours", other: str = "DiT") -> str:
    """The medians in words."""
    return f"{row['milliseconds'][ours]:.1f} ms, {row['milliseconds'][other]:.1f} ms"


CLAIMS = {"dico": dico_claims, "lamamba-diff": lamamba_claims, "lit": lit_claims, "pt-dit": pt_dit_claims}


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__file__, __doc__)
    add_options(parser, rounds=9)
    parser.add_argument("--skip", nargs="*", choices=CASES, default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # As in a process that has run a model: freed memory stays with it instead of being mapped again.
    torch.ones(31 << 18)
    rows = measure(options.skip, options.rounds, options.clock)
    claims = [claim for name, found in rows.items() for claim in CLAIMS[name](found)]
    for claim in claims:
        console.print(f"{'holds' if claim.holds else 'DOES NOT HOLD'}  {claim.claim}: {claim.measured}")
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write(options.json, claims, machine(), settings=settings, figures=rows)


if __name__ == "__main__":
    main()
