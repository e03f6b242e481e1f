"""The selective scan of state-space models in plain PyTorch: linear in time, exact, fast on a CPU.

Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2: `h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l`, `y_l =
C_l h_l + D u_l`. A CPU goes through it in stretches of positions whose states fit its cache, and keeps for
the gradient only the state before each. Elsewhere operators are dear to start: the recurrence runs over about
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


def scan_in_chunks(
    u: Tensor, delta: Tensor, bias: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """As `ScanInStretches`, with few operators on large tensors."""
    step = F.softplus(delta + bias)
    decay = torch.exp(step.unsqueeze(2) * a)  # (L, R, N, H)
    inputs = b.unsqueeze(3) * (step * u).unsqueeze(2)
    states: Tensor = _Recurrence.apply(decay, inputs)  # type: ignore[assignment]
    return (c.unsqueeze(2) @ states).squeeze(2) + u * d, states[-1]


class ScanInStretches(torch.autograd.Function):
    """The scan position by position, a stretch at a time, so that all temporaries stay in the cache.

    Kept for the gradient are the inputs and the state before each stretch; the rest is computed anew.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, bias: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
    ) -> Any:
        """Inputs and raw steps (L, R, H), their bias (R, H), rates (R, N, H), b and c (L, R, N), d (R, H).

        Returns the outputs (L, R, H) and the last state (R, N, H).
        """
        outputs, state, starts = torch.empty_like(u), torch.zeros_like(a), []
        if u.is_meta:  # only shapes matter, and the loop below would take longest
            return outputs, state
        room = _room(a)
        for part in _stretches(u, a):
            starts.append(state)
            step = F.softplus(delta[part] + bias)
            _, states = _states(step, u[part], a, b[part], state, room)
            torch.addcmul((c[part].unsqueeze(2) @ states).squeeze(2), u[part], d, out=outputs[part])
            state = states[-1].clone()
        ctx.save_for_backward(u, delta, bias, a, b, c, d, *starts)
        return outputs, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        u, delta, bias, a, b, c, d, *starts = ctx.saved_tensors
        of_outputs, of_state = gradients
        of_u, of_delta, of_b, of_c = (torch.empty_like(x) for x in (u, delta, b, c))
        of_bias, of_a, of_d = (torch.zeros_like(x) for x in (bias, a, d))
        room = _room(a)
        for start, part in reversed(list(zip(starts, _stretches(u, a), strict=True))):
            raw = delta[part] + bias
            step, rows, inputs = F.softplus(raw), of_outputs[part], u[part]  # (T, R, H)
            decay, states = _states(step, inputs, a, b[part], start, room)
            total = c[part].unsqueeze(3) * rows.unsqueeze(2)  # (T, R, N, H): what its output gives a state
            total[-1] += of_state
            each, fading = total.unbind(), decay.unbind()
            for place in range(len(each) - 1, 0, -1):  # and what the state after it does
                each[place - 1].addcmul_(fading[place], each[place])
            of_state = fading[0] * each[0]
            of_c[part] = (rows.unsqueeze(2) @ states.mT).squeeze(2)
            of_b[part] = ((step * inputs).unsqueeze(2) @ total.mT).squeeze(2)
            of_weighted = (b[part].unsqueeze(2) @ total).squeeze(2)  # (T, R, H), of step * u
            of_power = total.mul_(decay)  # of the decays' exponents, once the states before are in
            of_power[0] *= start
            of_power[1:] *= states[:-1]
            of_step = torch.linalg.vecdot(of_power, a, dim=2) + of_weighted * inputs
            of_u[part] = of_weighted * step + rows * d
            of_raw = of_step * torch.sigmoid(raw)
            of_delta[part] = of_raw
            of_bias += of_raw.sum(0)
            of_a += (of_power * step.unsqueeze(2)).sum(0)
            of_d += (rows * inputs).sum(0)
        return of_u, of_delta, of_bias, of_a, of_b, of_c, of_d


def _stretch(a: Tensor) -> int:
    """Positions whose decays and states, as large as `a` each, fit a core's cache."""
    return max(4, min(64, 2**17 // a.numel()))


def _stretches(u: Tensor, a: Tensor) -> list[slice]:
    size = _stretch(a)
    return [slice(first, first + size) for first in range(0, len(u), size)]


def _room(a: Tensor) -> Tensor:
    """For the decays and states of one stretch after the other: memory in use is warm, new memory would cost
    more than the arithmetic."""
    return a.new_empty(2, _stretch(a), *a.shape)


def _states(
    step: Tensor, u: Tensor, a: Tensor, b: Tensor, start: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays and states (T, R, N, H) of a stretch of T positions that begins from `start`, in `room`."""
    decay, states = room[:, : len(step)]
    torch.mul(step.unsqueeze(2), a, out=decay).exp_()
    torch.mul(b.unsqueeze(3), (step * u).unsqueeze(2), out=states)
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

    def rows(values: Tensor) -> Tensor:
        """(B, M, L) -> (L, R, H)."""
        return values.permute(2, 0, 1).unflatten(2, (groups, -1)).flatten(1, 2)

    rates = a.unflatten(0, (groups, -1)).mT.repeat(batch, 1, 1)  # (R, N, H)
    d, bias = (x.unflatten(0, (groups, -1)).repeat(batch, 1) for x in (d, delta_bias))  # (R, H)
    b, c = (x.permute(3, 0, 1, 2).flatten(1, 2) for x in (b, c))  # (L, R, N)
    scan: Any = ScanInStretches.apply if u.device.type in ("cpu", "meta") else scan_in_chunks
    outputs, last = scan(rows(u), rows(delta), bias, rates, b, c, d)
    outputs = outputs.unflatten(1, (batch, groups)).flatten(2)  # (L, B, M)
    return outputs.permute(1, 2, 0), last.mT.unflatten(0, (batch, groups)).flatten(1, 2)


def scan_multiply_adds(batch: int, length: int, channels: int, state: int) -> int:
    """Multiply-adds of a scan as its authors count them (state-spaces/mamba issue 110), D included."""
    return 9 * batch * length * channels * state + batch * channels * length
