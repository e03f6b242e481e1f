"""Re-ttention: a static sparse mask whose softmax is put right by two things kept from an earlier step (Chen,
Mills, Jiang, Gao, Niu: "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape", arXiv
2505.22918).

After some dense steps, every few steps are full: the output is full attention O, and kept are the share rho
of each query's softmax mass that lies inside the mask and the residual R = O - rho O_mask, with O_mask from
the softmax over the mask. The steps between compute R + rho O_mask; rho grows by lambda with each of them.
The masks are a band around each token of the raster, or on video such a band in every frame; text is read by
all and reads all.

Beyond the paper: rho = exp(lse of the mask - lse of all); R is kept before the output projection, which is
linear; both are kept by the scheduler's step and guidance branch, where the authors count calls; the band is
widened to whole blocks, which run as fast as they are few (the authors multiply densely under a mask:
`band="exact"`, `executor="dense"`); any static mask of another method may take its place; rho can be clamped.

B batch, h heads, L tokens of the sequence, N image tokens, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit import registry
from ditkit.registry import Choice, Paper, Range, Search, register
from ditkit.seams import executors
from ditkit.seams.attention import AttentionCall
from ditkit.seams.layout import TokenLayout
from ditkit.seams.steps import Step

if TYPE_CHECKING:
    from ditkit.seams.apply import Host

Grid = tuple[int, int, int]
Phase = Literal["dense", "full", "sparse"]

# Dense steps at the start in the authors' code: of 20, 50 and 50 steps.
_WARMUP = {"PixArtTransformer2DModel": 5, "HunyuanDiT2DModel": 10, "CogVideoXTransformer3DModel": 15}


@runtime_checkable
class Masked(Protocol):
    """A method whose mask does not depend on the data."""

    def static_mask(self, layout: TokenLayout, device: torch.device) -> executors.StaticMask: ...


@register(
    "method",
    "re-ttention",
    summary="a fixed sparse mask, put right by the softmax mass and the output it missed at an earlier step",
    paper=Paper(
        "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape", "2505.22918", 2025
    ),
    seam=("attention",),
    needs=("a token grid",),
    neutral={"refresh": 1},
)
@dataclass(frozen=True)
class ReTtention:
    """Sparse attention with kept statistics. For inference: what is kept carries no gradient.

    Args:
        keep: share of a query's keys inside the band, above 0 to 1: w = int(n keep) of the n tokens of the
            picture or frame, and w // 2 on either side. 1 reads everything.
        window: w itself, instead of `keep`.
        mask: `"band"` over the whole raster; `"frame-band"`: over the raster of a frame, in every frame (the
            authors' on video); `"auto"`: the one for the grid; or another method with a static mask, as an
            object or by name, such as `"grat"` or `"local-window"`.
        band: `"blocks"`: widened to whole blocks of `block` tokens; `"exact"`: the authors'.
        block: tokens of a block.
        warmup: dense steps at the start; None: the authors' 5 on PixArt, 10 on Hunyuan-DiT, 15 on CogVideoX,
            otherwise a quarter of the steps (5 where their number is not known).
        refresh: every so many steps is full, from the warm-up on; 1 computes all of them.
        last_refresh: no step after this one is full; None: they go on. The authors' PixArt code stops at 15,
            of 20 steps.
        growth: lambda, by which rho grows with each sparse step.
        clamp: keep rho at 1 or below. The authors do not, so that text queries, whose rho is 1, are scaled
            up.
        ratio: multiply by rho; False: keep the residual of the plain sparse output.
        residual: add R; False: rho only.
        executor: how to run the mask; `"dense"` is a masked dense pass as in the authors' code, which saves
            nothing.

    Raises:
        ValueError: an option out of its range.
    """

    claims: ClassVar[frozenset[str]] = frozenset({"attention"})
    search: ClassVar[Search] = {
        "keep": Choice((0.25, 0.125, 0.03125)),
        "refresh": Range(3, 10),
        "warmup": Choice((None, 1, 3)),
    }

    keep: float = 0.03125
    window: int | None = None
    mask: str | Masked = "auto"
    band: Literal["blocks", "exact"] = "blocks"
    block: int = 128
    warmup: int | None = None
    refresh: int = 5
    last_refresh: int | None = None
    growth: float = 0.04
    clamp: bool = False
    ratio: bool = True
    residual: bool = True
    executor: executors.Executor = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be a share above 0, at most 1; got {self.keep!r}")
        for name, least in (("window", 1), ("block", 1), ("warmup", 0), ("refresh", 1), ("last_refresh", 0)):
            value = getattr(self, name)
            if value is None and name not in ("block", "refresh"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
        if not math.isfinite(self.growth):
            raise ValueError(f"growth must be a number; got {self.growth!r}")
        if self.band not in ("blocks", "exact"):
            raise ValueError(f"band must be blocks or exact; got {self.band!r}")
        if self.executor not in ("auto", "dense", "gather", "flex"):
            raise ValueError(f"executor must be auto, dense, gather or flex; got {self.executor!r}")
        if self.mask not in ("auto", "band", "frame-band"):
            self._other()

    def _other(self) -> Masked:
        """The method whose mask is used."""
        found = registry.parse_method(self.mask) if isinstance(self.mask, str) else self.mask
        if not isinstance(found, Masked):
            raise ValueError(
                f"mask={self.mask!r} has no static mask; use auto, band, frame-band, grat or local-window"
            )
        return found

    # What it costs, without a model.

    def bands(self, grid: Grid) -> Grid:
        """The raster the band runs over: (frames, 1, tokens of each)."""
        if self.mask == "band":
            return (1, 1, math.prod(grid))
        return (grid[0], 1, grid[1] * grid[2])

    def half_width(self, grid: Grid) -> int:
        """w // 2: how far the band goes on either side, in tokens."""
        tokens = self.bands(grid)[2]
        if self.window is None and self.keep == 1:
            return tokens
        return (int(tokens * self.keep) if self.window is None else self.window) // 2

    def density(
        self,
        grid: Grid,
        text_length: int = 0,
        *,
        rounded: bool = True,
        queries: Literal["all", "image"] = "all",
    ) -> float:
        """Share of the query-key pairs that a sparse step reads.

        Args:
            grid: (F, H, W) in tokens.
            text_length: text tokens in the joint sequence; 0 for models with cross-attention.
            rounded: as it runs, widened to blocks where `band="blocks"`; False: the paper's band.
            queries: of all pairs, or of the `"image"` tokens' pairs among themselves only, which is what the
                paper's percentages count.
        """
        if self.mask in ("auto", "band", "frame-band"):
            share = self._band_share(grid, self.block if rounded and self.band == "blocks" else 1)
        else:
            share = self._other().static_mask(TokenLayout(grid), torch.device("cpu")).share
        if queries == "image":
            return share
        image = math.prod(grid)
        length = image + text_length
        return (share * image**2 + image * text_length + text_length * length) / length**2

    def _band_share(self, grid: Grid, block: int) -> float:
        tokens, half = self.bands(grid)[2], self.half_width(grid)
        whole, rest = divmod(tokens, block)
        reach = _blocks(half, block)
        near = min(reach, max(whole - 1, 0))
        pairs = block**2 * (whole + 2 * near * whole - near * (near + 1))
        pairs += rest**2 + 2 * rest * block * min(reach, whole)
        return pairs / tokens**2

    def flops(self, grid: Grid, text_length: int, heads: int, head_dim: int) -> int:
        """FLOPs of one layer's attention at a sparse step: 4 for each pair that is read, head and channel."""
        pairs = self.density(grid, text_length) * (math.prod(grid) + text_length) ** 2
        return round(4 * pairs * heads * head_dim)

    def phase(self, index: int, warmup: int) -> Phase:
        """How a step runs, once something is kept."""
        if index < warmup or self.refresh == 1:
            return "dense"
        due = index % self.refresh == 0 and (self.last_refresh is None or index <= self.last_refresh)
        return "full" if due else "sparse"

    def phases(self, num_steps: int, warmup: int | None = None) -> list[Phase]:
        """How each step of a generation runs; a first step after the warm-up is full in any case."""
        warmup = self.warmup_of(None, num_steps) if warmup is None else warmup
        found: list[Phase] = [self.phase(index, warmup) for index in range(num_steps)]
        if self.refresh > 1 and warmup < num_steps:
            found[warmup] = "full"
        return found

    def warmup_of(self, name: str | None, num_steps: int | None) -> int:
        """Dense steps at the start, for a class of models."""
        if self.warmup is not None:
            return self.warmup
        if name in _WARMUP:
            return _WARMUP[name]
        return 5 if num_steps is None else num_steps // 4

    # On a model.

    def static_mask(self, layout: TokenLayout, device: torch.device) -> executors.StaticMask:
        """The mask on a layout, ready to run."""
        if self.mask not in ("auto", "band", "frame-band"):
            return self._other().static_mask(layout, device)
        raster, half = self.bands(layout.grid), self.half_width(layout.grid)
        if self.band == "exact":
            tile, reach = (1, 1, min(self.block, raster[2])), (raster[0], 0, min(half, raster[2]))
            near: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda f, y, x: x.abs() <= half  # noqa: E731
            windows = executors.neighbourhoods(raster, tile, reach, near, device)
            return executors.WindowPlan(windows, layout, self.executor)
        tiling = executors.tile_grid(raster, (1, 1, self.block), device)
        place = torch.arange(tiling.counts[2], device=device).repeat(raster[0])  # of a block in its frame
        near_blocks = (place[:, None] - place).abs() <= _blocks(half, self.block)
        lists = executors.BlockLists.from_map(near_blocks)
        return executors.BlockPlan(lists, tiling, layout, self.executor)

    def strategy(self, name: str | None = None) -> _Reshaped:
        """What acts at the seam, for a class of models."""
        return _Reshaped(self, name)

    def attach(self, host: Host) -> None:
        strategy = self.strategy(host.anatomy.name)
        host.attention.use(strategy)
        strategy.states = host.attention.states
        host.stats.modes.append(lambda: (strategy.phase, strategy.prepared))
        host.stats.holds(lambda: _held(host.attention.states))
        host.note(strategy.notes)


def _blocks(half: int, block: int) -> int:
    """How many blocks away a band of `half` tokens on either side ends, seen from the end of a block."""
    return math.ceil(half / block)


def _held(states: dict[Any, dict[Any, Any]]) -> int:
    kept = (x for state in states.values() for x in state.values())
    return sum(x.untyped_storage().nbytes() for x in kept if isinstance(x, Tensor))


class _Reshaped:
    """The strategy: `ReTtention`'s options at work on one model. Each layer and guidance branch keeps
    `"ratio"` (B, h, L, 1), `"residual"` (B, h, L, d) and `"at"`, the step they are from.

    Args:
        states: what the layers keep, by layer and branch.
        phase: how the step that runs is computed.
        prepared: the layers that can be sparse in it; one that a cache skipped at the full step can't.
    """

    def __init__(self, options: ReTtention, name: str | None) -> None:
        self.options = options
        self.name = name
        self.states: Mapping[Any, dict[Any, Any]] = {}
        self.prepared: tuple[str, ...] = ()
        self.phase: Phase = "dense"
        # A tensor, so that compiled code does not take it for a constant.
        self.now = torch.zeros((), dtype=torch.float32)
        self._kept: dict[str, int] = {}  # the generation in which a branch last had a full step
        self._notes: dict[str, None] = {}
        self._steps: dict[Phase, int] = {"dense": 0, "full": 0, "sparse": 0}

    def __repr__(self) -> str:
        return repr(self.options)

    def notes(self) -> list[str]:
        dense, full, sparse = self._steps.values()
        if not sparse:
            return [f"Re-ttention: none of {dense + full} forwards was sparse; use more steps or less warmup"]
        counted = f"Re-ttention: {dense} forwards were dense, {full} full, {sparse} sparse"
        return [*self._notes, counted]

    def begin(self, step: Step) -> None:
        self.phase = self.options.phase(step.index, self.options.warmup_of(self.name, step.num_steps))
        if self.phase == "sparse" and self._kept.get(step.branch) != step.generation:
            self.phase = "full"
        if self.phase == "full":
            self._kept[step.branch] = step.generation
        self._forget(step)
        self.prepared = tuple(
            name for (name, branch), kept in self.states.items() if branch == step.branch and "ratio" in kept
        )
        self.now.fill_(step.index)
        self._steps[self.phase] += 1

    def _forget(self, step: Step) -> None:
        """A layer that a cache skipped at the last full step makes up for it when it runs next."""
        if self.phase != "sparse":
            return
        warmup = self.options.warmup_of(self.name, step.num_steps)
        due = max((at for at in range(step.index) if self.options.phase(at, warmup) == "full"), default=-1)
        for (_, branch), kept in self.states.items():
            if branch == step.branch and "ratio" in kept and float(kept["at"]) < due:
                del kept["ratio"]

    def plan(self, layout: TokenLayout, heads: int, device: torch.device) -> executors.StaticMask:
        """The mask of this layout."""
        plan = self.options.static_mask(layout, device)
        choice = plan.prepare(device)
        self._notes[executors.in_words("Re-ttention's sparse steps", layout, plan.share, choice)] = None
        return plan

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall,
        plan: executors.StaticMask,
    ) -> Tensor:
        """Attention of one module, (B, h, L, d) -> (B, h, L, d)."""
        if self.phase == "dense":
            call.attended(1.0)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        state = call.state
        # What a cache skipped at the full step has nothing to go by.
        if self.phase == "full" or "ratio" not in state:
            call.attended(1.0)
            return self._full(q, k, v, mask, scale, state, plan)
        call.attended(plan.share)
        out = plan.attend(q, k, v, mask, scale)
        if self.options.ratio:
            out = out * self.ratio(state)
        if self.options.residual:
            out = out + state["residual"]
        return out.to(q.dtype)

    def ratio(self, state: dict[Any, Any]) -> Tensor:
        """rho at the step that runs, (B, h, L, 1)."""
        grown = (self.now - state["at"] - 1).clamp(min=0) * self.options.growth
        ratio = state["ratio"] + grown
        return ratio.clamp(max=1) if self.options.clamp else ratio

    def _full(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        state: dict[Any, Any],
        plan: executors.StaticMask,
    ) -> Tensor:
        """Full attention, with what it leaves for the sparse steps."""
        out, lse = executors.attention_with_lse(q, k, v, mask, scale)
        with torch.no_grad():
            inside, lse_inside = plan.attend_with_lse(q, k, v, mask, scale)
            ratio = (lse_inside - lse).exp().nan_to_num(0.0)[..., None]  # (B, h, L, 1)
            state["ratio"], state["at"] = ratio, self.now.clone()
            if self.options.residual:
                inside = ratio * inside if self.options.ratio else inside
                state["residual"] = (out - inside).to(q.dtype)
        return out
