"""Which parts of a small PT-DiT does its error need? The whole, and the whole without proxies (GIIM), without
shifted windows, without any windows (TCM), with the first token of a window for its proxy; beside them full
attention in one window.

    python -m benchmarks.architectures.pt_dit [--steps 200] [--seeds 0 1 2]
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor, nn

from benchmarks.architectures import toy
from benchmarks.record import Claim
from ditkit.models import pt_dit
from ditkit.models.pt_dit import PTDiT

PLAN = toy.Plan(steps=200, seeds=(0, 1, 2), batch=16)
CONFIG: dict[str, Any] = toy.TRANSFORMER | {
    "depth": 2,
    "compress_ratios": (1, 2, 2),
    "caption_channels": None,
}
WHOLE_GRID = (1, toy.SIDE // 2, toy.SIDE // 2)


def whole(**changes: Any) -> PTDiT:
    return PTDiT(**{**CONFIG, **changes})


def without_proxies(**changes: Any) -> PTDiT:
    """No token sees beyond its windows."""
    model = whole(**changes)
    block: Any
    for block in model.transformer_blocks:
        block.proxy_attn1, block.pvisual_attn2, block.linear_1_visual = (
            toy.Nothing(),
            toy.Nothing(),
            nn.Identity(),
        )
    return model


def without_shift() -> PTDiT:
    return whole(shift_window=False)


def without_windows() -> PTDiT:
    """Tokens see proxies only."""
    model = without_shift()
    block: Any
    for block in model.transformer_blocks:
        block.attn1 = toy.Nothing()
    return model


def full_attention() -> PTDiT:
    """One window as large as the grid."""
    return without_proxies(compress_ratios=WHOLE_GRID, shift_window=False)


class TopLeft(nn.Module):
    """A PT-DiT whose proxies are the first tokens of the windows, not their means."""

    def __init__(self) -> None:
        super().__init__()
        self.network = whole()

    def forward(self, *inputs: Tensor) -> Any:
        def first(windows: Tensor, *geometry: Any) -> Tensor:
            return windows[:, :, 0]

        with mock.patch.object(pt_dit, "pool_proxies", first):
            return self.network(*inputs)


PAPER = "arXiv 2409.04005, by FID"
VARIANTS = {
    "whole": whole,
    "without GIIM": without_proxies,
    "without shift": without_shift,
    "without TCM": without_windows,
    "top-left proxies": TopLeft,
    "full attention": full_attention,
}


def claims(found: dict[str, list[toy.Trained]], plan: toy.Plan) -> list[Claim]:
    errors = {name: toy.losses(runs) for name, runs in found.items()}
    limit = f"{plan}, width 32, depth 2, 8x8 tokens, windows of 2x2"

    def below(less: str, more: str, text: str, note: str = "", by: str = PAPER) -> Claim:
        holds, measured = toy.compare((less, errors[less]), (more, errors[more]))
        return Claim("pt-dit", text, by, measured, holds, limit + note)

    return [
        below("whole", "without GIIM", "without attention through proxies (GIIM) the error is higher"),
        below("whole", "without shift", "without shifted windows the error is higher"),
        below("without GIIM", "without TCM", "the windows (TCM) matter more than the proxies"),
        below(
            "without shift",
            "without TCM",
            "without any windows the error is higher than without shifted ones",
        ),
        below("whole", "top-left proxies", "means of a window serve better than its first token"),
        below(
            "whole",
            "full attention",
            "no worse than full attention",
            f"; full attention has {_share():.2f} times the parameters, not made up for",
            by="ours, at a small scale",
        ),
    ]


def _share() -> float:
    return toy.parameters(full_attention()) / toy.parameters(whole())


def main() -> None:
    options = toy.arguments(__file__, __doc__, PLAN).parse_args()
    plan = toy.plan_of(options)
    found = toy.study(VARIANTS, plan)
    toy.write(options.json, claims(found, plan), plan, found)


if __name__ == "__main__":
    main()
