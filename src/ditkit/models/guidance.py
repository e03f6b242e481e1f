"""Classifier-free guidance, Ho and Salimans, arXiv 2207.12598.

Which channels are guided differs: the authors of DiT and SiT, and the repositories that follow them, guide
the first three of four latent channels (an oversight: scale 1.5 there resembles 1.375 on all four, see
facebookresearch/DiT pull request 12); diffusers guides all of them. It is a parameter here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GuidedChannels = int | Literal["all"]


def guide(conditional: Tensor, unconditional: Tensor, scale: float, channels: int) -> tuple[Tensor, Tensor]:
    """Both predictions with their first `channels` channels replaced by the guided ones.

    Args:
        conditional: prediction with the condition, (B, C, ...).
        unconditional: prediction without, of the same shape.
        scale: 1 is no guidance, 0 the unconditional prediction.
        channels: how many leading channels are guided; the others keep each prediction's own values.
    """
    guided = unconditional[:, :channels] + scale * (conditional - unconditional)[:, :channels]
    return (
        torch.cat([guided, conditional[:, channels:]], dim=1),
        torch.cat([guided, unconditional[:, channels:]], dim=1),
    )


def guided_channels(channels: GuidedChannels, prediction_channels: int) -> int:
    """The number of leading channels that `channels` stands for.

    Args:
        channels: a number, or "all": every channel of the prediction proper, not those of a learned variance.
        prediction_channels: the channels of the prediction proper, C.

    Raises:
        ValueError: if it is neither "all" nor in 1..C.
    """
    if channels == "all":
        return prediction_channels
    if isinstance(channels, int) and not isinstance(channels, bool) and 1 <= channels <= prediction_channels:
        return channels
    raise ValueError(
        f"channels={channels!r} can't be guided: give 'all' or a number from 1 to {prediction_channels}"
    )
