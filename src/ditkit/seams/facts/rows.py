"""Rows of block arguments that belong to image tokens, for blocks that run on some of the tokens.

B batch, L image tokens, T text tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pair(dim: int, *, prefix: bool = False) -> Any:
    """Rotary (cos, sin) with a row for each image token along `dim`; with `prefix` after the text's rows."""

    def rows(tables: Any, indices: Tensor, text: int) -> Any:
        if tables is None:
            return None
        offset = text if prefix else 0
        wanted = torch.cat([torch.arange(offset, device=indices.device), indices + offset])
        return tuple(table.index_select(dim, wanted.to(table.device)) for table in tables)

    return rows


def first_of_pair(tables: Any, indices: Tensor, text: int) -> Any:
    """QwenImage: (image frequencies (L, D/2), text frequencies): only the first has image rows."""
    return tables[0].index_select(0, indices.to(tables[0].device)), tables[1]


def columns(*, prefix: bool = False) -> Any:
    """A mask (..., L + T) of the keys: columns of the selected image tokens and all text columns, which stand
    behind, or with `prefix` before the image."""

    def rows(mask: Any, indices: Tensor, text: int) -> Any:
        if mask is None:
            return None
        image = mask.shape[-1] - text
        words = torch.arange(text, device=indices.device)
        order = [words, indices + text] if prefix else [indices, words + image]
        return mask.index_select(-1, torch.cat(order).to(mask.device))

    return rows


def square(mask: Any, indices: Tensor, text: int) -> Any:
    """A mask (..., L, L) between image tokens."""
    if mask is None:
        return None
    indices = indices.to(mask.device)
    return mask.index_select(-1, indices).index_select(-2, indices)


def modulation(dim: int, ndim: int) -> Any:
    """Modulation with a row for each token along `dim`; left alone when it has one row for all."""

    def rows(value: Any, indices: Tensor, text: int) -> Any:
        if value is None or value.ndim != ndim or value.shape[dim] == 1:
            return value
        return value.index_select(dim, indices.to(value.device))

    return rows
