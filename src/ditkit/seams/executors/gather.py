"""Sparse attention by gathering: the keys and values a group of queries reads are copied side by side, and
one dense scaled-dot-product attention runs on them. Works in every precision, trains, and needs no compiler.

B batch, h heads, L tokens of the joint sequence, N image tokens, T always-visible keys (text and others), d
head dim, n query tiles, t tokens in a tile, K keys gathered for a tile, R lists run at once, G heads that
share a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as _sdpa

from ditkit.seams.executors.blocks import BlockLists, Tiling, Which, take
from ditkit.seams.executors.dense import combine
from ditkit.seams.executors.scores import attention_with_lse
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
    (out,) = _gather((q, k, v), lists, tiling, layout, keys, scale, plain)
    return with_text_queries(out, q, k, v, layout, keys, scale)


def gather_blocks_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    tiling: Tiling,
    layout: TokenLayout,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`gather_blocks` and the log of each query's softmax denominator, (B, h, L) in float32 (-inf for a query
    that reads nothing)."""
    out, lse = _gather((q, k, v), lists, tiling, layout, keys, scale, with_lse)
    return with_text_lse(out, lse, q, k, v, layout, keys, scale)


# (queries, keys, values, mask, scale) -> the output, and whatever else it gives for each query.
Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "float | None"], tuple[Tensor, ...]]


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, ...]:
    return (_sdpa(q, k, v, attn_mask=mask, scale=scale),)


def with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, ...]:
    out, lse = attention_with_lse(q, k, v, mask, scale)
    return out, lse[..., None]


