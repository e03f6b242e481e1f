"""One attention module outside any model, its attention call handed to a strategy as the seam does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.seams.attention import AttentionCall
from ditkit.seams.layout import TokenLayout
from ditkit.seams.steps import Step


class Call(AttentionCall):
    """A call of no model: its layer, step and state are set by hand."""

    def __init__(self, layer: int = 0, index: int = 0, num_steps: int | None = None) -> None:
        self.layer = layer
        self.name = "attn"
        self.kept: dict[Any, Any] = {}
        self.shares: list[float] = []
        self.at = Step(index, num_steps, 0.0, "0", 0)

    @property
    def step(self) -> Step:
        return self.at

    @property
    def state(self) -> dict[Any, Any]:
        return self.kept

    def attended(self, share: float) -> None:
        self.shares.append(share)


@contextmanager
def through(strategy: Any, layout: TokenLayout, heads: int, call: Call) -> Iterator[None]:
    """Inside, whatever calls scaled_dot_product_attention is served by the strategy."""
    original = F.scaled_dot_product_attention
    plan = strategy.plan(layout, heads, torch.device("cpu"))

    def served(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **rest: Any,
    ) -> Tensor:
        assert not dropout_p and not is_causal
        F.scaled_dot_product_attention = original
        try:
            return strategy.attend(query, key, value, attn_mask, scale, call, plan)
        finally:
            F.scaled_dot_product_attention = served

    F.scaled_dot_product_attention = served
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under a name."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
