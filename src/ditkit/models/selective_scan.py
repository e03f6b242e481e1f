"""The selective scan of state-space models in plain PyTorch: linear in time, exact, fast on a CPU.

Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2: `h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l`, `y_l =
C_l h_l + D u_l`. The recurrence runs over about sqrt(L) positions in all chunks at once, then over the
chunks; its gradient is the same recurrence backwards. On CUDA the kernel of `mamba_ssm` is used when it is
installed.

Dimensions: B batch, L positions, M channels, N state size, G groups of channels that share B and C.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def recurrence(decay: Tensor, inputs: Tensor) -> Tensor:
    """`h_l = decay_l h_{l-1} + inputs_l` from h = 0, along the first axis: both (L, ...) -> (L, ...)."""
    length, shape = len(inputs), inputs.shape
    if inputs.is_meta:  # only shapes matter, and the loops below would take longest
        return torch.empty_like(inputs)
    chunk = 2 ** math.ceil(math.log2(max(length, 1)) / 2)
    padding = -length % chunk
    if padding:
        decay, inputs = (torch.cat([x, x.new_zeros(padding, *shape[1:])]) for x in (decay, inputs))
    decay = decay.reshape(-1, chunk, math.prod(shape[1:]))  # (chunks, positions in a chunk, all else)
    states = inputs.reshape(decay.shape).clone(memory_format=torch.contiguous_format)
    products = decay.clone(memory_format=torch.contiguous_format)
    for place in range(1, chunk):
        states[:, place].addcmul_(decay[:, place], states[:, place - 1])
        products[:, place].mul_(products[:, place - 1])
    for index in range(1, len(states)):  # what a chunk inherits fades by the product of its decays
        states[index].addcmul_(products[index], states[index - 1, -1])
    return states.reshape(length + padding, *shape[1:])[:length]


class _Recurrence(torch.autograd.Function):
    """`recurrence` with its gradient, which keeps no more than the decays and the states."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, inputs: Tensor) -> Tensor:
        states = recurrence(decay, inputs)
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        decay, states = ctx.saved_tensors
        last = torch.zeros_like(decay[:1])
        backward = torch.cat([decay[1:], last]).flip(0)  # position l receives from l + 1 by its decay
        total = recurrence(backward, gradients[0].flip(0)).flip(0)
        before = torch.cat([last, states[:-1]])
        return total * before, total


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan, in float32 whatever the inputs.

    Args:
        u: inputs, (B, M, L).
        delta: steps before their softplus, (B, M, L).
        a: (M, N), negative.
        b: (B, G, N, L); each group serves M/G consecutive channels.
        c: likewise.
        d: what of the input is added to the output, (M,).
        delta_bias: added to the steps, (M,).

    Returns:
        The outputs (B, M, L) and the last state (B, M, N), float32.
    """
    u, delta, a, b, c, d, delta_bias = (x.float() for x in (u, delta, a, b, c, d, delta_bias))
    if u.is_cuda and importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import (  # pyright: ignore[reportMissingImports]
            selective_scan_fn,
        )

        return selective_scan_fn(
            u, delta, a, b, c, d, None, delta_bias, delta_softplus=True, return_last_state=True
        )
    groups = b.shape[1]
    step = F.softplus(delta + delta_bias[:, None]).permute(2, 0, 1).contiguous()  # (L, B, M)
    first = u.permute(2, 0, 1)  # (L, B, M)
    decay = torch.exp(step.unsqueeze(-1) * a)  # (L, B, M, N)
    split = (step * first).unflatten(2, (groups, -1)).unsqueeze(-1)  # (L, B, G, M/G, 1)
    inputs = (split * b.permute(3, 0, 1, 2).unsqueeze(3)).flatten(2, 3)  # (L, B, M, N)
    states: Tensor = _Recurrence.apply(decay, inputs)  # type: ignore[assignment]
    read = states.unflatten(2, (groups, -1)) * c.permute(3, 0, 1, 2).unsqueeze(3)  # (L, B, G, M/G, N)
    outputs = read.sum(-1).flatten(2) + first * d  # (L, B, M)
    return outputs.permute(1, 2, 0), states[-1]


def scan_multiply_adds(batch: int, length: int, channels: int, state: int) -> int:
    """Multiply-adds of a scan as its authors count them (state-spaces/mamba issue 110), D included."""
    return 9 * batch * length * channels * state + batch * channels * length