def _gather(
    qkv: tuple[Tensor, Tensor, Tensor],
    lists: BlockLists,
    tiling: Tiling,
    layout: TokenLayout,
    keys: Tensor | None,
    scale: float | None,
    kernel: Kernel,
) -> list[Tensor]:
    """What the kernel gives for the image queries, each (B, h, N, .)."""
    q, k, v = qkv
    B, h, _, d = q.shape
    n, t = tiling.order.shape
    many_b, many_h = lists.index.shape[0] > 1, lists.index.shape[1] > 1

    def heads(x: Tensor) -> Tensor:
        """(B, h, ...) -> (P, G, ...): P have lists of their own, and G heads share each."""
        if many_b:
            return x.reshape(B * h, 1, *x.shape[2:]) if many_h else x
        return x.transpose(0, 1) if many_h else x.reshape(1, B * h, *x.shape[2:])

    P, G = heads(q).shape[:2]
    queries = tiling.split(heads(q[:, :, layout.image_span]), tiles_first=True).reshape(P * n, G, t, d)
    source = _Source(heads(k), heads(v), _validity(keys, layout, (B, h), heads), tiling, layout)
    source.pick(lists.index)
    sizes = (d,) if kernel is plain else (d, 1)
    empty = (0.0, float("-inf"))  # of a query that reads nothing
    results = _Results(source.reuse, queries, sizes)
    for group in lists.rows:
        if not group.length and not layout.joint_text_length:
            lead = (len(group.which), G, t)
            nothing = [queries.new_full((*lead, size), x) for size, x in zip(sizes, empty, strict=False)]
            results.put(group.which, nothing)
            continue
        size = G * (group.length * t + layout.joint_text_length) * d * 2 * q.element_size()
        for which in group.chunks(max(1, CHUNK_BYTES // size)):
            k_here, v_here, mask = source.collect(which, group.length)
            results.put(which, kernel(take(queries, which), k_here, v_here, mask, scale))
    found = []
    for out in results.all():
        out = tiling.join(out.view(P, n, G, t, -1), tiles_first=True)  # (P, G, N, .)
        found.append((out.transpose(0, 1) if many_h and not many_b else out).reshape(B, h, -1, out.shape[-1]))
    return found


class _Results:
    """Parts of the output, put together in the order of the lists.

    Args:
        reuse: write into one tensor; otherwise (in training, when compiled) keep the parts.
    """

    def __init__(self, reuse: bool, queries: Tensor, sizes: tuple[int, ...]) -> None:
        self.whole: list[Tensor] = []
        self.parts: list[list[Tensor]] = [[] for _ in sizes]
        self.order: list[Tensor] = []
        if reuse:
            dtypes = (queries.dtype, torch.float32)
            self.whole = [
                queries.new_empty((*queries.shape[:-1], size), dtype=dtype)
                for size, dtype in zip(sizes, dtypes, strict=False)
            ]

    def put(self, which: Which, found: Sequence[Tensor]) -> None:
        for whole, part in zip(self.whole, found, strict=False):
            if isinstance(which, slice):
                whole[which] = part
            else:
                whole.index_copy_(0, which, part.to(whole.dtype))
        if not self.whole:
            for parts, part in zip(self.parts, found, strict=True):
                parts.append(part)
            if not isinstance(which, slice):
                self.order.append(which)

    def all(self) -> list[Tensor]:
        if self.whole:
            return self.whole
        joined = [torch.cat(parts) for parts in self.parts]
        if not self.order:
            return joined
        back = torch.cat(self.order).argsort()
        return [x.index_select(0, back) for x in joined]


def _validity(
    keys: Tensor | None, layout: TokenLayout, sizes: tuple[int, int], heads: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """(B or 1, L) -> (P or 1, G or 1, L)."""
    if keys is None or keys.shape[0] == 1:
        return keys if keys is None else keys[None]
    return heads(keys[:, None].expand(*sizes, layout.length))


class _Source:
    """The keys and values that lists pick from: image tiles, and text behind them.

    Args:
        k, v: (P, G, L, d).
        valid: (P or 1, G or 1, L), bool or additive; None when every key may be read.
    """

    def __init__(
        self, k: Tensor, v: Tensor, valid: Tensor | None, tiling: Tiling, layout: TokenLayout
    ) -> None:
        self.P, self.G, _, self.d = k.shape
        n, self.t = tiling.order.shape
        T = layout.joint_text_length
        # Text of whole tiles is picked like the image; otherwise it is appended, which copies once more.
        self.text_tiles = T // self.t if T % self.t == 0 else 0
        self.n, self.m = n, n + self.text_tiles
        self.tables, self.rest = [], []
        for x in (k, v):
            image, text = tiling.split(x[:, :, layout.image_span]), x[:, :, layout.text_span]
            if self.text_tiles:
                image = torch.cat([image, text.unflatten(2, (self.text_tiles, self.t))], dim=2)
            self.tables.append(image.reshape(self.P * self.G * self.m, self.t * self.d))
            self.rest.append(text if T and not self.text_tiles else None)  # (P, G, T, d)
        self.mask = self._mask(valid, tiling, layout)
        # In training every chunk needs memory of its own; otherwise one buffer serves all of them.
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v))
        self.reuse = not grad and not torch.compiler.is_compiling()
        self.buffers: list[Tensor | None] = [None, None]

    def _mask(
        self, valid: Tensor | None, tiling: Tiling, layout: TokenLayout
    ) -> tuple[Tensor, Tensor] | None:
        """Validity of the tiles (P or 1, G or 1, m, t) and of text that is appended (P or 1, G or 1, T)."""
        if valid is None and tiling.valid is None:
            return None
        device = tiling.order.device
        if valid is None:
            valid = torch.ones(1, 1, layout.length, dtype=torch.bool, device=device)
        text = valid[..., layout.text_span]
        tiles = valid[..., layout.image_span][..., tiling.order]
        if tiling.valid is not None:
            tiles = combine(tiling.valid, tiles)
        if self.text_tiles:
            tiles = torch.cat([tiles, text.unflatten(-1, (self.text_tiles, self.t))], dim=-2)
            text = text[..., :0]
        return tiles, text

    def pick(self, index: Tensor) -> None:
        """Take the lists (B or 1, h or 1, n, K); text tiles go before the image tiles of each list."""
        index = index.reshape(self.P * self.n, -1)
        if self.text_tiles:
            text = torch.arange(self.n, self.m, device=index.device)
            index = torch.cat([text.expand(len(index), -1), index], dim=1)
        self.index = index
        first = torch.arange(self.P * self.G, device=index.device).view(self.P, 1, self.G, 1) * self.m
        # Number of each tile's line in the tables.
        self.lines = (first + index.view(self.P, self.n, 1, -1)).flatten(0, 1)  # (P * n, G, K)
        self.rows = torch.arange(self.P * self.n, device=index.device) // self.n  # (P * n,)

    def collect(self, which: Which, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values (R, G, K, d) and mask (R, G or 1, 1, K) of R lists of one length."""
        length += self.text_tiles
        lines = take(self.lines, which)[:, :, :length]
        row = take(self.rows, which)  # (R,) which P
        k, v = (self._copy(place, lines, row) for place in (0, 1))
        if self.mask is None:
            return k, v, None
        R = len(lines)
        valid, text = (
            x.index_select(0, row) if x.shape[0] > 1 else x.expand(R, *x.shape[1:]) for x in self.mask
        )
        picked = take(self.index, which)[:, None, :length, None]
        picked = picked.expand(-1, valid.shape[1], -1, self.t)
        mask = torch.cat([valid.gather(2, picked).flatten(2), text], dim=-1)
        return k, v, mask[:, :, None]

    def _copy(self, place: int, lines: Tensor, row: Tensor) -> Tensor:
        table, rest, flat = self.tables[place], self.rest[place], lines.reshape(-1)
        if self.reuse:
            buffer = self.buffers[place]
            if buffer is None or len(buffer) < len(flat):
                self.buffers[place] = buffer = table.new_empty(len(flat), table.shape[1])
            x = torch.index_select(table, 0, flat, out=buffer[: len(flat)])
        else:
            x = table.index_select(0, flat)
        x = x.view(*lines.shape[:2], -1, self.d)
        if rest is None:
            return x
        rest = rest.expand(len(row), -1, -1, -1) if self.P == 1 else rest.index_select(0, row)
        return torch.cat([x, rest], dim=2)


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


def with_text_lse(
    image: Tensor,
    image_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    keys: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """`with_text_queries` for an output and its log-sum-exp (B, h, N, 1): -> (B, h, L, d) and (B, h, L)."""
    if not layout.joint_text_length:
        return image, image_lse[..., 0]
    mask = None if keys is None else keys[:, None, None]
    text, text_lse = attention_with_lse(q[:, :, layout.text_span], k, v, mask, scale)
    pairs = [(text, image), (text_lse, image_lse[..., 0])]
    out, lse = (torch.cat(pair if layout.text == "prefix" else pair[::-1], dim=2) for pair in pairs)
    return out, lse
