"""Rows of block arguments that belong to image tokens, for blocks that run on some of the tokens.

B batch, L image tokens, T text tokens, D head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ditkit.seams.anatomy import Rows

Text = Literal["prefix", "suffix"]


def _pick(value: Tensor, dim: int, indices: Tensor, text: int, place: Text | None) -> Tensor:
    """The selected image rows, with all text rows before or behind them when `value` has them there."""
    words = torch.arange(text, device=indices.device)
    if place == "prefix":
        indices = torch.cat([words, indices + text])
    elif place == "suffix":
        indices = torch.cat([indices, words + value.shape[dim] - text])
    return value.index_select(dim, indices.to(value.device))


def table(dim: int, text: Text | None = None) -> Rows:
    """A tensor with a row for each token along `dim`."""

    def rows(value: Any, indices: Tensor, length: int) -> Any:
        return None if value is None else _pick(value, dim, indices, length, text)

    return rows


def pair(dim: int, text: Text | None = None) -> Rows:
    """Rotary (cos, sin), each with a row for each token along `dim`."""

    def rows(tables: Any, indices: Tensor, length: int) -> Any:
        return None if tables is None else tuple(_pick(one, dim, indices, length, text) for one in tables)

    return rows


def first(rows: Rows) -> Rows:
    """(image rows, text rows): only the first is selected from."""
    return lambda tables, indices, length: (rows(tables[0], indices, length), *tables[1:])


def square(text: Text | None = None) -> Rows:
    """A mask (..., S, S) between tokens."""

    def rows(mask: Any, indices: Tensor, length: int) -> Any:
        if mask is None:
            return None
        return _pick(_pick(mask, -1, indices, length, text), -2, indices, length, text)

    return rows


def modulation(dim: int, ndim: int) -> Rows:
    """Modulation with a row for each image token along `dim`; left alone when it has one row for all."""

    def rows(value: Any, indices: Tensor, length: int) -> Any:
        if value is None or value.ndim != ndim or value.shape[dim] == 1:
            return value
        return value.index_select(dim, indices.to(value.device))

    return rows


def named(rows: Rows, *names: str) -> Rows:
    """A dictionary of tables, those with these names."""
    return lambda tables, indices, length: {
        name: rows(value, indices, length) if name in names else value for name, value in tables.items()
    }
