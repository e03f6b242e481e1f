"""LoRA: a low-rank update of every frozen layer.

"LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685: y = W x + (alpha / r) B A x. It is
peft's own; this file names its options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig

from ditkit.adapters.base import Adapter, shared_settings
from ditkit.registry import Paper, register


@register(
    "adapter",
    "lora",
    summary="a low-rank update of every frozen layer, peft's own",
    paper=Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685", 2021),
    seam=("adapters",),
    needs=("training",),
)
@dataclass(frozen=True)
class LoRA(Adapter):
    """A low-rank update.

    Args:
        rank: r.
        alpha: the update is multiplied by alpha / r; None: as large as r.
        dropout: of the update's input, in training.

    Raises:
        ValueError: a rank below 1.
    """

    convolutions: ClassVar[bool] = False  # peft builds them by the constructor of the layer's own class

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1; got {self.rank}")

    def config(self, layers: Sequence[str], saved: Sequence[str] = ()) -> PeftConfig:
        settings: dict[str, Any] = shared_settings(layers, saved)
        settings["lora_alpha"] = self.rank if self.alpha is None else self.alpha
        return LoraConfig(r=self.rank, lora_dropout=self.dropout, init_lora_weights=True, **settings)
