"""A grid of tokens cut into windows, and windows shifted over the grid's edge (Swin, arXiv 2103.14030).

Dimensions: B batch, f x h x w grid of tokens, P windows of n tokens, D width. A picture's grid is 1 x h x w.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def to_windows(tokens: Tensor, window: Grid) -> Tensor:
    """A grid of tokens (B, f, h, w, D) to windows (B, P, n, D), both row-major over (f, h, w)."""
    batch, frames, height, width, channels = tokens.shape
    a, b, c = window
    split = tokens.reshape(batch, frames // a, a, height // b, b, width // c, c, channels)
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, -1, a * b * c, channels)


def from_windows(windows: Tensor, window: Grid, grid: Grid) -> Tensor:
    """The inverse of `to_windows`: (B, P, n, D) to (B, f, h, w, D)."""
    (a, b, c), (frames, height, width) = window, grid
    batch, channels = windows.shape[0], windows.shape[-1]
    split = windows.reshape(batch, frames // a, height // b, width // c, a, b, c, channels)
    return split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, frames, height, width, channels)


@functools.lru_cache(maxsize=16)
def shift_mask(grid: Grid, window: Grid, shift: Grid) -> Tensor:
    """Which tokens of a window were no neighbours before the grid was rolled back by `shift`: -1, else 0.

    Float32 on the CPU, (P, n, n).
    """
    regions = torch.zeros(grid, device="cpu")
    for axis, (size, side, by) in enumerate(zip(grid, window, shift, strict=True)):
        place = torch.arange(size, device="cpu")
        # Up to three regions: untouched, the last window's own, and what the roll brought round.
        region = (place >= size - side).long() + (place >= size - by).long() if by else place * 0
        regions = regions * 3 + region.reshape([-1 if other == axis else 1 for other in range(3)])
    ids = to_windows(regions[None, ..., None], window)[0, :, :, 0]  # (P, n)
    return -(ids[:, :, None] != ids[:, None, :]).float()
