"""Sparse attention with a mask for single tokens: tiles of queries, each with gathered keys and their mask.

B batch, h heads, L tokens of the joint sequence, N image tokens, T text tokens, E further keys, d head dim,
n query tiles, t tokens in a tile, K keys gathered for a tile, M masks, R tiles run at once, G = B h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditkit.seams.executors.blocks import Tiling, tile_grid
from ditkit.seams.executors.gather import (
    CHUNK_BYTES,
    Kernel,
    plain,
    with_lse,
    with_text_lse,
    with_text_queries,
)
from ditkit.seams.layout import TokenLayout


@dataclass(frozen=True)
class Windows:
    """Query tiles, each with K keys of its own and an element mask on them; masks that are equal are kept
    once.

    Args:
        tiling: of the queries.
        keys: (n, K) int64 raster numbers of the image keys that a tile gathers.
        kind: (n,) int64, which of the masks a tile has.
        masks: (M, t, K) bool, True where a query of the tile may read the key.
    """

    tiling: Tiling
    keys: Tensor
    kind: Tensor
    masks: Tensor
    groups: tuple[Tensor, ...] = field(init=False, repr=False)
    back: Tensor = field(init=False, repr=False)
    _biases: dict[tuple[int, torch.dtype], Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        every = torch.arange(self.kind.shape[0], device=self.kind.device)
        groups = tuple(every[self.kind == kind] for kind in range(self.masks.shape[0]))
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "back", torch.cat(groups).argsort())

    def bias(self, always: int, dtype: torch.dtype) -> Tensor:
        """(M, t, K + always): the masks as something to add, and keys that every query reads."""
        if (always, dtype) in self._biases:
            return self._biases[always, dtype]
        bias = torch.zeros(self.masks.shape, dtype=dtype, device=self.masks.device)
        bias = bias.masked_fill(~self.masks, float("-inf"))
        bias = torch.cat([bias, bias.new_zeros(*bias.shape[:2], always)], dim=-1)
        if not torch.compiler.is_compiling():
            self._biases[always, dtype] = bias
        return bias


def neighbourhoods(
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    reach: tuple[int, int, int],
    near: Callable[[Tensor, Tensor, Tensor], Tensor],
    device: torch.device | str | None = None,
) -> Windows:
    """Windows of one shape around every token, cut at the borders of the grid.

    Each query tile gathers one box of keys that holds the windows of all its queries; at a border the box is
    moved inside the grid, so that all boxes are of one size.

    Args:
        grid: (F, H, W) of the tokens.
        tile: of the queries.
        reach: how far a window goes along each axis, at most.
        near: may a query read a key at this distance (frames, rows, columns)?
    """
    tiling = tile_grid(grid, tile)
    box = [min(size, step + 2 * far) for size, step, far in zip(grid, tile, reach, strict=True)]
    start = [
        (first - far).clamp(0, size - length)  # (n,) each
        for first, far, size, length in zip(places(grid, tiling.order[:, 0]), reach, grid, box, strict=True)
    ]
    axes = torch.meshgrid(*(torch.arange(length) for length in box), indexing="ij")
    inside = torch.stack(axes).flatten(1)  # (3, K)
    f, y, x = (at[:, None] + offset for at, offset in zip(start, inside, strict=True))
    keys = (f * grid[1] + y) * grid[2] + x  # (n, K)
    # Tiles that lie the same way in their boxes have equal masks.
    queries = torch.stack(places(grid, tiling.order)) - torch.stack(start)[..., None]  # (3, n, t)
    distinct, kind = torch.unique(queries.movedim(0, 1).flatten(1), dim=0, return_inverse=True)
    distance = distinct.view(len(distinct), 3, -1, 1) - inside[:, None]  # (M, 3, t, K)
    masks = near(*distance.unbind(1))
    return Windows(tile_grid(grid, tile, device), keys.to(device), kind.to(device), masks.to(device))


def places(grid: tuple[int, int, int], tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Raster numbers -> frame, row, column."""
    _, height, width = grid
    return tokens // (height * width), tokens // width % height, tokens % width


