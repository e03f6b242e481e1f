"""Prodigy: it finds a step size by itself, and its state survives."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ditkit.training.checkpoint import pack_optimizer, unpack_optimizer
from ditkit.training.prodigy import Prodigy


def quadratic(x: torch.Tensor, far: float) -> torch.Tensor:
    return ((x - far) ** 2 * torch.tensor([1.0, 4.0, 0.25])).sum()


@pytest.mark.parametrize("far", [0.1, 10.0])
def test_it_reaches_a_minimum_at_any_distance(far: float) -> None:
    x = torch.nn.Parameter(torch.zeros(3))
    optimizer = Prodigy([x])
    for _ in range(800):
        optimizer.zero_grad()
        quadratic(x, far).backward()
        optimizer.step()
    assert float((x - far).abs().max()) < 0.05 * far
    assert optimizer.param_groups[0]["d"] > 1e-3 * far


def test_first_steps_by_hand() -> None:
    """One scalar, two steps, by the update rule written out."""
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = Prodigy([x], lr=0.5, betas=(0.9, 0.99), weight_decay=0.1, d0=0.01, eps=1e-8)
    value, d, numerator, s, m, v, start = 1.0, 0.01, 0.0, 0.0, 0.0, 0.0, 1.0
    for step in (1, 2):
        grad = 2 * value
        rate = 0.5 * math.sqrt(1 - 0.99**step) / (1 - 0.9**step)
        numerator = math.sqrt(0.99) * numerator + d / 0.01 * d * rate * grad * (start - value)
        s = math.sqrt(0.99) * s + d / 0.01 * d * grad
        m, v = 0.9 * m + 0.1 * d * grad, 0.99 * v + 0.01 * d * d * grad * grad
        d = max(d, numerator / abs(s))
        value = value * (1 - 0.1 * d * rate) - d * rate * m / (math.sqrt(v) + d * 1e-8)
        optimizer.zero_grad()
        (x**2).sum().backward()
        optimizer.step()
        assert float(x) == pytest.approx(value, rel=1e-5)


def test_state_goes_through_a_checkpoint() -> None:
    def run(optimizer: Prodigy, x: torch.nn.Parameter, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            quadratic(x, 3.0).backward()
            optimizer.step()

    x, y = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    whole, first = Prodigy([x]), Prodigy([y])
    run(whole, x, 20)
    run(first, y, 8)
    tensors, facts = pack_optimizer(first.state_dict())
    second = Prodigy([y])
    second.load_state_dict(unpack_optimizer(tensors, json.loads(json.dumps(facts))))
    run(second, y, 12)
    assert torch.equal(x, y)
