"""What the block executors work on: tiles of the token grid, and the key tiles each query tile reads.

B batch, h heads, L tokens of the joint sequence, N image tokens, T text tokens, d head dim,
n tiles, t tokens in a tile, Q query tiles, K key tiles kept for a query tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditkit.seams.layout import TokenLayout


@dataclass(frozen=True)
class Tiling:
    """A partition of the image tokens into boxes of equal size, as a permutation of the raster order.

    Boxes that stick out of the grid are filled up with slots marked invalid; those repeat the number of a
    token of the box, so that they can be gathered like the others.

    Args:
        grid: (F, H, W) of the tokens.
        tile: (f, h, w) of a box.
        order: (n, t) int64, the raster number of the token in each slot; tiles in raster order, slots too.
        valid: (n, t) bool, False on the filling; None when every box is whole.
        inverse: (N,) int64, the slot n * t of each token.
    """

    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    order: Tensor
    valid: Tensor | None
    inverse: Tensor

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of boxes along frames, height and width."""
        f, h, w = (math.ceil(size / tile) for size, tile in zip(self.grid, self.tile, strict=True))
        return f, h, w

    def split(self, x: Tensor, *, tiles_first: bool = False) -> Tensor:
        """(..., G, N, d) in raster order -> (..., G, n, t, d), or (..., n, G, t, d) with `tiles_first`."""
        n, t = self.order.shape
        if self.valid is not None:
            x = x.index_select(-2, self.order.reshape(-1)).unflatten(-2, (n, t))
            return x.transpose(-4, -3) if tiles_first else x
        # Whole boxes: one strided copy, twice as fast as an index.
        sides = [side for pair in zip(self.counts, self.tile, strict=True) for side in pair]
        x = x.unflatten(-2, sides)  # (..., G, n1, t1, n2, t2, n3, t3, d)
        tiles, group = (-7, -5, -3), (-8,)
        outer = (*tiles, *group) if tiles_first else (*group, *tiles)
        shape = (*x.shape[:-8], n, x.shape[-8]) if tiles_first else (*x.shape[:-7], n)
        return _permute(x, (*outer, -6, -4, -2, -1)).reshape(*shape, t, x.shape[-1])

    def join(self, x: Tensor, *, tiles_first: bool = False) -> Tensor:
        """The inverse of `split`: -> (..., G, N, d) in raster order."""
        if self.valid is not None:
            x = x.transpose(-4, -3) if tiles_first else x
            return x.flatten(-3, -2).index_select(-2, self.inverse)
        groups = x.shape[-3 if tiles_first else -4]
        x = x.unflatten(-2, self.tile).unflatten(-6 if tiles_first else -5, self.counts)
        tiles, group = ((-8, -7, -6), -5) if tiles_first else ((-7, -6, -5), -8)
        order = (group, tiles[0], -4, tiles[1], -3, tiles[2], -2, -1)
        return _permute(x, order).reshape(*x.shape[:-8], groups, len(self.inverse), x.shape[-1])


def _permute(x: Tensor, last: tuple[int, ...]) -> Tensor:
    """Reorder the last dimensions."""
    lead = x.dim() - len(last)
    return x.permute(*range(lead), *(x.dim() + place for place in last))


def sides(text: str) -> tuple[int, int, int]:
    """`"4x8x8"` (frames, height, width) or `"8x16"` (height, width; one frame) as three numbers.

    Raises:
        ValueError: other text.
    """
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"expected sizes like 8x16 or 4x8x8 (frames, height, width in tokens); got {text!r}")
    *frames, height, width = map(int, parts)
    return (frames[0] if frames else 1), height, width


def sides_option(name: str, value: tuple[int, ...] | str | None) -> tuple[int, int, int] | None:
    """An option that takes sizes as numbers or as text, checked.

    Raises:
        ValueError: with the option's name.
    """
    if value is None:
        return None
    try:
        found = sides(value) if isinstance(value, str) else tuple(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in found):
        raise ValueError(f"{name} must be whole numbers of at least 1; got {value!r}")
    if len(found) == 2:
        return 1, found[0], found[1]
    if len(found) != 3:
        raise ValueError(f"{name} must be two or three sizes (frames, height, width); got {value!r}")
    return found[0], found[1], found[2]


def tile_grid(
    grid: tuple[int, int, int], tile: tuple[int, int, int], device: torch.device | str | None = None
) -> Tiling:
    """Cut a token grid into boxes. A tile of (1, 1, t) on a grid of (1, 1, N) gives runs of t tokens.

    Raises:
        ValueError: a tile that is not made of three positive whole numbers.
    """
    if len(tile) != 3 or any(not isinstance(size, int) or size < 1 for size in tile):
        raise ValueError(
            f"tile must be three whole numbers of at least 1 (frames, height, width); got {tile}"
        )
    axes, inside = [], []
    for size, step in zip(grid, tile, strict=True):
        slots = torch.arange(math.ceil(size / step) * step).view(-1, step)  # (boxes, step)
        inside.append(slots < size)
        axes.append(slots.clamp(max=size - 1))
    # every combination of (box, slot) over the three axes -> (n, t)
    order = (axes[0] * (grid[1] * grid[2]))[:, None, None, :, None, None]
    order = order + (axes[1] * grid[2])[None, :, None, None, :, None] + axes[2][None, None, :, None, None, :]
    good = inside[0][:, None, None, :, None, None] & inside[1][None, :, None, None, :, None]
    good = good & inside[2][None, None, :, None, None, :]
    t = math.prod(tile)
    order, good = order.reshape(-1, t), good.expand(*order.shape).reshape(-1, t)
    inverse = torch.empty(math.prod(grid), dtype=torch.long)
    inverse[order[good]] = torch.arange(order.numel()).view_as(order)[good]
    whole = bool(good.all())
    return Tiling(grid, tile, order.to(device), None if whole else good.to(device), inverse.to(device))


