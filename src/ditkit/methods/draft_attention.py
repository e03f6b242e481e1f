"""DraftAttention: an attention map of pooled tokens decides, for each head and call, which pairs of tiles are
computed (Shen, Han et al.: "DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance",
arXiv 2505.14708).

Queries and keys of the image tokens, after rotary embedding, are averaged over tiles of p_h x p_w tokens
inside frames; the softmax of their scores is the draft map, S x S for each head. Over the whole map of a
head, not row by row, the int((1 - r) n) smallest of its n = S^2 entries set a threshold, r being the share to
keep; the pairs of tiles at or above it are computed, and all pairs with text. The first layers and steps stay
dense.

Beyond the paper: any grid (a tile that sticks out is averaged and read without its filling), text as a prefix
or absent, padded text masked for each sample, and a map for each sample of a batch (the authors' guidance
variant has one for each half). A threshold over the whole map can leave a tile of queries without keys, which
the authors' kernel answers with zeros or NaN, and which gets zeros here; with `empty_rows="best"` it reads
the tile it scores best and itself (no nearer to dense in benchmarks/methods/sparse_attention.py, so not the
default).

B batch, h heads, L tokens of the sequence, N image tokens, S tiles, d head dim.
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
from ditkit.seams.steps import Step

if TYPE_CHECKING:
    from ditkit.seams.apply import Host

Grid = tuple[int, int, int]

# The authors keep the first two double blocks of HunyuanVideo dense, and the first block of Wan.
_DENSE_BLOCKS = {"HunyuanVideoTransformer3DModel": 2}


@register(
    "method",
    "draft-attention",
    summary="an attention map of pooled tokens picks the tiles that each head computes, anew at each call",
    paper=Paper(
        "DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance", "2505.14708", 2025
    ),
    seam=("attention",),
    needs=("a token grid",),
    neutral={"sparsity": 0.0},
)
@dataclass(frozen=True)
class DraftAttention:
    """Block-sparse attention guided by a draft.

    Args:
        sparsity: share of the tile pairs to drop, 0..1; 0 is dense attention. The authors run 0.9 on
            HunyuanVideo and 0.75 on Wan.
        pool: (frames, height, width) of a tile in tokens, or text such as `"8x16"` (authors); they pool
            inside frames.
        dense_blocks: so many attention modules at the start stay dense; None: 2 on HunyuanVideo, else 1.
        dense_steps: share of the denoising steps at the start that stay dense, rounded down. The paper keeps
            the first 25 %. Without a schedule, the timesteps above 1 - this of full noise.
        dense_until: instead of `dense_steps`, steps stay dense until the timestep (of 1000) has fallen to
            this; the authors' code has 945 on HunyuanVideo and 925 on Wan.
        empty_rows: what a tile of queries reads that the threshold leaves no tile of keys: `"authors"`:
            nothing but text; `"best"`: the one it scores best, and itself.
        pooling: `"mean"`, or `"max"` as in the paper's ablation.
        executor: how to run it; `"auto"` takes masked dense attention below about a thousand tokens or where
            most pairs are read, otherwise gathered blocks.

    Raises:
        ValueError: an option out of its range.
    """

    claims: ClassVar[frozenset[str]] = frozenset({"attention"})
    search: ClassVar[Search] = {
        "sparsity": Choice((0.5, 0.75, 0.9)),
        "pool": Choice(("8x16", "8x8")),
        "dense_steps": Choice((0.25, 0.1, 0.0)),
        "dense_blocks": Choice((1, 0)),
    }

    sparsity: float = 0.75
    pool: Grid | str = (1, 8, 16)
    dense_blocks: int | None = None
    dense_steps: float = 0.25
    dense_until: float | None = None
    empty_rows: Literal["authors", "best"] = "authors"
    pooling: Literal["mean", "max"] = "mean"
    executor: executors.Executor = "auto"

    def __post_init__(self) -> None:
        for name in ("sparsity", "dense_steps"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share of 0 to 1; got {getattr(self, name)!r}")
        layers = self.dense_blocks
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 0):
            raise ValueError(f"dense_blocks must be a whole number of at least 0 or None; got {layers!r}")
        choices = {
            "empty_rows": ("authors", "best"),
            "pooling": ("mean", "max"),
            "executor": ("auto", "dense", "gather", "flex"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        pool = executors.sides_option("pool", self.pool)
        if pool is None:
            raise ValueError("pool must be sizes such as 8x16; got None")
        object.__setattr__(self, "pool", pool)

    # What it costs, without a model.

    def draft_tokens(self, grid: Grid) -> int:
        """S: tiles of a grid (F, H, W)."""
        assert not isinstance(self.pool, str)
        return math.prod(math.ceil(size / step) for size, step in zip(grid, self.pool, strict=True))

    def dropped(self, entries: int) -> int:
        """How many entries of a map set the threshold: the smallest ones, of which the largest stays."""
        kept = 1.0 - self.sparsity  # first, and in this precision: it decides how the product is cut
        return int((1.0 - kept) * entries)

    def kept(self, grid: Grid) -> int:
        """Tile pairs of a head that are computed when no two entries of its map are equal and no row is
        empty."""
        entries = self.draft_tokens(grid) ** 2
        dropped = self.dropped(entries)
        if dropped == 0:
            return entries
        return 0 if dropped >= entries else entries - dropped + 1

    def density(self, grid: Grid, text_length: int = 0) -> float:
        """Share of the query-key pairs that a sparse layer reads, for text in the joint sequence; exact where
        the tiles divide the grid and no row is empty."""
        image = math.prod(grid)
        pairs = self.kept(grid) / self.draft_tokens(grid) ** 2 * image**2
        length = image + text_length
        return (pairs + image * text_length + text_length * length) / length**2

    def flops(self, grid: Grid, text_length: int, heads: int, head_dim: int) -> int:
        """FLOPs of a sparse layer's attention: 4 for each pair that is read, head and channel, and 2 for each
        of the draft map."""
        pairs = self.density(grid, text_length) * (math.prod(grid) + text_length) ** 2
        return round(4 * pairs * heads * head_dim) + 2 * self.draft_tokens(grid) ** 2 * heads * head_dim

    def is_dense(self, step: Step) -> bool:
        """Does this step stay dense as a whole?"""
        # Some transformers take timesteps divided by 1000.
        timestep = step.timestep * 1000 if step.timestep <= 1 else step.timestep
        if self.dense_until is not None:
            return timestep > self.dense_until
        if step.num_steps is None:
            return timestep > 1000 * (1 - self.dense_steps)
        return step.index < int(self.dense_steps * step.num_steps)

    # On a model.

    def draft_map(self, q: Tensor, k: Tensor, tiling: executors.Tiling, scale: float | None = None) -> Tensor:
        """The softmax of pooled scores: image queries and keys (B, h, N, d) -> (B, h, S, S)."""
        if self.pooling == "mean":
            return executors.pooled_scores(q, k, tiling, scale).softmax(-1)
        tops = [_largest(x, tiling) for x in (q, k)]
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        return (tops[0] @ tops[1].transpose(-1, -2) * scale).softmax(-1)

    def select(self, draft: Tensor) -> Tensor:
        """The tile pairs to compute: a draft map (B, h, S, S) -> bool of that shape."""
        entries = draft.flatten(-2)
        dropped = self.dropped(entries.shape[-1])
        if dropped == 0:
            return torch.ones_like(draft, dtype=torch.bool)
        if dropped >= entries.shape[-1]:
            allowed = torch.zeros_like(draft, dtype=torch.bool)
        else:
            threshold = entries.kthvalue(dropped, dim=-1).values
            allowed = draft >= threshold[..., None, None]
        if self.empty_rows == "authors":
            return allowed
        best = F.one_hot(draft.argmax(-1), draft.shape[-1]).bool()
        itself = torch.eye(draft.shape[-1], dtype=torch.bool, device=draft.device)
        return allowed | (~allowed.any(-1, keepdim=True) & (best | itself))

    def strategy(self, dense_blocks: int = 0) -> _Draft:
        """What acts at the seam."""
        return _Draft(self, dense_blocks if self.dense_blocks is None else self.dense_blocks)

    def attach(self, host: Host) -> None:
        strategy = self.strategy(_DENSE_BLOCKS.get(host.anatomy.name, 1))
        host.attention.use(strategy)
        # A dense step is another amount of work than a sparse one.
        host.stats.modes.append(lambda: strategy.dense)
        host.note(strategy.notes)


def _largest(x: Tensor, tiling: executors.Tiling) -> Tensor:
    """The largest value of each channel in each tile: (..., N, d) -> (..., n, d)."""
    return tiling.split(x).amax(-2)  # what fills a tile repeats its tokens


@dataclass(frozen=True)
class _Plan:
    """What a layout needs: its tiles."""

    layout: TokenLayout
    tiling: executors.Tiling


class _Draft:
    """The strategy: `DraftAttention`'s options at work on one model.

    Args:
        dense: does the step that runs stay dense?
    """

    def __init__(self, options: DraftAttention, dense_blocks: int) -> None:
        self.options = options
        self.dense_blocks = dense_blocks
        self.dense = False
        self._notes: dict[str, None] = {}

    def __repr__(self) -> str:
        return repr(self.options)

    def notes(self) -> list[str]:
        return list(self._notes)

    def begin(self, step: Step) -> None:
        self.dense = self.options.is_dense(step)

    def plan(self, layout: TokenLayout, heads: int, device: torch.device) -> _Plan:
        """Tiles of this layout."""
        options = self.options
        assert not isinstance(options.pool, str)
        plan = _Plan(layout, executors.tile_grid(layout.grid, options.pool, device))
        share = options.density(layout.grid, layout.joint_text_length)
        whole = plan.tiling.valid is None
        choice = executors.choose(layout.length, share, device=device, whole=whole)
        if options.executor != "auto":
            choice = executors.Choice(options.executor, "as asked for")
        self._notes[executors.in_words("DraftAttention", layout, share, choice)] = None
        return plan

    def blocks(self, q: Tensor, k: Tensor, scale: float | None, plan: _Plan) -> Tensor:
        """The tile pairs to compute, (B, h, S, S) bool, for queries and keys (B, h, L, d)."""
        image = plan.layout.image_span
        with torch.no_grad():  # a choice has no gradient
            return self.options.select(
                self.options.draft_map(q[:, :, image], k[:, :, image], plan.tiling, scale)
            )

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
        if self.dense or call.layer < self.dense_blocks or self.options.sparsity == 0:
            call.attended(1.0)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        allowed = self.blocks(q, k, scale, plan)
        if torch.compiler.is_compiling():
            return executors.attend_map(
                q, k, v, allowed, mask, scale, plan.layout, plan.tiling.tile, self.options.executor
            )
        blocks = executors.BlockPlan(
            executors.BlockLists.from_map(allowed), plan.tiling, plan.layout, self.options.executor
        )
        call.attended(blocks.share)
        return blocks.attend(q, k, v, mask, scale)
