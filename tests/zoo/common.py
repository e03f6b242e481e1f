"""What several families need to make their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TEXT = 5


def packed(batch: int, size: int, channels: int = 4, axes: int = 3) -> dict[str, Tensor]:
    """FLUX' packed picture: tokens (B, L, C) with the positions of picture and text."""
    height, width = ((4, 4), (6, 4))[size]
    ids = torch.zeros(height, width, axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return {
        "hidden_states": torch.randn(batch, height * width, channels),
        "img_ids": ids.reshape(-1, axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }


def picture(batch: int, size: int, channels: int = 4) -> Tensor:
    """(B, C, H, W): 4 x 4 or 6 x 4 tokens of 2 x 2."""
    height, width = ((8, 8), (12, 8))[size]
    return torch.randn(batch, channels, height, width)


def clip(batch: int, size: int, channels: int = 4, frames: tuple[int, int] = (2, 3)) -> Tensor:
    """(B, C, F, H, W): 4 x 2 or 2 x 4 tokens of 2 x 2 in each frame."""
    height, width = ((8, 4), (4, 8))[size]
    return torch.randn(batch, channels, frames[size], height, width)


def text(batch: int, channels: int = 24, length: int = TEXT) -> Tensor:
    return torch.randn(batch, length, channels)


def mask(batch: int, length: int = TEXT, valid: int | None = None, **options: Any) -> Tensor:
    """(B, T): the first prompt has `valid` tokens, the others all."""
    ones = torch.ones(batch, length, **options)
    if valid is not None:
        ones[0, valid:] = 0
    return ones


def angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Rotary (cos, sin), each (tokens, 2 pairs), by position only."""
    turns = (torch.arange(tokens)[:, None] * 0.9 ** torch.arange(pairs)).repeat_interleave(2, dim=1)
    return turns.cos(), turns.sin()
