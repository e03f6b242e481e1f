"""Sparse attention by compiled flex attention: block lists as full blocks, element masks as look-up tables.

On CPU it runs compiled and without gradients only; the first call for each shape compiles (5 to 25 s, needs a
C++ compiler). Masks are given as tables because there an arithmetic mask function costs ten times dense
attention.

B batch, h heads, L tokens of the joint sequence, N image tokens, T text tokens, d head dim,
n tiles, t tokens in a tile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ditkit.seams.executors.blocks import BlockLists, Tiling
from ditkit.seams.executors.gather import with_text_queries
from ditkit.seams.layout import TokenLayout


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True)
class FlexPlan:
    """A block mask over [image tiles, text] keys, made once for a static list.

    Args:
        mask: for flex attention; the image queries are its rows.
        tiling: the order in which the image tokens stand.
    """

    mask: BlockMask
    tiling: Tiling


def plan_blocks(lists: BlockLists, tiling: Tiling, layout: TokenLayout) -> FlexPlan:
    """The block mask of lists that are the same for every sample.

    Image tiles are whole blocks. The text stands behind them in blocks of its own, all of them read; flex
    attention itself cuts the last one at the end of the sequence.

    Raises:
        ValueError: boxes that stick out of the grid; tokens in them would need an element mask.
    """
    if tiling.valid is not None:
        raise ValueError(
            f"tiles of {tiling.tile} do not divide the {tiling.grid} grid; compiled flex attention needs "
            "whole tiles, use the gather executor"
        )
    n, t = tiling.order.shape
    blocks = math.ceil(layout.joint_text_length / t)
    index, count = lists.index, lists.count
    B, h, Q, K = index.shape
    device = index.device
    if count is None:
        count = torch.full((B, h, Q), K, device=device)
    # Used tiles first, then the text blocks, then whatever fills the row: flex reads `count + blocks`
    # entries.
    full = torch.zeros(B, h, Q, n + blocks, dtype=torch.int32, device=device)
    full[..., :K] = index.int()
    slot = count[..., None] + torch.arange(blocks, device=device)
    full.scatter_(-1, slot, torch.arange(n, n + blocks, dtype=torch.int32, device=device).expand_as(slot))
    none = torch.zeros(B, h, Q, dtype=torch.int32, device=device)
    mask = BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(full),
        (count + blocks).int(),
        full,
        BLOCK_SIZE=t,
        seq_lengths=(n * t, n * t + layout.joint_text_length),
        compute_q_blocks=False,
    )
    return FlexPlan(mask, tiling)


def flex_blocks(
    q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan, layout: TokenLayout, *, scale: float | None = None
) -> Tensor:
    """Attention where image queries read the tiles of their list and all text, and text queries read
    everything.

    Args:
        q, k, v: (B, h, L, d) in the order of `layout`; no gradients on CPU.

    Returns:
        (B, h, L, d).
    """
    image, text = layout.image_span, layout.text_span
    queries, k_image, v_image = (plan.tiling.split(x[:, :, image]).flatten(2, 3) for x in (q, k, v))
    if layout.joint_text_length:
        k_image, v_image = (
            torch.cat([tiles, x[:, :, text]], dim=2) for tiles, x in ((k_image, k), (v_image, v))
        )
    out = _compiled()(queries, k_image, v_image, block_mask=plan.mask, scale=scale)
    out = plan.tiling.join(out.unflatten(2, plan.tiling.order.shape))
    return with_text_queries(out, q, k, v, layout, None, scale)


@dataclass(frozen=True)
class FlexTable:
    """A block mask over any element mask, which is kept as a table.

    Args:
        mask: for flex attention; its mask function reads the table.
        tiling: the order in which the image tokens stand.
    """

    mask: BlockMask
    tiling: Tiling


def plan_table(allowed: Tensor, tiling: Tiling, layout: TokenLayout) -> FlexTable:
    """The block mask of an element mask.

    Args:
        allowed: (N, N + E) bool in raster order, True where an image query may read an image key or one of
            the E further keys; text is not in it. Its N (N + E) bytes are kept: for up to some 16,000 tokens.
        tiling: query and key order; tiles must be whole, and their size is the block size.
    """
    if tiling.valid is not None:
        raise ValueError(f"tiles of {tiling.tile} do not divide the {tiling.grid} grid")
    n, t = tiling.order.shape
    order = tiling.order.reshape(-1)
    N, T = layout.image_length, layout.joint_text_length
    table = allowed.index_select(0, order)
    always = torch.ones(N, T, dtype=torch.bool, device=allowed.device)
    table = torch.cat([table[:, :N].index_select(1, order), always, table[:, N:]], dim=1).contiguous()
    keys = table.shape[1]
    columns = math.ceil(keys / t)
    padded = torch.nn.functional.pad(table, (0, columns * t - keys)).view(n, t, columns, t)
    some = padded.any(dim=3).any(dim=1)  # (n, columns)
    inside = torch.full((columns,), t, device=allowed.device)
    inside[-1] = keys - (columns - 1) * t
    whole = padded.sum(dim=(1, 3)) == inside * t
    partial, full = (BlockLists.from_map(x) for x in (some & ~whole, whole))

    def lookup(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return table[q_index, k_index]

    mask = BlockMask.from_kv_blocks(
        *_counted(partial, columns),
        *_counted(full, columns),
        BLOCK_SIZE=t,
        mask_mod=lookup,
        seq_lengths=(N, keys),
        compute_q_blocks=False,
    )
    return FlexTable(mask, tiling)


def _counted(lists: BlockLists, columns: int) -> tuple[Tensor, Tensor]:
    """Lists as flex attention takes them: how long each is, and the entries in rows of `columns`."""
    B, h, Q, K = lists.index.shape
    count = torch.full((B, h, Q), K, device=lists.index.device) if lists.count is None else lists.count
    return count.int(), torch.nn.functional.pad(lists.index, (0, columns - K)).int()


def flex_table(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: FlexTable,
    layout: TokenLayout,
    *,
    extra: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention where image queries read what the table allows, and all text.

    Args:
        q, k, v: (B, h, L, d) in the order of `layout`; no gradients on CPU.
        extra: keys and values (B, h, E, d) that image queries read as the table says and text queries do not.

    Returns:
        (B, h, L, d).
    """
    image, text = layout.image_span, layout.text_span
    queries, keys, values = (plan.tiling.split(x[:, :, image]).flatten(2, 3) for x in (q, k, v))
    more = (None, None) if extra is None else extra
    keys, values = (
        torch.cat([tiles, x[:, :, text]] + ([] if e is None else [e]), dim=2)
        for tiles, x, e in ((keys, k, more[0]), (values, v, more[1]))
    )
    out = _compiled()(queries, keys, values, block_mask=plan.mask, scale=scale)
    out = plan.tiling.join(out.unflatten(2, plan.tiling.order.shape))
    return with_text_queries(out, q, k, v, layout, None, scale)
