"""How the work of a block grows with its tokens, counted on shapes alone: no clock, no weights.

LaMamba's block against DiT's of equal width; PT-DiT's attention against full attention, by equation 4 of its
paper, with windows that grow with the picture as the paper's do.

    python -m benchmarks.architectures.multiply_adds
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.record import Claim, arguments, write
from ditkit.models.dit import DiTBlock
from ditkit.models.lamamba_diff import LaMambaBlock
from ditkit.models.layers import Attention
from ditkit.models.pt_dit import PTDiT, relative_attention_cost
from ditkit.models.selective_scan import scan_multiply_adds
from ditkit.seams.stats import attention_of, flop_counter

WIDTH, HEADS, STATE, WINDOW = 128, 4, 16, 8
SIDES = (16, 32, 64)  # of the grid of tokens: N = 256, 1024, 4096
PROXY_WINDOWS = {16: 2, 32: 4, 64: 8}  # side of PT-DiT's windows, of 256, 512 and 1024 px
PRINTED = {16: 0.343, 32: 0.097, 64: 0.047}  # the paper's figures


def counted(call: Callable[[], Any], attention: bool = False) -> int:
    """Multiply-adds of the matrix products and convolutions of a call, or of its attention alone: scores and
    sums, without the projections."""
    with torch.device("meta"), torch.no_grad(), flop_counter() as counter:
        call()
    return (attention_of(counter) if attention else counter.get_total_flops()) // 2


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def lamamba(side: int) -> int:
    """Of one LaMamba block on a side x side map, its scan by the authors' formula."""
    block: Any = on_meta(
        lambda: LaMambaBlock(WIDTH, None, HEADS, (WINDOW, WINDOW), True, 4.0, {"state": STATE})
    )
    work = counted(lambda: block(torch.empty(1, side, side, WIDTH), torch.empty(1, WIDTH)))
    return _per_token(block, work) + scan_multiply_adds(1, side * side, len(block.op.Ds), STATE)


def dit(side: int) -> int:
    """Of one DiT block on as many tokens."""
    block = on_meta(lambda: DiTBlock(WIDTH, HEADS, 4.0))
    work = counted(lambda: block(torch.empty(1, side * side, WIDTH), torch.empty(1, 1, WIDTH)))
    return _per_token(block, work)


def _per_token(block: Any, work: int) -> int:
    """Without the modulation's vectors, which are made once for all tokens."""
    return work - block.adaLN_modulation[1].weight.numel()


def proxy_share(side: int) -> float:
    """Attention of one PT-DiT block over that of full attention."""
    window = PROXY_WINDOWS[side]
    model = on_meta(
        lambda: PTDiT(
            hidden_size=WIDTH,
            depth=1,
            num_heads=HEADS,
            patch_size=1,
            input_size=side,
            compress_ratios=(1, window, window),
            caption_channels=None,
        )
    )
    proxies = counted(lambda: model(torch.empty(1, 4, side, side), torch.zeros(1)), attention=True)
    full = on_meta(lambda: Attention(WIDTH, HEADS))
    return proxies / counted(lambda: full(torch.empty(1, side * side, WIDTH)), attention=True)


def claims(linear: dict[int, int], square: dict[int, int], shares: dict[int, float]) -> list[Claim]:
    def growth(work: dict[int, int]) -> list[float]:
        return [work[more] / work[less] for less, more in itertools.pairwise(SIDES)]

    lines, squares = growth(linear), growth(square)
    tokens = " to ".join(str(side * side) for side in SIDES)
    formula = {side: relative_attention_cost(PROXY_WINDOWS[side] ** 2, side * side) for side in SIDES}
    return [
        Claim(
            "lamamba-diff",
            "a block's multiply-adds are linear in the tokens, those of a DiT block are not",
            "arXiv 2408.02615",
            f"for each four times the tokens ({tokens}): "
            f"LaMamba {_list(lines, '.4f')} times, DiT {_list(squares, '.3f')} times",
            all(ratio == 4 for ratio in lines) and all(ratio > 4 for ratio in squares),
            f"width {WIDTH}, windows of {WINDOW}x{WINDOW}, state {STATE}; the scan by its authors' formula",
        ),
        Claim(
            "pt-dit",
            "attention costs 34.3, 9.7 and 4.7 % of full attention at 256, 512 and 1024 px (equation 4)",
            "arXiv 2409.04005",
            f"counted {_list(shares.values(), '.2%')}, by the equation {_list(formula.values(), '.2%')} "
            f"at {tokens} tokens",
            all(abs(shares[side] - formula[side]) <= 1e-6 for side in SIDES)
            and all(abs(formula[side] - PRINTED[side]) < 0.0015 for side in SIDES),
            "scores and sums, without projections; windows of 2x2, 4x4 and 8x8 tokens; "
            "at 2048 px the paper prints 2.3 %, its equation gives 3.5 %",
        ),
    ]


def _list(values: Any, form: str) -> str:
    return ", ".join(format(value, form) for value in values)


def main() -> None:
    options = arguments(__file__, __doc__).parse_args()
    linear, square = ({side: count(side) for side in SIDES} for count in (lamamba, dit))
    shares = {side: proxy_share(side) for side in SIDES}
    write(
        options.json,
        claims(linear, square, shares),
        {"torch": torch.__version__},
        lamamba=linear,
        dit=square,
        pt_dit=shares,
    )


if __name__ == "__main__":
    main()