Which = Tensor | slice  # some of the lists: their numbers, or a run of them


def take(x: Tensor, which: Which) -> Tensor:
    """Some rows; a run of them is not copied."""
    return x[which] if isinstance(which, slice) else x.index_select(0, which)


@dataclass(frozen=True)
class Rows:
    """Lists of equal length, run together.

    Args:
        which: their numbers in the flattened lists.
        length: how many tiles each has.
        every: they are all the lists there are.
    """

    which: Tensor
    length: int
    every: bool = False

    def chunks(self, size: int) -> list[Which]:
        """Them in parts of at most `size`."""
        total = len(self.which)
        if self.every:
            return [slice(start, min(start + size, total)) for start in range(0, total, size)]
        return list(self.which.split(size))


@dataclass(frozen=True)
class BlockLists:
    """Which key tiles each query tile reads.

    Text is not in the lists: every image query reads every text key, and text queries read everything.

    Args:
        index: (B or 1, h or 1, Q, K) int64 tile numbers; (h or 1, Q, K) and (Q, K) are taken too.
        count: (B or 1, h or 1, Q) how many of the K are used (the first ones); None when all are. Known
            before the call for a static mask; a list that depends on the data costs one synchronisation a
            call.
    """

    index: Tensor
    count: Tensor | None = None
    rows: tuple[Rows, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        index, count = self.index, self.count
        if not 2 <= index.dim() <= 4:
            raise ValueError(
                f"index must be (B, h, Q, K), (h, Q, K) or (Q, K); got shape {tuple(index.shape)}"
            )
        index = index[(None,) * (4 - index.dim())]
        if count is not None:
            count = count[(None,) * (3 - count.dim())]
            if count.shape != index.shape[:3]:
                raise ValueError(
                    f"count has shape {tuple(count.shape)}, index {tuple(index.shape)}: not of a kind"
                )
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "rows", _group(index, count))

    def allowed(self, tiles: int) -> Tensor:
        """(B or 1, h or 1, Q, tiles) bool: the same as a map of tile pairs."""
        kept = torch.ones_like(self.index, dtype=torch.bool)
        if self.count is not None:
            kept = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        hits = torch.zeros(*self.index.shape[:3], tiles, dtype=torch.int32, device=self.index.device)
        return hits.scatter_add_(-1, self.index, kept.int()) > 0

    @classmethod
    def from_map(cls, allowed: Tensor) -> BlockLists:
        """Lists from a bool map (..., Q, tiles), in ascending order of the tiles."""
        count = allowed.sum(-1)
        longest = max(int(count.max()), 1)
        index = allowed.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :longest]
        same = bool((count == longest).all())
        return cls(index, None if same else count)


def _group(index: Tensor, count: Tensor | None) -> tuple[Rows, ...]:
    total = math.prod(index.shape[:3])
    every = torch.arange(total, device=index.device)
    if count is None:
        return (Rows(every, index.shape[-1], every=True),)
    flat = count.reshape(-1)
    lengths = sorted(set(flat.tolist()))
    return tuple(Rows(every[flat == length], length) for length in lengths)


def density(lists: BlockLists, tiling: Tiling, layout: TokenLayout) -> float:
    """Share of the L x L pairs that are read: tiles, and text rows and columns in full."""
    n, t = tiling.order.shape
    if tiling.valid is None:
        kept = lists.index.shape[-1] if lists.count is None else lists.count.double().mean().item()
        pairs = n * t * t * kept
    else:
        sizes = tiling.valid.sum(-1).double().cpu()
        pairs = torch.einsum("bhqk,q,k->bh", lists.allowed(n).double().cpu(), sizes, sizes).mean().item()
    image, text = layout.image_length, layout.joint_text_length
    return (pairs + image * text + text * layout.length) / layout.length**2


def dense_mask(lists: BlockLists, tiling: Tiling, layout: TokenLayout) -> Tensor:
    """(B or 1, h or 1, L, L) bool: the lists as a full mask in the order of the sequence (the reference)."""
    n, t = tiling.order.shape
    tile_of = tiling.inverse // t  # (N,)
    image = lists.allowed(n)[:, :, tile_of][:, :, :, tile_of]  # (B, h, N, N)
    span = layout.image_span
    mask = torch.ones(*image.shape[:2], layout.length, layout.length, dtype=torch.bool, device=image.device)
    mask[:, :, span, span] = image
    return mask
