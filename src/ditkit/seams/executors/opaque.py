"""Block lists that depend on the data, under `torch.compile`: one operator that Dynamo does not look into.

How many tiles a query reads then decides which kernels run, which a traced graph can't hold; without the
operator each attention call would break the graph in two.

B batch, h heads, L tokens of the joint sequence, n tiles, d head dim.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from ditkit.seams.executors.blocks import BlockLists, tile_grid
from ditkit.seams.executors.plan import BlockPlan, Executor
from ditkit.seams.layout import TextPlace, TokenLayout


def attend_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    mask: Tensor | None,
    scale: float | None,
    layout: TokenLayout,
    tile: tuple[int, int, int],
    executor: Executor = "auto",
) -> Tensor:
    """`BlockPlan.attend` with the lists of a map (B or 1, h or 1, n, n), as one operator of the graph."""
    sizes = [*layout.grid, *tile]
    return _attend_map(q, k, v, allowed, mask, scale, sizes, layout.text, layout.text_length, executor)


@functools.lru_cache(8)
def _layout(sizes: tuple[int, ...], text: str, text_length: int, device: torch.device) -> Any:
    frames, height, width, *tile = sizes
    layout = TokenLayout((frames, height, width), text_length, cast(TextPlace, text))
    return layout, tile_grid(layout.grid, cast("tuple[int, int, int]", tuple(tile)), device)


@torch.library.custom_op("ditkit::attend_map", mutates_args=())
def _attend_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    mask: Tensor | None,
    scale: float | None,
    sizes: list[int],
    text: str,
    text_length: int,
    executor: str,
) -> Tensor:
    layout, tiling = _layout(tuple(sizes), text, text_length, q.device)
    plan = BlockPlan(BlockLists.from_map(allowed), tiling, layout, cast(Executor, executor))
    return plan.attend(q, k, v, mask, scale).contiguous()


@_attend_map.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, allowed, mask, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, allowed, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, allowed, mask = ctx.saved_tensors
    grads = _attend_map_backward(grad, q, k, v, allowed, mask, *ctx.rest)
    return (*grads, *[None] * 7)


@torch.library.custom_op("ditkit::attend_map_backward", mutates_args=())
def _attend_map_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    mask: Tensor | None,
    scale: float | None,
    sizes: list[int],
    text: str,
    text_length: int,
    executor: str,
) -> tuple[Tensor, Tensor, Tensor]:
    layout, tiling = _layout(tuple(sizes), text, text_length, q.device)
    plan = BlockPlan(BlockLists.from_map(allowed), tiling, layout, cast(Executor, executor))
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = plan.attend(inputs[0], inputs[1], inputs[2], mask, scale)
        dq, dk, dv = torch.autograd.grad(out, inputs, grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attend_map_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_attend_map.register_autograd(_backward, setup_context=_keep)
