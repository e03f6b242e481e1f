"""Sparse-vDiT: each head of each layer runs in one of five fixed modes, found by a search offline.

"Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers", arXiv
2506.03065. Heads of video transformers look near (M2: a band around the diagonal of the frame-major
sequence), at one place in all frames (M3: the same band in position-major order), at a few keys for all
queries (M4: stripes), at everything (M0), or hardly matter (M1: their output is zero). Which it is depends on
layer and head, hardly on the prompt: `ditkit fit sparse-vdit` searches once (section 4.3), for one model and
one grid; heads of a layer with the same mode run in one call.

The authors published no code, so these are choices: blocks of 128 tokens, bands of an eighth of the blocks to
either side, stripes of the first frame and of the key blocks with most attention in the search, so that M2 to
M4 read about a quarter; text rows and columns are always read in full.

B batch, h heads, L tokens of the sequence, N image tokens, d head dim, n blocks, t tokens in a block, K
stripes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit import artifact
from ditkit.registry import Paper, register
from ditkit.seams import executors
from ditkit.seams.apply import Host
from ditkit.seams.attention import AttentionCall
from ditkit.seams.errors import SeamError
from ditkit.seams.layout import TokenLayout

Mode = Literal["full", "skip", "diagonal", "multi-diagonal", "stripe"]
MODES: tuple[str, ...] = get_args(Mode)
FULL, SKIP, DIAGONAL, MULTI_DIAGONAL, STRIPE = range(5)

_READ = 0.25  # share of the blocks that M2 to M4 read by default


@dataclass(frozen=True)
class Table:
    """What a search found.

    Args:
        modes: for each layer, the mode 0..4 of each head.
        stripes: (layers, heads, K) int64, the key blocks that M4 reads beside the first frame.
        grid, text_length: what it was searched on; None: it holds for any.

    Raises:
        ValueError: a mode out of range.
    """

    modes: tuple[tuple[int, ...], ...]
    stripes: Tensor | None = field(default=None, compare=False)
    grid: tuple[int, int, int] | None = None
    text_length: int | None = None

    def __post_init__(self) -> None:
        wrong = [mode for layer in self.modes for mode in layer if mode not in range(len(MODES))]
        if not self.modes or wrong:
            raise ValueError(
                f"modes must be numbers of 0 to 4 for each layer and head; got {wrong or 'none'}"
            )

    def shares(self) -> dict[str, float]:
        """Of each mode among all heads."""
        every = [mode for layer in self.modes for mode in layer]
        return {MODES[mode]: count / len(every) for mode, count in sorted(Counter(every).items())}


@register(
    "method",
    "sparse-vdit",
    summary="each attention head runs full, skipped, banded, banded across frames or striped, as searched",
    paper=Paper(
        "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion "
        "Transformers",
        "2506.03065",
        2025,
    ),
    seam=("attention",),
    needs=("fitting", "a token grid"),
)  # fmt: skip
@dataclass(frozen=True)
class SparseVDiT:
    """Attention in the modes of a search. Without `weights`, `table` or `uniform` every head is full.

    With `weights`, an option left at its default is the one the search ran with.

    Args:
        weights: folder that `ditkit fit sparse-vdit` wrote.
        table: the modes themselves.
        uniform: one mode for all heads, to compare with.
        block: t, tokens in a block.
        diag_width: blocks that a band reaches to either side; None: an eighth of all, rounded up.
        n_stripe: K, key blocks that a stripe head reads beside the first frame's; None: as many as make a
            quarter of all, at least one.
        first_frame: whether stripes have the blocks of the first frame (on video).
        executor: how M2 to M4 run.

    Raises:
        ValueError: an option out of its range, or more than one source of the modes.
    """

    claims: ClassVar[frozenset[str]] = frozenset({"attention"})

    weights: str | None = None
    table: Table | None = None
    uniform: Mode | None = None
    block: int = 128
    diag_width: int | None = None
    n_stripe: int | None = None
    first_frame: bool = True
    executor: executors.Executor = "auto"

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.weights, self.table, self.uniform)) > 1:
            raise ValueError("weights, table and uniform: give one of them")
        if self.uniform is not None and self.uniform not in MODES:
            raise ValueError(f"uniform must be one of {', '.join(MODES)}; got {self.uniform!r}")
        for name, least in (("block", 1), ("diag_width", 0), ("n_stripe", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
        if self.executor not in get_args(executors.Executor):
            raise ValueError(f"executor must be auto, dense, gather or flex; got {self.executor!r}")

    # What it costs, without a model.

    def mode_density(self, mode: int, grid: tuple[int, int, int], text_length: int = 0) -> float:
        """1 - S_i: share of the L x L pairs that a mode reads, for a grid (F, H, W) in tokens and text."""
        return self.patterns(_layout(grid, text_length)).shares[mode]

    def density(self, grid: tuple[int, int, int], text_length: int = 0) -> float:
        """Mean of `mode_density` over all layers and heads."""
        if self.weights is not None:
            return self.fitted().density(grid, text_length)
        patterns = self.patterns(_layout(grid, text_length))
        if self.table is None:
            return patterns.shares[FULL if self.uniform is None else MODES.index(self.uniform)]
        every = [mode for layer in self.table.modes for mode in layer]
        return sum(patterns.shares[mode] * count for mode, count in Counter(every).items()) / len(every)

    def flops(
        self, grid: tuple[int, int, int], text_length: int = 0, heads: int = 12, head_dim: int = 128
    ) -> float:
        """FLOPs of one layer's attention, 4 L^2 d h times the density: the mean over layers."""
        length = math.prod(grid) + text_length
        return 4 * length**2 * heads * head_dim * self.density(grid, text_length)

    # On a model.

    def patterns(self, layout: TokenLayout, device: torch.device | None = None) -> Patterns:
        """The modes at work on a layout."""
        return Patterns(self, layout, device or torch.device("cpu"))

    def fitted(self) -> SparseVDiT:
        """With the table and the options of the `weights` in place of them."""
        if self.weights is None:
            return self
        return self._read(artifact.load(self.weights, "sparse-vdit"))

    def _read(self, found: artifact.Artifact) -> SparseVDiT:
        modes = found.tensors["modes"].tolist()
        grid = found.model["grid"]
        table = Table(
            tuple(tuple(layer) for layer in modes),
            found.tensors["stripes"],
            (int(grid[0]), int(grid[1]), int(grid[2])),
            int(found.model["text_length"]),
        )
        return dataclasses.replace(artifact.fitted(self, found.options), weights=None, table=table)

    def attach(self, host: Host) -> None:
        options = self
        if self.weights is not None:
            found = artifact.load(self.weights, "sparse-vdit")
            found.check(host.model)
            options = self._read(found)
        own = [kind for _, kind in host.attention.modules() if kind != "cross"]
        if options.table is not None and len(options.table.modes) != len(own):
            here = f"this {type(host.model).__name__} has {len(own)}"
            raise SeamError(f"the table has {len(options.table.modes)} layers, {here}")
        strategy = Attention(options)
        host.attention.use(strategy)
        host.note(strategy.notes)


