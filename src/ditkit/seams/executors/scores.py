"""What strategies compute beside the output: the log-sum-exp of the scores, and scores of pooled blocks.

B batch, h heads, Lq queries, Lk keys, d head dim, n tiles, t tokens in a tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ditkit.seams.executors.blocks import Tiling


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log of its denominator.

    exp(lse of a masked pass - lse of a full one) is the share of softmax mass inside the mask.

    Args:
        q, k, v: (B, h, Lq or Lk, d).
        mask: bool (True: may be read) or additive, broadcastable to (B, h, Lq, Lk); every query must read
            at least one key.

    Returns:
        output (B, h, Lq, d) and log-sum-exp (B, h, Lq) in float32, both with gradients.
    """
    if q.device.type != "cpu":
        return formula_with_lse(q, k, v, mask, scale)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    # The kernel behind scaled_dot_product_attention on CPU has the log-sum-exp already.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, 0.0, False, attn_mask=mask, scale=scale)


def formula_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` written out, for devices without a kernel that gives both; holds all scores."""
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.float()).to(v.dtype), lse


def pooled_tiles(x: Tensor, tiling: Tiling) -> Tensor:
    """Mean over the valid tokens of each tile: (..., N, d) -> (..., n, d)."""
    tiles = tiling.split(x)  # (..., n, t, d)
    if tiling.valid is None:
        return tiles.mean(-2)
    weight = tiling.valid.to(x.dtype)
    return (tiles * weight[..., None]).sum(-2) / weight.sum(-1)[..., None]


def pooled_scores(q: Tensor, k: Tensor, tiling: Tiling, scale: float | None = None) -> Tensor:
    """Scores of pooled queries against pooled keys, without softmax: (B, h, N, d) twice -> (B, h, n, n)."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return pooled_tiles(q, tiling) @ pooled_tiles(k, tiling).transpose(-1, -2) * scale
