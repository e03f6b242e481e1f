"""CLEAR: each image token attends to a disc around itself and to all text (Liu, Tan, Wang; arXiv 2412.16112).

In a joint sequence of text and an H x W grid of image tokens, an image query reads every text token and the
image tokens at (dy, dx) with dy^2 + dx^2 < r^2; a text query reads everything (section 3.2). With a down
factor d, image queries also read (H/d)(W/d) keys and values pooled over cells of d x d tokens with one
learned weight for each place in the cell; text queries do not. At resolutions beyond the training size the
scale is sqrt(log_4608(keys) / c) ("proportional attention") and the rotary base is multiplied by an NTK
factor. `ditkit fit clear` distils the attention projections (`weights`); the authors' own distilled weights
load into the model by name, `spatial_weight` through the option of that name.

Beyond the paper: text may be a suffix, in cross-attention, or absent; the real text length takes the place of
the authors' constant 512; grids that d does not divide are continued at the border; on video the disc is read
in every frame at most `frame_radius` away (default: all frames), so that the cost stays linear in the frame.

B batch, h heads, L tokens of the sequence, N = F H W image tokens, T text tokens, E pooled keys, c head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit import artifact
from ditkit.registry import Choice, Paper, Search, register
from ditkit.seams import executors, weights
from ditkit.seams.attention import AttentionCall
from ditkit.seams.errors import SeamError
from ditkit.seams.layout import TokenLayout

if TYPE_CHECKING:
    from ditkit.seams.apply import Host
    from ditkit.seams.cost import ModelCost

# Tokens of the training pictures: 64 x 64 and 512 of text.
_TRAINED_LENGTH = 64**2 + 512
# The authors' constant for the down-sampled variant: its keys count as ten times as many.
_POOLED_KEYS = 10
# Query tile of the gather executor (frames, rows, columns): measured best of 4 x 8 to 16 x 32 on CPU.
_TILE = (1, 8, 16)
# End of the authors' key for the pooling weights of an attention module, and the name they have here.
_TAIL = ".processor.spatial_weight"
POOLING = "pooling"


@register(
    "method",
    "local-window",
    summary="image tokens attend to a disc around themselves and to all text: cost linear in the area",
    paper=Paper(
        "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", "2412.16112", 2024
    ),
    seam=("attention",),
    needs=("a token grid",),
    aliases=("clear",),
    neutral={"radius": math.inf},
)
@dataclass(frozen=True)
class LocalWindow:
    """Local-window attention with the masks of CLEAR.

    Args:
        radius: r > 0 of the disc in tokens; the comparison is strict, so r = 1 is the token alone. From the
            grid's diagonal on the result is that of dense attention, bit by bit.
        down_factor: d >= 1; above 1, image queries also read keys and values pooled over d x d cells.
        proportional_attention: the scale for resolutions beyond the training size.
        ntk_factor: multiplies the base of the rotary embedding, for the same purpose (authors: 10). Models
            with a `pos_embed.theta` (Flux) only.
        frame_radius: on video, the disc is read in frames at most this far away, >= 0.
        executor: how to run it; `"auto"` takes masked dense attention below about a thousand tokens or where
            most pairs are read, otherwise gathered windows.
        spatial_weight: the pooling weights for each attention module, as a mapping of the authors' key names
            (`transformer_blocks.0.attn.processor.spatial_weight`) to tensors of d x d elements, or the path
            of a safetensors file that has them. None: 1 / d^2, the authors' initial value.
        weights: folder that `ditkit fit clear` wrote; then an option left at its default is the one the
            weights were fitted with.

    Raises:
        ValueError: an option out of its range.
    """

    claims: ClassVar[frozenset[str]] = frozenset({"attention"})
    search: ClassVar[Search] = {
        "radius": Choice((2.0, 4.0, 6.0, 8.0, 12.0, 16.0)),
        "down_factor": Choice((1, 4)),
    }

    radius: float = 8.0
    down_factor: int = 1
    proportional_attention: bool = False
    ntk_factor: float = 1.0
    frame_radius: float = math.inf
    executor: executors.Executor = "auto"
    spatial_weight: Mapping[str, Tensor] | str | None = field(default=None, repr=False)
    weights: str | None = None

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"radius must be above 0 (tokens); got {self.radius}")
        if self.down_factor < 1 or self.down_factor != int(self.down_factor):
            raise ValueError(f"down_factor must be a whole number of at least 1; got {self.down_factor}")
        if not self.ntk_factor > 0:
            raise ValueError(f"ntk_factor must be above 0; got {self.ntk_factor}")
        if not self.frame_radius >= 0:
            raise ValueError(f"frame_radius must be at least 0; got {self.frame_radius}")
        if self.executor not in ("auto", "dense", "gather", "flex"):
            raise ValueError(f"executor must be auto, dense, gather or flex; got {self.executor!r}")
        if self.spatial_weight is not None and self.down_factor == 1:
            raise ValueError("spatial_weight is read with a down_factor above 1 only; set down_factor")

    def fitted(self) -> LocalWindow:
        """With the options that its weights were fitted with."""
        if self.weights is None:
            return self
        return artifact.fitted(self, artifact.facts(self.weights, "local-window")["options"])

    # What it costs, without a model.

    def pairs(self, height: int, width: int, text_length: int = 512, frames: int = 1) -> int:
        """Query-key pairs that are read, for a grid in tokens and joint text; takes no L x L mask."""
        if self.weights is not None:
            return dataclasses.replace(self.fitted(), weights=None).pairs(height, width, text_length, frames)
        tokens = frames * height * width
        near = _within(frames, math.floor(min(self.frame_radius, frames)))
        near *= _disc_pairs(height, width, self.radius)
        cells = frames * _cells(height, self.down_factor) * _cells(width, self.down_factor)
        pooled = tokens * cells if self.down_factor > 1 else 0
        return text_length * (text_length + tokens) + tokens * text_length + near + pooled

    def density(self, height: int, width: int, text_length: int = 512, frames: int = 1) -> float:
        """`pairs` as a share of the L x L pairs of dense attention."""
        return self.pairs(height, width, text_length, frames) / (frames * height * width + text_length) ** 2

    def flops(
        self, height: int, width: int, text_length: int = 512, channels: int = 3072, frames: int = 1
    ) -> int:
        """FLOPs of one layer's attention as the paper counts them, 4 pairs C: grid in tokens, C channels."""
        return 4 * channels * self.pairs(height, width, text_length, frames)

    def ceiling(self, cost: ModelCost) -> float | None:
        """At most so many times less work; None where the tokens are no grid."""
        if cost.grid is None:
            return None
        frames, height, width = cost.grid
        return cost.sparse(self.density(height, width, cost.text_length, frames))

    # On a model.

    def strategy(self, cells: Mapping[str, Tensor] | None = None) -> _Window:
        """What acts at the seam, with pooling weights (d, d) by the name of the attention module."""
        return _Window(self, dict(cells or {}))

    def static_mask(self, layout: TokenLayout, device: torch.device) -> executors.WindowPlan:
        """The window on a layout, for methods that work on any mask; without pooled keys and scale."""
        window = self.strategy()
        windows = executors.neighbourhoods(layout.grid, _TILE, window.reach(layout), window.near, device)
        return executors.WindowPlan(windows, layout, self.executor)

    def attach(self, host: Host) -> None:
        options, values = self.fitted(), {}
        if self.weights is not None:
            found = artifact.load(self.weights, "local-window")
            found.check(host.model)
            values = dict(found.tensors)
        learned = {name: values.pop(name) for name in list(values) if name.endswith(_TAIL)}
        cells = options._cells(host, self._given(learned))
        strategy = options.strategy({name: module.spatial_weight for name, module in cells.items()})
        if self.ntk_factor != 1:
            _scale_rotary_base(host, self.ntk_factor)
        host.attention.use(strategy)
        for name, module in cells.items():
            weights.add(host, name, POOLING, module)
        weights.exchange(host, values)
        host.stats.holds(lambda: sum(module.spatial_weight.nbytes for module in cells.values()))
        host.note(strategy.notes)

    def _given(self, learned: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        if isinstance(self.spatial_weight, str):
            from safetensors.torch import load_file

            return load_file(self.spatial_weight)
        return self.spatial_weight if self.spatial_weight is not None else learned or None

    def _cells(self, host: Host, given: Mapping[str, Tensor] | None) -> dict[str, Pooling]:
        """The pooling of each attention module, by the module's name; none at a down factor of 1."""
        d = self.down_factor
        wanted = [name for name, kind in host.attention.modules() if kind != "cross"]
        if d == 1:
            return {}
        if given is None:
            given = {name + _TAIL: torch.full((d, d), 1 / d**2) for name in wanted}
        found = {name.removesuffix(_TAIL): weight for name, weight in given.items() if name.endswith(_TAIL)}
        missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        if missing or unknown:
            raise SeamError(
                f"spatial_weight does not fit this model: missing for {missing or 'none'}, "
                f"unknown {unknown or 'none'}; "
                f"keys must be <attention module>{_TAIL}"
            )
        for name, weight in found.items():
            if weight.numel() != d * d:
                raise SeamError(
                    f"spatial_weight of {name} has shape {tuple(weight.shape)}; "
                    f"down_factor={d} needs {d * d} elements"
                )
        device = next(host.model.parameters()).device
        return {name: Pooling(weight.reshape(d, d).to(device)) for name, weight in found.items()}


class Pooling(nn.Module):
    """The learned weight (d, d) of the places in a cell."""

    def __init__(self, spatial_weight: Tensor) -> None:
        super().__init__()
        self.spatial_weight = nn.Parameter(spatial_weight.detach().clone())


def _scale_rotary_base(host: Host, factor: float) -> None:
    embedding: Any = getattr(host.model, "pos_embed", None)
    theta = getattr(embedding, "theta", None)
    if not isinstance(theta, (int, float)):
        raise SeamError(
            f"ntk_factor={factor} needs a model whose rotary embedding has a base `pos_embed.theta` (Flux); "
            f"{type(host.model).__name__} has none. Leave ntk_factor at 1"
        )
    embedding.theta = theta * factor

    def restore() -> None:
        embedding.theta = theta

    host.on_remove(restore)


def _cells(size: int, factor: int) -> int:
    return math.ceil(size / factor)


def _within(size: int, reach: int) -> int:
    """Pairs of places on a line of `size` that are at most `reach` apart."""
    reach = min(reach, size - 1)
    return size + 2 * (reach * size - reach * (reach + 1) // 2)


def _disc_pairs(height: int, width: int, radius: float) -> int:
    """Pairs of tokens of a grid with dy^2 + dx^2 < r^2."""
    total = 0
    for dy in range(height):
        rest = radius**2 - dy**2
        if rest <= 0:
            break
        reach = width if math.isinf(rest) else math.ceil(math.sqrt(rest)) - 1  # largest dx with dx^2 < rest
        total += (1 if dy == 0 else 2) * (height - dy) * _within(width, reach)
    return total


@dataclass(frozen=True)
class _Plan:
    """What a layout needs.

    Args:
        everything: the disc covers the grid: nothing is masked.
        choice: the executor and why.
        share: of the L x L pairs that are read.
    """

    layout: TokenLayout
    everything: bool
    choice: executors.Choice
    share: float
    window: _Window
    device: torch.device

    @functools.cached_property
    def allowed(self) -> Tensor:
        """(L, L + E) bool in the order of the sequence."""
        layout, device = self.layout, self.device
        cells = self.window.cells(layout)
        mask = torch.ones(layout.length, layout.length + cells, dtype=torch.bool, device=device)
        mask[layout.image_span, layout.image_span] = self.disc
        mask[layout.text_span, layout.length :] = False
        return mask

    @functools.cached_property
    def disc(self) -> Tensor:
        """(N, N) bool."""
        f, y, x = executors.places(
            self.layout.grid, torch.arange(self.layout.image_length, device=self.device)
        )
        return self.window.near(f[:, None] - f, y[:, None] - y, x[:, None] - x)

    @functools.cached_property
    def windows(self) -> executors.Windows:
        window, grid = self.window, self.layout.grid
        return executors.neighbourhoods(grid, _TILE, window.reach(self.layout), window.near, self.device)

    @functools.cached_property
    def table(self) -> executors.FlexTable:
        tiling = executors.tile_grid(self.layout.grid, _TILE, self.device)
        always = torch.ones(
            len(self.disc), self.window.cells(self.layout), dtype=torch.bool, device=self.device
        )
        return executors.plan_table(torch.cat([self.disc, always], dim=1), tiling, self.layout)


class _Window:
    """The strategy: `LocalWindow`'s options at work on one model."""

    def __init__(self, options: LocalWindow, weights: dict[str, Tensor]) -> None:
        self.options = options
        self.weights = weights
        self._notes: dict[str, None] = {}

    def __repr__(self) -> str:
        return repr(self.options)

    def notes(self) -> list[str]:
        return list(self._notes)

    def plan(self, layout: TokenLayout, heads: int, device: torch.device) -> _Plan:
        """Choose how to run on this layout and build its tables."""
        options, (frames, height, width) = self.options, layout.grid
        corner = (height - 1) ** 2 + (width - 1) ** 2
        everything = corner < options.radius**2 and frames - 1 <= options.frame_radius
        share = options.density(height, width, layout.joint_text_length, frames)
        choice = self._choose(layout)
        plan = _Plan(layout, everything, choice, share, self, device)
        if not everything or options.down_factor > 1:
            _ = {"dense": lambda: plan.allowed, "gather": lambda: plan.windows, "flex": lambda: plan.table}[
                choice.name
            ]()
        self._notes[self._words(layout, plan)] = None
        return plan

    def _choose(self, layout: TokenLayout) -> executors.Choice:
        name = self.options.executor
        if name != "auto":
            return executors.Choice(name, "as asked for")
        if layout.length < executors.DENSE_BELOW:
            return executors.Choice("dense", f"{layout.length} tokens are too few for gathering to pay")
        sides = zip(layout.grid, _TILE, self.reach(layout), strict=True)
        box = math.prod(min(size, step + 2 * far) for size, step, far in sides)
        gathered = box + layout.joint_text_length + self.cells(layout)
        if gathered / layout.length > executors.DENSE_ABOVE:
            return executors.Choice("dense", f"a tile would gather {gathered} of {layout.length} keys")
        return executors.Choice("gather", f"a tile gathers {gathered} of {layout.length} keys")

    def _words(self, layout: TokenLayout, plan: _Plan) -> str:
        f, height, width = layout.grid
        where = (
            f"local window on {f} x {height} x {width} tokens"
            if f > 1
            else f"local window on {height} x {width} tokens"
        )
        if plan.everything:
            return f"{where}: radius {self.options.radius:g} covers the grid: dense, nothing is saved"
        text = (
            f"{where}: {plan.share:.1%} of the pairs are read; runs {plan.choice.name} ({plan.choice.reason})"
        )
        return f"{text}; slower than plain attention" if plan.choice.name == "dense" else text

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
        """Attention of one module, (B, h, L, c) -> (B, h, L, c)."""
        layout = plan.layout
        if self.options.proportional_attention:
            scale = self.scale(layout.length, q.shape[-1])
        call.attended(plan.share)
        pooled = self.options.down_factor > 1
        if plan.everything and not pooled:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        extra = None
        if pooled:
            extra = self.pool(k, layout, call.name), self.pool(v, layout, call.name)
        name = plan.choice.name
        keys = None
        if mask is not None and executors.is_key_mask(mask, q.shape[0], layout.length):
            keys = executors.key_mask(mask, q.shape[0], layout.length)
        elif mask is not None:  # it has a row for each query
            name = "dense"
        if name == "flex" and (keys is not None or executors.needs_gradients_on_cpu(q, k, v)):
            name = "gather"
        if name == "dense":
            if extra is not None:
                k, v = (torch.cat([x, more], dim=2) for x, more in zip((k, v), extra, strict=True))
            if mask is not None and k.shape[2] > layout.length:
                mask = F.pad(mask, (0, k.shape[2] - layout.length), value=float(mask.dtype == torch.bool))
            return executors.masked_dense(q, k, v, executors.combine(plan.allowed, mask), scale)
        if name == "gather":
            return executors.gather_windows(
                q, k, v, plan.windows, layout, extra=extra, keys=keys, scale=scale
            )
        return executors.flex_table(q, k, v, plan.table, layout, extra=extra, scale=scale)

    def scale(self, keys: int, channels: int) -> float:
        """Proportional attention's scale; pooled keys are not among the keys counted."""
        keys = keys if self.options.down_factor == 1 else _POOLED_KEYS * keys
        return math.sqrt(math.log(keys, _TRAINED_LENGTH) / channels)

    def cells(self, layout: TokenLayout) -> int:
        """Number of pooled keys E."""
        d, (frames, height, width) = self.options.down_factor, layout.grid
        return frames * _cells(height, d) * _cells(width, d) if d > 1 else 0

    def pool(self, x: Tensor, layout: TokenLayout, name: str) -> Tensor:
        """Weighted sums over d x d cells of the image tokens, (B, h, L, c) -> (B, h, E, c)."""
        d, (frames, height, width) = self.options.down_factor, layout.grid
        x = x[:, :, layout.image_span].unflatten(2, (frames, height, width))  # (B, h, F, H, W, c)
        rows = torch.arange(_cells(height, d) * d, device=x.device).clamp(max=height - 1)
        columns = torch.arange(_cells(width, d) * d, device=x.device).clamp(max=width - 1)
        if len(rows) > height:
            x = x.index_select(3, rows)
        if len(columns) > width:
            x = x.index_select(4, columns)
        x = x.unflatten(4, (-1, d)).unflatten(3, (-1, d))  # (B, h, F, H/d, d, W/d, d, c)
        if self.weights:
            weight = self.weights[name].to(x.device, x.dtype)
        else:
            weight = torch.full((d, d), 1 / d**2, device=x.device, dtype=x.dtype)
        return torch.einsum("bhfyixjc,ij->bhfyxc", x, weight).flatten(2, 4)

    def near(self, frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """May a query read a key at this distance?"""
        return (rows**2 + columns**2 < self.options.radius**2) & (frames.abs() <= self.options.frame_radius)

    def reach(self, layout: TokenLayout) -> tuple[int, int, int]:
        """How far the windows go along frames, height and width."""
        frames, height, width = layout.grid
        beside = math.ceil(min(self.options.radius, height + width)) - 1
        return math.floor(min(self.options.frame_radius, frames)), beside, beside
