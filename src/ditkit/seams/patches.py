"""Which part of a transformer's output belongs to which token.

B batch, C channels, N = F H W tokens, p pixels of the latent along one axis of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ditkit.seams.errors import SeamError


@dataclass(frozen=True)
class Patches:
    """The tokens of a grid in tensors of one form: (B, N, C) tokens, (B, C, h, w) pictures, (B, C, f, h, w)
    or (B, f, C, h, w) clips, with any batch size and any number of channels.

    A token covers whole pixels; the last ones along an axis may reach beyond the border.

    Args:
        grid: (F, H, W) in tokens.
        shape: of such a tensor.
        channels: the axis of the channels in clips, 1 or 2.
        packed: each token of (B, N, C) holds packed x packed pixels, channel by channel.

    Raises:
        SeamError: the shape is not that of such a grid.
    """

    grid: tuple[int, int, int]
    shape: tuple[int, ...]
    channels: int = 1
    packed: int = 1

    def __post_init__(self) -> None:
        if self.tokens_first:
            fits = self.shape[1] == math.prod(self.grid)
        else:
            fits = len(self.shape) in (4, 5) and all(
                0 < n <= size and (n - 1) * -(-size // n) < size
                for n, size in zip(self.grid, self._sizes(self.shape), strict=True)
            )
        if not fits:
            frames, height, width = self.grid
            raise SeamError(
                f"an output of shape {tuple(self.shape)} is not a grid of {frames} x {height} x {width} "
                "tokens"
            )

    @property
    def tokens_first(self) -> bool:
        return len(self.shape) == 3

    @property
    def axis(self) -> int:
        """The axis of the channels."""
        return 2 if self.tokens_first else self._axis(self.shape)

    def matches(self, tensor: Tensor) -> bool:
        """Has the tensor this form?"""
        if tensor.ndim != len(self.shape):
            return False
        return all(tensor.shape[at] == size for at, size in enumerate(self.shape) if at not in (0, self.axis))

    def by_channel(self, tensor: Tensor) -> Tensor:
        """(B, C, ...): the channels of each pixel along axis 1. All of a packed token's numbers count as
        channels when there would be one channel only."""
        if not self.tokens_first:
            return tensor.movedim(self._axis(tuple(tensor.shape)), 1)
        inside = self.packed**2
        if inside > 1 and tensor.shape[2] % inside == 0 and tensor.shape[2] > inside:
            return tensor.unflatten(2, (-1, inside)).movedim(2, 1)  # (B, C, N, p p)
        return tensor.movedim(2, 1)  # (B, C, N)

    def average(self, pixels: Tensor) -> Tensor:
        """The mean (B, N) over each token of a figure for each pixel, in the form of `by_channel` without its
        channels."""
        if self.tokens_first:
            return pixels if pixels.ndim == 2 else pixels.mean(-1)
        sizes = tuple(pixels.shape[1:])
        grid, cells, axes = self.grid[-len(sizes) :], self._cells(sizes), len(sizes)
        beyond = [n * p - size for n, p, size in zip(grid, cells, sizes, strict=True)]
        if any(beyond):
            border = [side for more in reversed(beyond) for side in (0, more)]
            pixels = F.pad(pixels, border, value=math.nan)
        cut = pixels.reshape(-1, *(part for pair in zip(grid, cells, strict=True) for part in pair))
        cut = cut.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2))  # (B, F, H, W, p, p, p)
        for _ in range(axes):
            cut = cut.nanmean(-1) if any(beyond) else cut.mean(-1)
        return cut.flatten(1)

    def spread(self, tokens: Tensor) -> Tensor:
        """A figure for each token (B, N), repeated over its pixels: broadcasts against tensors of this
        form."""
        if self.tokens_first:
            return tokens[..., None]
        sizes = self._sizes(self.shape)[-(len(self.shape) - 2) :]
        grid = self.grid[-len(sizes) :]
        spread = tokens.unflatten(1, grid)
        for axis, p in enumerate(self._cells(sizes), start=1):
            spread = spread.repeat_interleave(p, axis)
        for axis, size in enumerate(sizes, start=1):
            spread = spread.narrow(axis, 0, size)
        return spread.unsqueeze(self._axis(self.shape))

    def _axis(self, shape: tuple[int, ...]) -> int:
        return self.channels if len(shape) == 5 else 1

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(f, h, w) of a picture or clip."""
        places = tuple(size for at, size in enumerate(shape) if at not in (0, self._axis(shape)))
        return places if len(places) == 3 else (1, *places)

    def _cells(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Pixels of a token along each axis."""
        return tuple(-(-size // n) for n, size in zip(self.grid[-len(sizes) :], sizes, strict=True))
