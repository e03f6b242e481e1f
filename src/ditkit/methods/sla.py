"""SLA: exact softmax on the few critical blocks of keys, linear attention on others, joined by a learned map.

"SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention", arXiv 2509.24006.
Queries and keys are pooled over blocks; for each query block the top k_h of the key blocks by pooled score
are critical (section 4.1). O = O^s + Proj(O^l): O^s is softmax attention over the critical blocks only, O^l
linear attention phi(Q) H / phi(Q) Z over the marginal ones (equations 4 to 6), Proj a d x d map for each
layer that starts at zero. The linear part is no approximation of what was left out but a learned correction:
`ditkit fit sla` trains it with the model.

Three readings of "marginal": `paper`: all blocks but the critical and the k_l lowest; `v1` (the authors'
branch SLA-1): all but the critical; `v2` (their main branch): all keys, with 1e-5 in the denominator. At
least one block is critical, where the authors round to none in short sequences and divide by zero.

Beyond the paper: joint text is always critical and text queries read everything; blocks may be boxes of the
token grid in place of runs of the raster order.

B batch, h heads, L tokens of the sequence, N image tokens, d head dim, m query blocks, n key blocks, b block
length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit import artifact
from ditkit.registry import Choice, Paper, Search, register
from ditkit.seams import executors, weights
from ditkit.seams.apply import Host
from ditkit.seams.attention import AttentionCall
from ditkit.seams.layout import TokenLayout

Variant = Literal["paper", "v1", "v2"]
FeatureMap = Literal["softmax", "elu", "relu"]

_EPSILON = 1e-5  # in the denominator of `v2`
_HELD_BYTES = 256 << 20  # of sums H at once: heads are taken in groups


@register(
    "method",
    "sla",
    summary="softmax over the few critical blocks of keys, plus learned linear attention over the others",
    paper=Paper("SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
                "2509.24006", 2025),
    seam=("attention",),
    needs=("fitting",),
    neutral={"topk": 1.0, "variant": "v1"},
)  # fmt: skip
@dataclass(frozen=True)
class SLA:
    """Sparse-linear attention.

    With `weights`, an option left at its default is the one the weights were fitted with.

    Args:
        topk: k_h, share of the key blocks that are critical, in (0, 1]; int(topk * blocks) of them, at
            least one.
        variant: which blocks the linear part sums, see above.
        k_low: k_l, share of the key blocks that are left out of both parts, in [0, 1); None: 0.1 for
            `paper`, else 0.
        feature_map: phi: softmax over the features, elu + 1, or relu.
        block_q, block_kv: tokens in a block; block_q is a multiple of block_kv.
        tile: sizes of a box of block_kv tokens, such as `"8x8"` or `"4x4x4"` (frames, height, width), that
            takes the place of runs of the raster order; None: runs, as the authors do.
        weights: folder that `ditkit fit sla` wrote. None: Proj is zero, which is sparse attention alone.
        executor: how the sparse part runs.

    Raises:
        ValueError: an option out of its range.
    """

    claims: ClassVar[frozenset[str]] = frozenset({"attention"})
    search: ClassVar[Search] = {
        "topk": Choice((0.2, 0.1, 0.05)),
    }

    topk: float = 0.2
    variant: Variant = "v2"
    k_low: float | None = None
    feature_map: FeatureMap = "softmax"
    block_q: int = 64
    block_kv: int = 64
    tile: str | None = None
    weights: str | None = None
    executor: executors.Executor = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.topk <= 1:
            raise ValueError(f"topk must be above 0 and at most 1; got {self.topk}")
        if not 0 <= self.negligible < 1 or self.topk + self.negligible > 1:
            raise ValueError(
                f"k_low must be at least 0, and at most 1 with topk={self.topk}; got {self.k_low}"
            )
        choices = {"variant": Variant, "feature_map": FeatureMap, "executor": executors.Executor}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(known))}; got {getattr(self, name)!r}"
                )
        if self.block_kv < 1 or self.block_q < 1 or self.block_q % self.block_kv:
            sizes = f"{self.block_q} and {self.block_kv}"
            raise ValueError(f"block_q must be a multiple of block_kv, both at least 1; got {sizes}")
        if self.tile is not None and math.prod(executors.sides(self.tile)) != self.block_kv:
            raise ValueError(f"tile={self.tile!r} does not hold block_kv={self.block_kv} tokens")

    @property
    def negligible(self) -> float:
        """k_l."""
        if self.k_low is not None:
            return self.k_low
        return 0.1 if self.variant == "paper" else 0.0

    def fitted(self) -> SLA:
        """With the options that its weights were fitted with."""
        if self.weights is None:
            return self
        return artifact.fitted(self, artifact.facts(self.weights, "sla")["options"])

    # What it costs, without a model.

    def kept(self, blocks: int) -> int:
        """Critical key blocks of a row."""
        return max(1, int(self.topk * blocks))

    def density(self, grid: tuple[int, int, int], text_length: int = 0) -> float:
        """Share of the L x L pairs in the softmax part, for a grid (F, H, W) in tokens and joint text; where
        blocks are cut at the end, of the mean over all choices of blocks."""
        options = self.fitted()
        tokens, length = math.prod(grid), math.prod(grid) + text_length
        blocks = options.tiling(grid).order.shape[0]
        near = tokens**2 * options.kept(blocks) / blocks
        return (near + tokens * text_length + text_length * length) / length**2

    def flops(
        self, grid: tuple[int, int, int], text_length: int = 0, heads: int = 12, head_dim: int = 128
    ) -> float:
        """FLOPs of one layer's attention as the paper counts them: topk of the dense 4 L^2 d h, whatever the
        rounding to whole blocks, plus 2 N d^2 h, one of the two products of the linear part."""
        tokens, length = math.prod(grid), math.prod(grid) + text_length
        pairs = self.fitted().topk * tokens**2 + tokens * text_length + text_length * length
        return (4 * pairs + 2 * tokens * head_dim) * head_dim * heads

    @staticmethod
    def parameters(layers: int, head_dim: int) -> int:
        """Number of parameters of all Proj."""
        return layers * (head_dim**2 + head_dim)

    # On a model.

    def tiling(self, grid: tuple[int, int, int], device: torch.device | None = None) -> executors.Tiling:
        """The blocks of keys."""
        if self.tile is None:
            return executors.tile_grid((1, 1, math.prod(grid)), (1, 1, self.block_kv), device)
        return executors.tile_grid(grid, executors.sides(self.tile), device)

    def strategy(self, projections: dict[str, nn.Linear] | None = None) -> Attention:
        """What acts at the seam, with Proj by the name of the attention module."""
        return Attention(self, projections or {})

    def attach(self, host: Host) -> None:
        options, values = self.fitted(), {}
        if self.weights is not None:
            found = artifact.load(self.weights, "sla")
            found.check(host.model)
            values = found.tensors
        projections = {}
        modules = [name for name, kind in host.attention.modules() if kind != "cross"]
        for name in modules:
            _, width = weights.heads_of(host.model.get_submodule(name))
            projections[name] = projection(width, host.model)
        strategy = options.strategy(projections)
        host.attention.use(strategy)
        for name, module in projections.items():
            weights.add(host, name, "proj_l", module)
        weights.exchange(host, values)
        host.stats.holds(
            lambda: sum(p.nbytes for module in projections.values() for p in module.parameters())
        )
        host.note(strategy.notes)


def projection(width: int, model: nn.Module) -> nn.Linear:
    """Proj at its start: zero, in float32 on the model's device."""
    device = next(model.parameters()).device
    # By way of "meta", so that its first values take no random numbers from whoever draws next.
    module = nn.Linear(width, width, device="meta", dtype=torch.float32).to_empty(device=device)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


