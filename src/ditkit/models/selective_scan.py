"""The selective scan of state-space models in plain PyTorch: linear in time, exact, fast on a CPU.

Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2: `h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l`, `y_l =
C_l h_l + D u_l`. A CPU goes through it in stretches of positions whose states fit its cache, and keeps for the
gradient only the state before each. Elsewhere operators are dear to start: the recurrence runs over about
sqrt(L) positions in all chunks at once, then over the chunks. On CUDA the kernel of `mamba_ssm` is used when
it is installed.

Dimensions: B batch, L positions, M channels, N state size, G groups of channels that share B and C, R = B G
rows of H = M/G channels, T positions of a stretch.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def recurrence(decay: Tensor, inputs: Tensor) -> Tensor:
    """`h_l = decay_l h_{l-1} + inputs_l` from h = 0, along the first axis: both (L, ...) -> (L, ...)."""
    length, shape = len(inputs), inputs.shape
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


def scan_in_chunks(step: Tensor, weighted: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """As `ScanInStretches`, with few operators on large tensors."""
    decay = torch.exp(step.unsqueeze(2) * a)  # (L, R, N, H)
    inputs = b.unsqueeze(3) * weighted.unsqueeze(2)
    states: Tensor = _Recurrence.apply(decay, inputs)  # type: ignore[assignment]
    return (c.unsqueeze(2) @ states).squeeze(2), states[-1]


class ScanInStretches(torch.autograd.Function):
    """The scan position by position, a stretch of positions at a time, so that its temporaries stay in the cache.

    Kept for the gradient are the inputs and the state before each stretch; the states within are computed anew.
    """

    @staticmethod
    def forward(ctx: Any, step: Tensor, weighted: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Any:
        """Steps and weighted inputs (L, R, H), decay rates (R, N, H), b and c (L, R, N): outputs (L, R, H) and the
        last state (R, N, H). R rows, each of one sample and group; H channels of a group."""
        stretch = _stretch(a)
        outputs, state, starts = torch.empty_like(weighted), torch.zeros_like(a), []
        if step.is_meta:  # only shapes matter, and the loop below would take longest
            return outputs, state
        for first in range(0, len(step), stretch):
            part = slice(first, first + stretch)
            starts.append(state)
            states = _states(step[part], weighted[part], a, b[part], state)[1]
            outputs[part] = (c[part].unsqueeze(2) @ states).squeeze(2)
            state = states[-1].clone()
        ctx.save_for_backward(step, weighted, a, b, c, *starts)
        return outputs, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        step, weighted, a, b, c, *starts = ctx.saved_tensors
        of_outputs, of_state = gradients
        of_step, of_weighted, of_a, of_b, of_c = (torch.zeros_like(x) for x in (step, weighted, a, b, c))
        stretch = _stretch(a)
        for start, first in reversed(list(zip(starts, range(0, len(step), stretch), strict=True))):
            part = slice(first, first + stretch)
            decay, states = _states(step[part], weighted[part], a, b[part], start)
            rows = of_outputs[part].unsqueeze(2)  # (T, R, 1, H)
            total = c[part].unsqueeze(3) * rows  # (T, R, N, H), what reaches a state by its own output
            total[-1] += of_state
            each, fading = total.unbind(), decay.unbind()
            for place in range(len(each) - 1, 0, -1):  # and what by the position after it
                each[place - 1].addcmul_(fading[place], each[place])
            of_state = fading[0] * each[0]
            of_c[part] = (rows @ states.transpose(2, 3)).squeeze(2)
            of_b[part] = (weighted[part].unsqueeze(2) @ total.transpose(2, 3)).squeeze(2)
            of_weighted[part] = (b[part].unsqueeze(2) @ total).squeeze(2)
            of_power = total.mul_(decay)  # (T, R, N, H), of the exponent, once the state before is in
            of_power[0] *= start
            of_power[1:] *= states[:-1]
            of_step[part] = (of_power * a).sum(2)
            of_a += (of_power * step[part].unsqueeze(2)).sum(0)
        return of_step, of_weighted, of_a, of_b, of_c


def _stretch(a: Tensor) -> int:
    """Positions whose decays and states, as large as `a` each, fit a core's cache."""
    return max(4, min(64, 2**17 // a.numel()))


def _states(step: Tensor, weighted: Tensor, a: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states (T, R, N, H) of a stretch of T positions that begins from `start` (R, N, H)."""
    decay = torch.exp_(step.unsqueeze(2) * a)
    states = b.unsqueeze(3) * weighted.unsqueeze(2)
    each, fading = states.unbind(), decay.unbind()
    each[0].addcmul_(fading[0], start)
    for place in range(1, len(each)):
        each[place].addcmul_(fading[place], each[place - 1])
    return decay, states


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
    batch, groups = b.shape[:2]
    first = u.permute(2, 0, 1)  # (L, B, M)
    step = F.softplus(delta.permute(2, 0, 1) + delta_bias)
    rows = [x.unflatten(2, (groups, -1)).flatten(1, 2) for x in (step, step * first)]  # (L, R, H)
    rates = a.unflatten(0, (groups, -1)).mT.repeat(batch, 1, 1)  # (R, N, H)
    b, c = (x.permute(3, 0, 1, 2).flatten(1, 2) for x in (b, c))  # (L, R, N)
    scan: Any = ScanInStretches.apply if u.device.type in ("cpu", "meta") else scan_in_chunks
    outputs, last = scan(*rows, rates, b, c)
    outputs = outputs.unflatten(1, (batch, groups)).flatten(2) + first * d  # (L, B, M)
    return outputs.permute(1, 2, 0), last.mT.unflatten(0, (batch, groups)).flatten(1, 2)


def scan_multiply_adds(batch: int, length: int, channels: int, state: int) -> int:
    """Multiply-adds of a scan as its authors count them (state-spaces/mamba issue 110), D included."""
    return 9 * batch * length * channels * state + batch * channels * length
