"""Sparse attention by gathering: the keys and values a group of queries reads are copied side by side, and
one dense scaled-dot-product attention runs on them. Works in every precision, trains, and needs no compiler.

B batch, h heads, L tokens of the joint sequence, N image tokens, T always-visible keys (text and others), d
head dim, n query tiles, t tokens in a tile, K keys gathered for a tile, R lists run at once, G heads that
share a list.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as _sdpa

from ditkit.seams.executors.blocks import BlockLists, Tiling
from ditkit.seams.layout import TokenLayout

# Keys and values gathered at once stay about within a core's second-level cache (measured: 2 MiB is best, 8
# MiB costs 30 %).
CHUNK_BYTES = 2 << 20


def gather_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    tiling: Tiling,
    layout: TokenLayout,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention where image queries read the tiles of their list and all text, and text queries read
    everything.

    Args:
        q, k, v: (B, h, L, d) in the order of `layout`.
        keys: (B or 1, L), bool (True: may be read) or additive: the validity of single keys, e.g. padded
            text.

    Returns:
        (B, h, L, d). An image query with an empty list and no text gets zeros.
    """
    B, h, _, d = q.shape
    n, t = tiling.order.shape
    image, text = layout.image_span, layout.text_span
    many_b, many_h = lists.index.shape[0] > 1, lists.index.shape[1] > 1

    def rows(x: Tensor) -> Tensor:
        """(B, h, ..., d) -> (lists' B * lists' h, G, ..., d)."""
        shape = x.shape[2:]
        if many_b:
            return x.reshape(B * h, 1, *shape) if many_h else x
        return x.transpose(0, 1) if many_h else x.reshape(1, B * h, *shape)

    qt, kt, vt = (rows(tiling.split(x[:, :, image])) for x in (q, k, v))  # (P, G, n, t, d)
    P, G = qt.shape[:2]
    # one line for each (P, tile): a list then picks whole lines                 (P * n, G, t, d)
    qt, kt, vt = (x.transpose(1, 2).reshape(P * n, G, t, d) for x in (qt, kt, vt))
    k_text, v_text = (rows(x[:, :, text]) for x in (k, v))  # (P, G, T, d)
    visible = _key_rows(keys, layout, tiling, (B, h), (P, G), (many_b, many_h))

    index = lists.index.reshape(P * n, -1)
    parts, lines = [], []
    for group in lists.rows:
        size = G * (group.length * t + k_text.shape[2]) * d * 2 * q.element_size()
        for which in group.which.split(max(1, CHUNK_BYTES // max(size, 1))):
            lines.append(which)
            parts.append(
                _one_chunk(qt, kt, vt, k_text, v_text, visible, index, which, group.length, n, scale)
            )
    out = torch.cat(parts)  # (P * n, G, t, d)
    if len(lists.rows) > 1:
        out = out.index_select(0, torch.cat(lines).argsort())
    out = out.view(P, n, G, t, d).transpose(1, 2)  # (P, G, n, t, d)
    out = (out.transpose(0, 1) if many_h and not many_b else out).reshape(B, h, n, t, d)
    return with_text_queries(tiling.join(out), q, k, v, layout, keys, scale)


def _one_chunk(qt, kt, vt, k_text, v_text, visible, index, which, length, n, scale) -> Tensor:
    """R lists of equal length -> (R, G, t, d)."""
    R, (_, G, t, d) = which.shape[0], qt.shape
    row = which // n  # (R,) which P
    picked = (index.index_select(0, which)[:, :length] + (row * n)[:, None]).reshape(-1)

    def collect(tiles: Tensor, text: Tensor) -> Tensor:
        x = (
            tiles.index_select(0, picked)
            .view(R, length, G, t, d)
            .transpose(1, 2)
            .reshape(R, G, length * t, d)
        )
        if not text.shape[2]:
            return x
        text = text.expand(R, -1, -1, -1) if text.shape[0] == 1 else text.index_select(0, row)
        return torch.cat([x, text], dim=2)

    queries = qt.index_select(0, which)
    if length == 0 and k_text.shape[2] == 0:
        return torch.zeros_like(queries)
    mask = None
    if visible is not None:
        tiles, rest = visible  # (P * n, G', t), (P, G', T)
        shared = tiles.shape[1]
        mask = tiles.index_select(0, picked).view(R, length, shared, t).transpose(1, 2).reshape(R, shared, -1)
        mask = torch.cat([mask, rest.index_select(0, row)], dim=-1)[:, :, None]  # (R, G', 1, K)
    return _sdpa(queries, collect(kt, k_text), collect(vt, v_text), attn_mask=mask, scale=scale)


def _key_rows(keys, layout, tiling, heads, lines, many) -> tuple[Tensor, Tensor] | None:
    """Which keys may be read, in the order of the lines: tiles (P * n, G or 1, t) and text (P, G or 1, T)."""
    if keys is None and tiling.valid is None:
        return None
    (B, h), (P, G), (many_b, many_h) = heads, lines, many
    n, t = tiling.order.shape
    if keys is None:
        keys = torch.ones(1, layout.length, dtype=torch.bool, device=tiling.order.device)
    tiles = keys[:, layout.image_span][:, tiling.order.reshape(-1)].view(-1, n, t)
    if tiling.valid is not None:
        tiles = (
            tiles & tiling.valid
            if keys.dtype == torch.bool
            else tiles.masked_fill(~tiling.valid, float("-inf"))
        )
    text = keys[:, layout.text_span]

    def spread(x: Tensor) -> Tensor:
        """(B or 1, ...) -> (P, G or 1, ...)."""
        if x.shape[0] == 1:
            return x.expand(P, *x.shape[1:])[:, None]
        x = x[:, None].expand(B, h, *x.shape[1:])
        if many_b:
            return x.reshape(P, G, *x.shape[2:])
        return x.transpose(0, 1) if many_h else x.reshape(P, G, *x.shape[2:])

    tiles = spread(tiles)  # (P, G or 1, n, t)
    return tiles.transpose(1, 2).reshape(P * n, -1, t), spread(text)


def with_text_queries(
    image: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    keys: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Put the image queries' output (B, h, N, d) and a dense pass of the text queries into one sequence."""
    if not layout.joint_text_length:
        return image
    mask = None if keys is None else keys[:, None, None]
    text = _sdpa(q[:, :, layout.text_span], k, v, attn_mask=mask, scale=scale)
    return torch.cat([text, image] if layout.text == "prefix" else [image, text], dim=2)