@dataclass(frozen=True)
class _Plan:
    """What a layout needs.

    Args:
        tiling: blocks of keys.
        group: key blocks in a query block.
        share: of the L x L pairs in the softmax part.
    """

    layout: TokenLayout
    tiling: executors.Tiling
    group: int
    share: float
    counts: Tensor = field(repr=False)  # (n,) tokens of each block

    @property
    def rows(self) -> int:
        """m."""
        return math.ceil(len(self.counts) / self.group)

    def queries(self, x: Tensor) -> Tensor:
        """(..., N, d) -> (..., m, group, b, d), zeros where the last block is cut."""
        x = self.keys(x)
        missing = self.rows * self.group - x.shape[-3]
        return F.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(-3, (self.rows, self.group))

    def keys(self, x: Tensor) -> Tensor:
        """(..., N, d) -> (..., n, b, d), zeros where a block is cut."""
        x = self.tiling.split(x)
        return x if self.tiling.valid is None else x * self.tiling.valid[..., None].to(x.dtype)

    def tokens(self, x: Tensor) -> Tensor:
        """The inverse of `queries`."""
        return self.tiling.join(x.flatten(-4, -3)[..., : len(self.counts), :, :])


class Attention:
    """The strategy: the options at work on one model."""

    def __init__(self, options: SLA, projections: dict[str, nn.Linear]) -> None:
        self.options = options
        self.projections = projections
        self._notes: dict[str, None] = {}

    def __repr__(self) -> str:
        return repr(self.options)

    def notes(self) -> list[str]:
        return list(self._notes)

    def plan(self, layout: TokenLayout, heads: int, device: torch.device) -> _Plan:
        """Blocks of a layout."""
        options = self.options
        tiling = options.tiling(layout.grid, device)
        n, b = tiling.order.shape
        counts = tiling.valid.sum(-1) if tiling.valid is not None else torch.full((n,), b, device=device)
        share = options.density(layout.grid, layout.joint_text_length)
        choice = executors.choose(layout.length, share, device=device)
        if options.executor != "auto":
            choice = executors.Choice(options.executor, "as asked for")
        what = f"{options.kept(n)} of {n} key blocks critical,"
        self._notes[executors.in_words(what, layout, share, choice)] = None
        return _Plan(layout, tiling, options.block_q // options.block_kv, share, counts)

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
        call.attended(plan.share)
        return self.compute(q, k, v, self.projections[call.name], plan, mask, scale)

    def compute(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        proj: nn.Linear,
        plan: _Plan,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """O^s + Proj(O^l), (B, h, L, d)."""
        critical, marginal = self.classify(q, k, plan)
        sparse = self.sparse(q, k, v, critical, plan, mask, scale)
        linear = self.linear(q, k, v, marginal, plan, mask)
        weight = proj.weight
        return (sparse.to(weight.dtype) + F.linear(linear.to(weight.dtype), weight, proj.bias)).to(q.dtype)

    @torch.no_grad()
    def classify(self, q: Tensor, k: Tensor, plan: _Plan) -> tuple[Tensor, Tensor | None]:
        """Numbers of the critical blocks (B, h, m, K), ascending, and a map of the marginal ones
        (B, h, m, n); None where the linear part takes all keys."""
        options, span, n = self.options, plan.layout.image_span, len(plan.counts)
        pooled_k = _mean(plan.keys(k[:, :, span] - k.mean(2, keepdim=True)), plan.counts, -2)  # (B, h, n, d)
        sums = plan.queries(q[:, :, span]).sum((-3, -2))  # (B, h, m, d)
        counts = F.pad(plan.counts, (0, plan.rows * plan.group - n)).unflatten(0, (plan.rows, -1)).sum(-1)
        scores = (sums / counts[:, None]) @ pooled_k.transpose(-1, -2)  # (B, h, m, n)
        critical = scores.topk(options.kept(n), dim=-1).indices
        if options.variant == "v2":
            return critical.sort(-1).values, None
        marginal = torch.ones_like(scores, dtype=torch.bool).scatter(-1, critical, False)
        low = int(options.negligible * n)
        if low:
            lowest = scores.topk(low, dim=-1, largest=False).indices
            marginal = marginal.scatter(-1, lowest, False)
        return critical.sort(-1).values, marginal

    def sparse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        critical: Tensor,
        plan: _Plan,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """O^s: softmax attention over the critical blocks and all text, (B, h, L, d)."""
        n = len(plan.counts)
        if critical.shape[-1] == n:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        lists = executors.BlockLists(critical.repeat_interleave(plan.group, dim=2)[:, :, :n])
        block = executors.BlockPlan(lists, plan.tiling, plan.layout, self.options.executor)
        return block.attend(q, k, v, mask, scale)

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        marginal: Tensor | None,
        plan: _Plan,
        mask: Tensor | None = None,
    ) -> Tensor:
        """O^l: linear attention over the marginal blocks, or over all keys, (B, h, L, d) in float32."""
        phi_q, phi_k = self.phi(q), self.phi(k)
        if mask is not None:
            phi_k = phi_k * _readable(mask, phi_k)
        if marginal is None:
            return _quotient(phi_q, phi_k.transpose(-1, -2) @ v.float(), phi_k.sum(-2), _EPSILON)
        span = plan.layout.image_span
        chunk = max(1, _HELD_BYTES // (q.shape[0] * plan.rows * q.shape[-1] ** 2 * 4))
        parts = []
        for heads in torch.arange(q.shape[1], device=q.device).split(chunk):
            here = slice(int(heads[0]), int(heads[-1]) + 1)
            keys, values = plan.keys(phi_k[:, here, span]), plan.keys(v[:, here, span].float())
            chosen = marginal[:, here].to(keys.dtype)  # (B, h, m, n)
            H = (chosen @ (keys.transpose(-1, -2) @ values).flatten(-2)).unflatten(-1, (q.shape[-1], -1))
            Z = chosen @ keys.sum(-2)  # (B, h, m, d)
            queries = plan.queries(phi_q[:, here, span])  # (B, h, m, group, b, d)
            out = _quotient(queries.flatten(-3, -2), H, Z)  # (B, h, m, group b, d)
            parts.append(plan.tokens(out.unflatten(-2, queries.shape[-3:-1])))
        image = torch.cat(parts, dim=1)
        # For text queries every block is critical, so that nothing is marginal.
        before, behind = span.start, plan.layout.length - span.stop
        return F.pad(image, (0, 0, before, behind))

    def phi(self, x: Tensor) -> Tensor:
        """The feature map, (..., d) -> (..., d) in float32, not negative."""
        x = x.float()
        if self.options.feature_map == "softmax":
            return x.softmax(-1)
        return F.elu(x) + 1 if self.options.feature_map == "elu" else F.relu(x)


def _mean(blocks: Tensor, counts: Tensor, dim: int) -> Tensor:
    return blocks.sum(dim) / counts[:, None]


def _quotient(queries: Tensor, H: Tensor, Z: Tensor, epsilon: float = 0.0) -> Tensor:
    """phi(Q) H / (phi(Q) Z) of (..., b, d), (..., d, d) and (..., d); zero where nothing is summed."""
    below = (queries @ Z[..., None]) + epsilon  # (..., b, 1)
    empty = below == 0
    return (queries @ H / below.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def _readable(mask: Tensor, keys: Tensor) -> Tensor:
    """How far each key may be read by any query, in [0, 1], to multiply phi(K) (B, h, L, d) with."""
    open_ = mask.to(keys.dtype) if mask.dtype == torch.bool else mask.to(keys.dtype).exp().clamp(max=1)
    return open_.amax(-2).expand(keys.shape[0], -1, keys.shape[2])[..., None]