def _layout(grid: tuple[int, int, int], text_length: int) -> TokenLayout:
    return TokenLayout(grid, text_length, "prefix" if text_length else "none")


class Patterns:
    """The five modes on one layout."""

    def __init__(self, options: SparseVDiT, layout: TokenLayout, device: torch.device) -> None:
        self.options, self.layout, self.device = options, layout, device
        # Blocks are runs of the sequence, in frame-major or position-major order.
        self.tiling = executors.tile_grid((1, 1, layout.image_length), (1, 1, options.block), device)
        self.blocks = len(self.tiling.order)

    @property
    def width(self) -> int:
        """Blocks that a band reaches to either side."""
        width = self.options.diag_width
        return math.ceil(_READ / 2 * self.blocks) if width is None else width

    @property
    def first(self) -> int:
        """Blocks that hold the first frame; none in pictures."""
        frames, height, width = self.layout.grid
        if frames == 1 or not self.options.first_frame:
            return 0
        return math.ceil(height * width / self.options.block)

    @property
    def stripes(self) -> int:
        """K."""
        count = self.options.n_stripe
        count = max(1, round(_READ * self.blocks) - self.first) if count is None else count
        return min(count, self.blocks - self.first)

    @functools.cached_property
    def band(self) -> executors.BlockPlan:
        """M2, and M3 on rearranged tokens."""
        number = torch.arange(self.blocks, device=self.device)
        near = (number[:, None] - number).abs() <= self.width
        return self._plan(executors.BlockLists.from_map(near))

    def striped(self, chosen: Tensor) -> executors.BlockPlan:
        """M4 of heads with these stripes, (h, K) block numbers not of the first frame, ascending."""
        first = torch.arange(self.first, device=self.device).expand(len(chosen), -1)
        index = torch.cat([first, chosen.to(self.device)], dim=1)[:, None]  # (h, 1, K')
        return self._plan(executors.BlockLists(index.expand(-1, self.blocks, -1).contiguous()))

    def even_stripes(self, heads: int) -> Tensor:
        """(h, K): stripes at equal distances, where no search has chosen any."""
        places = torch.linspace(self.first, self.blocks - 1, max(self.stripes, 1)).round().long()
        return places[: self.stripes].expand(heads, -1)

    def _plan(self, lists: executors.BlockLists) -> executors.BlockPlan:
        return executors.BlockPlan(lists, self.tiling, self.layout, self.options.executor)

    @functools.cached_property
    def shares(self) -> tuple[float, ...]:
        """1 - S_i of the five modes: of the L x L pairs that each reads."""
        band = self.band.share
        return 1.0, 0.0, band, band, self.striped(self.even_stripes(1)).share

    def run(
        self,
        mode: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        striped: executors.BlockPlan | None = None,
    ) -> Tensor:
        """Heads in one mode, (B, h, L, d) -> (B, h, L, d).

        Args:
            striped: M4 for these heads.
        """
        if mode == SKIP:
            return torch.zeros_like(q)
        if mode == FULL:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if mode == DIAGONAL:
            return self.band.attend(q, k, v, mask, scale)
        if mode == STRIPE:
            plan = self.striped(self.even_stripes(q.shape[1])) if striped is None else striped
            return plan.attend(q, k, v, mask, scale)
        q, k, v = (self.rearrange(x) for x in (q, k, v))
        if mask is not None:
            mask = self.rearrange(mask, -1)
            mask = self.rearrange(mask, -2) if mask.shape[-2] == self.layout.length else mask
        return self.rearrange(self.band.attend(q, k, v, mask, scale), back=True)

    def rearrange(self, x: Tensor, dim: int = -2, *, back: bool = False) -> Tensor:
        """Image tokens from frame-major to position-major order, or back; text stays."""
        if x.shape[dim] != self.layout.length:
            return x
        frames, height, width = self.layout.grid
        sizes = (height * width, frames) if back else (frames, height * width)
        span, length = self.layout.image_span, self.layout.length
        before, image, behind = x.split((span.start, span.stop - span.start, length - span.stop), dim)
        image = image.unflatten(dim, sizes).transpose(dim - 1, dim).flatten(dim - 1, dim)
        return torch.cat([before, image, behind], dim) if self.layout.joint_text_length else image


