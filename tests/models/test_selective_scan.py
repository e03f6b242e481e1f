"""The selective scan against the recurrence, its gradient, its lengths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ditkit.models.selective_scan import (
    ScanInStretches,
    _Recurrence,
    recurrence,
    scan_in_chunks,
    scan_multiply_adds,
    selective_scan,
)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 100, 257])
def test_recurrence_at_any_length(length: int) -> None:
    decay, inputs = (
        torch.rand(length, 2, 3, dtype=torch.float64),
        torch.randn(length, 2, 3, dtype=torch.float64),
    )
    states, state = [], torch.zeros(2, 3, dtype=torch.float64)
    for a, b in zip(decay, inputs, strict=True):
        state = a * state + b
        states.append(state)
    torch.testing.assert_close(recurrence(decay, inputs), torch.stack(states), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("length", [1, 6, 13])
def test_gradient(length: int) -> None:
    decay = torch.rand(length, 2, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(length, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Recurrence.apply, (decay, inputs))


def rows(length: int, count: int, state: int, width: int) -> list[torch.Tensor]:
    """Arguments of a scan of `count` rows, float64, to be differentiated."""
    shapes = [(length, count, width)] * 2 + [(count, width), (count, state, width)]
    shapes += [(length, count, state)] * 2 + [(count, width)]
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    values[3] = -values[3].abs()
    return [value.requires_grad_() for value in values]


@pytest.mark.parametrize(("length", "state"), [(1, 2), (5, 1), (6, 3)])
def test_gradient_of_the_scan_in_stretches(length: int, state: int) -> None:
    assert torch.autograd.gradcheck(ScanInStretches.apply, rows(length, 2, state, 3))


@pytest.mark.parametrize("state", [1, 16])
def test_stretches_and_chunks_agree(state: int) -> None:
    arguments = rows(150, 2, state, 40)  # more positions than the longest stretch has
    found = []
    for scan in (ScanInStretches.apply, scan_in_chunks):
        outputs, last = scan(*arguments)
        weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
        gradients = torch.autograd.grad((outputs * weights).sum() + last.square().sum(), arguments)
        found.append((outputs, last, *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("groups", "state"), [(1, 1), (2, 3), (4, 16)])
def test_scan_against_the_loop(groups: int, state: int) -> None:
    batch, channels, length = 2, 8, 37
    u, delta = torch.randn(2, batch, channels, length).unbind(0)
    a, d, bias = -torch.rand(channels, state) * 3, torch.randn(channels), torch.randn(channels)
    b, c = torch.randn(2, batch, groups, state, length).unbind(0)
    step = F.softplus(delta + bias[:, None])
    each_b, each_c = (x.repeat_interleave(channels // groups, dim=1) for x in (b, c))  # (B, M, N, L)
    h, outputs = torch.zeros(batch, channels, state), []
    for i in range(length):
        h = torch.exp(step[:, :, i, None] * a) * h + (step * u)[:, :, i, None] * each_b[..., i]
        outputs.append((h * each_c[..., i]).sum(-1))
    out, last = selective_scan(u, delta, a, b, c, d, bias)
    torch.testing.assert_close(out, torch.stack(outputs, dim=2) + u * d[:, None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, h, atol=1e-5, rtol=1e-5)


def test_half_precision_is_scanned_in_float32() -> None:
    u, delta = torch.randn(2, 1, 4, 9).unbind(0)
    b, c = torch.randn(2, 1, 1, 2, 9).unbind(0)
    arguments = [u, delta, -torch.rand(4, 2), b, c, torch.ones(4), torch.zeros(4)]
    half = [x.bfloat16() for x in arguments]
    assert selective_scan(*half)[0].dtype == torch.float32
    exact = selective_scan(*(x.float() for x in half))
    assert torch.equal(selective_scan(*half)[0], exact[0])


def test_cost_is_linear() -> None:
    costs = [scan_multiply_adds(1, length, 640, 16) for length in (256, 1024, 4096)]
    assert costs[1] / costs[0] == costs[2] / costs[1] == 4
