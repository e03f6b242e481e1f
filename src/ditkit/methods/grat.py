"""GRAT: tokens are grouped into boxes, and all queries of a box read the same boxes of keys (Ren, Yu, He,
Yuille, Chen: "Grouping First, Attending Smartly", arXiv 2505.14687). No training, every step, every layer.

The image tokens of a T x H x W grid fall into groups of g_t x g_h x g_w. GRAT-B (`pattern="block"`) reads
the groups at most `radius` away on every axis; GRAT-X (`"cross"`) those in the same group row or column and,
on video, in the same plane of groups: same frames, same rows or same columns. Text is read by all and reads
all; padded text is read by none.

Beyond the paper: the authors released GRAT-X on video only, so GRAT-B and pictures follow the text, with
windows cut at the borders; grids that a group does not divide are filled with keys that are masked; each
sample of a batch masks its own padded text, where the authors take one length, of another tokenizer, for all.
Whether the paper's criss-cross on video means lines is open; `cross="lines"` reads them.

B batch, h heads, L tokens of the sequence, N image tokens, n groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.registry import Choice, Paper, Search, register
from ditkit.seams import executors
from ditkit.seams.attention import AttentionCall
from ditkit.seams.layout import TokenLayout

if TYPE_CHECKING:
    from ditkit.seams.apply import Host

Grid = tuple[int, int, int]

# Groups of the paper: 16 x 16 on FLUX, 4 x 8 x 8 on HunyuanVideo.
_PICTURE: Grid = (1, 16, 16)
_VIDEO: Grid = (4, 8, 8)


@register(
    "method",
    "grat",
    summary="boxes of tokens share the boxes of keys they read: their neighbours, or their row and column",
    paper=Paper(
        "Grouping First, Attending Smartly: Training-Free Acceleration for Diffusion Transformers",
        "2505.14687",
        2025,
    ),
    seam=("attention",),
    needs=("a token grid",),
    neutral={"pattern": "block", "radius": 1_000_000},
)
@dataclass(frozen=True)
class GRAT:
    """Group attention.

    Args:
        pattern: `"cross"`: GRAT-X, which sees far along rows and columns; `"block"`: GRAT-B, the cheaper one.
        group: (frames, height, width) of a group in tokens, or text such as `"4x8x8"` or `"16x16"`; None:
            16 x 16 on pictures, 4 x 8 x 8 on video.
        radius: of GRAT-B in groups, >= 0.
        cross: on video, `"planes"` of groups through a group (the authors' code) or `"lines"`. On pictures
            they are the same.
        executor: how to run it; `"auto"` takes masked dense attention below about a thousand tokens or where
            most pairs are read, otherwise gathered blocks.

    Raises:
        ValueError: an option out of its range.
    """

    claims: ClassVar[frozenset[str]] = frozenset({"attention"})
    search: ClassVar[Search] = {
        "pattern": Choice(("cross", "block")),
        "group": Choice((None, "8x8")),
        "radius": Choice((1, 2), when={"pattern": ("block",)}),
    }

    pattern: Literal["cross", "block"] = "cross"
    group: Grid | str | None = None
    radius: int = 1
    cross: Literal["planes", "lines"] = "planes"
    executor: executors.Executor = "auto"

    def __post_init__(self) -> None:
        if self.pattern not in ("cross", "block"):
            raise ValueError(f"pattern must be cross or block; got {self.pattern!r}")
        if self.cross not in ("planes", "lines"):
            raise ValueError(f"cross must be planes or lines; got {self.cross!r}")
        if isinstance(self.radius, bool) or not isinstance(self.radius, int) or self.radius < 0:
            raise ValueError(f"radius must be a whole number of at least 0 (groups); got {self.radius!r}")
        if self.executor not in ("auto", "dense", "gather", "flex"):
            raise ValueError(f"executor must be auto, dense, gather or flex; got {self.executor!r}")
        object.__setattr__(self, "group", executors.sides_option("group", self.group))

    def group_of(self, grid: Grid) -> Grid:
        """The size of a group on a grid."""
        if self.group is None:
            return _PICTURE if grid[0] == 1 else _VIDEO
        assert not isinstance(self.group, str)
        return self.group

    # What it costs, without a model.

    def density(
        self,
        grid: Grid,
        text_length: int = 0,
        *,
        clip: bool = True,
        queries: Literal["all", "image"] = "all",
    ) -> float:
        """Share of the query-key pairs that are read.

        Args:
            grid: (F, H, W) in tokens.
            text_length: text tokens in the joint sequence; 0 for models with cross-attention.
            clip: count GRAT-B's groups as the borders cut them, as it runs; False: (2 radius + 1)^axes groups
                for every query, as the paper counts.
            queries: whose pairs: of `"all"` L queries, or of the `"image"` queries only, as the paper counts.
        """
        image = math.prod(grid)
        pairs = self._image_pairs(grid, clip) + image * text_length
        if queries == "image":
            return pairs / (image * (image + text_length))
        return (pairs + text_length * (image + text_length)) / (image + text_length) ** 2

    def flops(self, grid: Grid, text_length: int, heads: int, head_dim: int) -> int:
        """FLOPs of one layer's attention: 4 for each pair that is read, head and channel."""
        pairs = round(self.density(grid, text_length) * (math.prod(grid) + text_length) ** 2)
        return 4 * pairs * heads * head_dim

    def _image_pairs(self, grid: Grid, clip: bool) -> int:
        sizes = [_cut(size, step) for size, step in zip(grid, self.group_of(grid), strict=True)]
        if self.pattern == "block":
            if not clip:
                keys = [
                    step * min(2 * self.radius + 1, len(parts))
                    for step, parts in zip(self.group_of(grid), sizes, strict=True)
                ]
                return math.prod(grid) * min(math.prod(keys), math.prod(grid))
            return math.prod(_within(parts, self.radius) for parts in sizes)
        if grid[0] == 1:
            sizes = sizes[1:]
        same = [_within(parts, 0) for parts in sizes]  # pairs in equal places along an axis
        other = [sum(parts) ** 2 - equal for parts, equal in zip(sizes, same, strict=True)]
        if self.cross == "planes" or len(sizes) == 2:
            return math.prod(grid) ** 2 - math.prod(other)
        lines = sum(math.prod(same) // same[axis] * other[axis] for axis in range(3))
        return lines + math.prod(same)

    # On a model.

    def static_mask(self, layout: TokenLayout, device: torch.device) -> executors.BlockPlan:
        """The mask on a layout, ready to run."""
        tiling = executors.tile_grid(layout.grid, self.group_of(layout.grid), device)
        return executors.BlockPlan(
            executors.BlockLists.from_map(self.allowed(tiling)), tiling, layout, self.executor
        )

    def allowed(self, tiling: executors.Tiling) -> Tensor:
        """Which groups read which, (n, n) bool."""
        places = torch.stack(
            torch.meshgrid(*(torch.arange(count) for count in tiling.counts), indexing="ij"), dim=-1
        ).flatten(0, 2)  # (n, 3)
        apart = (places[:, None] - places).abs().to(tiling.order.device)  # (n, n, 3)
        if self.pattern == "block":
            return (apart <= self.radius).all(-1)
        same = apart == 0
        if tiling.grid[0] == 1:
            return same[..., 1:].any(-1)
        return same.any(-1) if self.cross == "planes" else same.sum(-1) >= 2

    def strategy(self) -> _Groups:
        """What acts at the seam."""
        return _Groups(self)

    def attach(self, host: Host) -> None:
        strategy = self.strategy()
        host.attention.use(strategy)
        host.note(strategy.notes)


def _cut(size: int, step: int) -> list[int]:
    """Sizes of the groups along an axis."""
    return [min(step, size - start) for start in range(0, size, step)]


def _within(parts: list[int], reach: int) -> int:
    """Pairs of tokens of an axis whose groups are at most `reach` apart."""
    if reach >= len(parts) - 1:
        return sum(parts) ** 2
    return sum(
        part * sum(parts[max(0, place - reach) : place + reach + 1]) for place, part in enumerate(parts)
    )


class _Groups:
    """The strategy: `GRAT`'s options at work on one model."""

    def __init__(self, options: GRAT) -> None:
        self.options = options
        self._notes: dict[str, None] = {}

    def __repr__(self) -> str:
        return repr(self.options)

    def notes(self) -> list[str]:
        return list(self._notes)

    def plan(self, layout: TokenLayout, heads: int, device: torch.device) -> _Plan:
        """Groups and lists of this layout."""
        blocks = self.options.static_mask(layout, device)
        plan = _Plan(blocks, everything=blocks.share >= 1)
        choice = blocks.prepare(device)
        what = f"GRAT-{'B' if self.options.pattern == 'block' else 'X'}"
        self._notes[executors.in_words(what, layout, blocks.share, choice)] = None
        return plan

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall,
        plan: _Plan,
    ) -> Tensor:
        """Attention of one module, (B, h, L, d) -> (B, h, L, d)."""
        call.attended(plan.blocks.share)
        if plan.everything:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return plan.blocks.attend(q, k, v, mask, scale)


@dataclass(frozen=True)
class _Plan:
    """What a layout needs: the blocks, and whether they are all there are."""

    blocks: executors.BlockPlan
    everything: bool