def gather_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    layout: TokenLayout,
    *,
    extra: tuple[Tensor, Tensor] | None = None,
    keys: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention where image queries read the keys of their tile that its mask allows, all text, and `extra`.

    Args:
        q, k, v: (B, h, L, d) in the order of `layout`.
        extra: keys and values (B, h, E, d) that image queries read and text queries do not.
        keys: (B or 1, L), bool (True: may be read) or additive: the validity of single keys, e.g. padded
            text.

    Returns:
        (B, h, L, d).
    """
    (out,) = _gather((q, k, v), windows, layout, extra, keys, scale, plain)
    return with_text_queries(out, q, k, v, layout, keys, scale)


def gather_windows_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    layout: TokenLayout,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`gather_windows` and the log of each query's softmax denominator, (B, h, L) in float32."""
    out, lse = _gather((q, k, v), windows, layout, None, keys, scale, with_lse)
    return with_text_lse(out, lse, q, k, v, layout, keys, scale)


def _gather(
    qkv: tuple[Tensor, Tensor, Tensor],
    windows: Windows,
    layout: TokenLayout,
    extra: tuple[Tensor, Tensor] | None,
    keys: Tensor | None,
    scale: float | None,
    kernel: Kernel,
) -> list[Tensor]:
    """What the kernel gives for the image queries, each (B, h, N, .)."""
    q, k, v = qkv
    B, h, _, d = q.shape
    K = windows.keys.shape[1]
    always = [x[:, :, layout.text_span] for x in (k, v)]  # (B, h, T, d)
    if extra is not None:
        always = [torch.cat([x, more], dim=2) for x, more in zip(always, extra, strict=True)]
    T = always[0].shape[2]
    qt = windows.tiling.split(q[:, :, layout.image_span].flatten(0, 1), tiles_first=True)  # (n, G, t, d)
    # Image keys, then those that every query reads: one index picks both.
    tables = [
        torch.cat([x[:, :, layout.image_span], y], dim=2).flatten(0, 1)  # (G, N + T, d)
        for x, y in zip((k, v), always, strict=True)
    ]
    ends = torch.arange(layout.image_length, layout.image_length + T, device=q.device)
    index = torch.cat([windows.keys, ends.expand(len(windows.keys), -1)], dim=1)  # (n, K + T)
    bias = windows.bias(T, q.dtype)
    rows = None if keys is None else _rows(keys, layout, T, q.dtype)
    step = max(1, CHUNK_BYTES // (B * h * (K + T) * d * 2 * q.element_size()))
    parts = []
    for kind, group in enumerate(windows.groups):
        for tiles in group.split(step):
            which = index.index_select(0, tiles)  # (R, K + T)
            mask = bias[kind : kind + 1, None]  # (1, 1, t, K + T)
            if rows is not None:
                mask = mask + _spread(rows, which, h)  # (R, G or 1, t, K + T)
            here = qt.index_select(0, tiles)
            k_here, v_here = (
                x.index_select(1, which.reshape(-1)).unflatten(1, which.shape).transpose(0, 1) for x in tables
            )
            parts.append(kernel(here, k_here, v_here, mask, scale))
    found = []
    for part in zip(*parts, strict=True):
        out = torch.cat(part).index_select(0, windows.back)  # (n, G, t, .)
        found.append(windows.tiling.join(out, tiles_first=True).unflatten(0, (B, h)))
    return found


def _rows(keys: Tensor, layout: TokenLayout, always: int, dtype: torch.dtype) -> Tensor:
    """The validity of image keys and always-visible keys as something to add, (B or 1, N + T)."""
    if keys.dtype == torch.bool:
        keys = torch.zeros(keys.shape, dtype=dtype, device=keys.device).masked_fill(~keys, float("-inf"))
    image, text = keys[:, layout.image_span], keys[:, layout.text_span]
    return torch.cat([image, text, text.new_zeros(len(text), always - text.shape[1])], dim=1)


def _spread(rows: Tensor, which: Tensor, heads: int) -> Tensor:
    """(R, B h or 1, 1, K + T) for the tiles whose keys are `which` (R, K + T)."""
    rows = rows.index_select(1, which.reshape(-1)).unflatten(1, which.shape).transpose(0, 1)
    return (rows.repeat_interleave(heads, dim=1) if rows.shape[1] > 1 else rows)[:, :, None]