@dataclass(frozen=True)
class _Group:
    """Heads of a layer that share a mode: their numbers, None for all."""

    mode: int
    heads: Tensor | None
    striped: executors.BlockPlan | None


@dataclass(frozen=True)
class _Plan:
    """What a layout needs: for each layer its groups, the order back, and the share of pairs."""

    patterns: Patterns
    groups: list[list[_Group]]
    back: list[Tensor | None]
    shares: list[float]


class Attention:
    """The strategy: the table at work on one model."""

    def __init__(self, options: SparseVDiT) -> None:
        self.options = options
        self._notes: dict[str, None] = {}

    def __repr__(self) -> str:
        return repr(self.options)

    def notes(self) -> list[str]:
        return list(self._notes)

    def plan(self, layout: TokenLayout, heads: int, device: torch.device) -> _Plan:
        """Groups of heads for a layout.

        Raises:
            SeamError: the table was searched on another grid, text length or number of heads.
        """
        table = self.options.table
        if table is not None:
            self._check(table, layout, heads)
        patterns = self.options.patterns(layout, device)
        uniform = FULL if self.options.uniform is None else MODES.index(self.options.uniform)
        modes: Sequence[Sequence[int]] = ((uniform,) * heads,) if table is None else table.modes
        groups, back, shares = [], [], []
        for number, layer in enumerate(modes):
            stripes = None if table is None or table.stripes is None else table.stripes[number]
            here = [self._group(patterns, mode, layer, stripes) for mode in sorted(set(layer))]
            groups.append(here)
            order = [group.heads for group in here if group.heads is not None]
            back.append(torch.cat(order).argsort() if order else None)
            shares.append(sum(patterns.shares[mode] for mode in layer) / heads)
        self._notes[self._words(patterns, modes, shares)] = None
        return _Plan(patterns, groups, back, shares)

    def _check(self, table: Table, layout: TokenLayout, heads: int) -> None:
        here = (layout.grid, layout.joint_text_length)
        # Some classes have attention over the image tokens alone beside joint attention.
        fits = table.grid == here[0] and here[1] in (table.text_length, 0)
        if table.grid is not None and not fits:
            raise SeamError(
                f"the modes were searched on a grid of {table.grid} tokens with {table.text_length} of text; "
                f"here they are {here[0]} and {here[1]}. Search at this size with `ditkit fit sparse-vdit`"
            )
        if len(table.modes[0]) != heads:
            raise SeamError(f"the table has {len(table.modes[0])} heads, the model {heads}")

    def _group(self, patterns: Patterns, mode: int, layer: Sequence[int], stripes: Tensor | None) -> _Group:
        numbers = [head for head, other in enumerate(layer) if other == mode]
        chosen = torch.tensor(numbers, device=patterns.device)
        striped = None
        if mode == STRIPE:
            own = patterns.even_stripes(len(chosen)) if stripes is None else stripes[chosen.cpu()]
            striped = patterns.striped(own)
        return _Group(mode, None if len(chosen) == len(layer) else chosen, striped)

    def _words(self, patterns: Patterns, modes: Sequence[Sequence[int]], shares: list[float]) -> str:
        parts = [f"{share:.0%} {name}" for name, share in Table(tuple(map(tuple, modes))).shares().items()]
        choice = executors.choose(patterns.layout.length, patterns.band.share, device=patterns.device)
        share = sum(shares) / len(shares)
        return executors.in_words(f"heads {', '.join(parts)}", patterns.layout, share, choice)

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
        layer = call.layer if len(plan.groups) > 1 else 0
        call.attended(plan.shares[layer])
        parts = []
        for group in plan.groups[layer]:
            chosen = group.heads
            one, two, three = (x if chosen is None else x.index_select(1, chosen) for x in (q, k, v))
            own = mask
            if mask is not None and chosen is not None and mask.dim() == 4 and mask.shape[1] > 1:
                own = mask.index_select(1, chosen)
            parts.append(plan.patterns.run(group.mode, one, two, three, own, scale, group.striped))
        back = plan.back[layer]
        return parts[0] if back is None else torch.cat(parts, dim=1).index_select(1, back)
