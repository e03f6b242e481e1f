"""What strategies compute beside the output: the log-sum-exp of the scores, and scores of pooled blocks.

B batch, h heads, Lq queries, Lk keys, d head dim, n tiles, t tokens in a tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ditkit.seams.executors.blocks import Tiling
from ditkit.seams.executors.dense import nothing_read

# Scores that `formula_with_lse` holds at once.
SCORE_BYTES = 256 << 20


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log of its denominator.

    exp(lse of a masked pass - lse of a full one) is the share of softmax mass inside the mask.

    Args:
        q, k, v: (B, h, Lq or Lk, d).
        mask: bool (True: may be read) or additive, broadcastable to (B, h, Lq, Lk).

    Returns:
        output (B, h, Lq, d) and log-sum-exp (B, h, Lq) in float32, both with gradients. A query that may read
        nothing gets zeros and -inf.
    """
    if q.device.type != "cpu":
        out, lse = formula_with_lse(q, k, v, mask, scale)
    else:
        bias = mask
        if mask is not None and mask.dtype == torch.bool:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        # The kernel behind scaled_dot_product_attention on CPU has the log-sum-exp already. It takes for
        # granted that the last dimension is packed.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if bias is not None and bias.stride(-1) != 1:
            bias = bias.contiguous()
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    if mask is None:
        return out, lse
    empty = nothing_read(mask)
    return out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, float("-inf"))


def formula_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` written out, for devices without a kernel that gives both; holds the scores of
    some queries at a time."""
    B, h, Lq, d = q.shape
    step = max(1, SCORE_BYTES // (4 * B * h * k.shape[-2]))
    outs, lses = [], []
    for start in range(0, Lq, step):
        rows = slice(start, start + step)
        here = mask[..., rows, :] if mask is not None and mask.dim() > 1 and mask.shape[-2] == Lq else mask
        scores = q[..., rows, :].float() @ k.float().transpose(-1, -2) * (d**-0.5 if scale is None else scale)
        if here is not None:
            scores = scores.masked_fill(~here, float("-inf")) if here.dtype == torch.bool else scores + here
        lse = scores.logsumexp(-1)
        outs.append(((scores - lse[..., None]).exp() @ v.float()).to(v.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)


def pooled_tiles(x: Tensor, tiling: Tiling) -> Tensor:
    """Mean over the valid tokens of each tile: (..., N, d) -> (..., n, d)."""
    if tiling.valid is None:
        sizes = [size for pair in zip(tiling.counts, tiling.tile, strict=True) for size in pair]
        return x.unflatten(-2, sizes).mean((-6, -4, -2)).flatten(-4, -2)
    weight = tiling.valid.to(x.dtype)
    return (tiling.split(x) * weight[..., None]).sum(-2) / weight.sum(-1)[..., None]


def pooled_scores(q: Tensor, k: Tensor, tiling: Tiling, scale: float | None = None) -> Tensor:
    """Scores of pooled queries against pooled keys, without softmax: (B, h, N, d) twice -> (B, h, n, n)."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return pooled_tiles(q, tiling) @ pooled_tiles(k, tiling).transpose(-1, -2) * scale
