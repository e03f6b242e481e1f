"""Attention with a full mask: the reference that the sparse executors are held against, and the fallback.

B batch, h heads, Lq queries, Lk keys, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as _sdpa


def is_key_mask(mask: Tensor, batch: int, keys: int) -> bool:
    """Is the mask of a call one row of keys for each sample, the same for every query and head?"""
    return mask.dim() == 4 and mask.shape[1:] == (1, 1, keys) and mask.shape[0] in (1, batch)


def key_mask(mask: Tensor, batch: int, keys: int) -> Tensor:
    """Such a mask as (B or 1, keys), bool (True: may be read) or additive.

    Raises:
        ValueError: a mask that also depends on the query or the head.
    """
    if not is_key_mask(mask, batch, keys):
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} is not one row of {keys} keys for a batch of {batch}"
        )
    return mask[:, 0, 0]


def combine(allowed: Tensor, mask: Tensor | None) -> Tensor:
    """A bool mask and the mask of a call in one: bool with bool stays bool, otherwise additive."""
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return allowed & mask
    return mask.masked_fill(~allowed, float("-inf"))


def masked_dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention under a mask, (B, h, Lq, d) -> (B, h, Lq, d).

    Args:
        mask: bool (True: may be read) or additive, broadcastable to (B, h, Lq, Lk). A query that may read
            nothing gets zeros.
    """
    out = _sdpa(q, k, v, attn_mask=mask, scale=scale)
    if mask is None:
        return out
    return out.masked_fill(nothing_read(mask)[..., None], 0.0)


def nothing_read(mask: Tensor) -> Tensor:
    """Which queries a mask leaves no key: (..., Lq, Lk) -> (..., Lq) bool."""
    return ~mask.any(-1) if mask.dtype == torch.bool else torch.isneginf(mask).all(-1)
