"""Optimizer state that was saved and loaded goes on as if it had never been."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ditkit.training import checkpoint, optimizers
from ditkit.training.config import OptimizerConfig


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_loaded_state_fits_weights_in_any_layout(kind) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 8))
    whole = whole.to(memory_format=torch.channels_last)
    data = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)

    def step(model: nn.Module, used: list[torch.optim.Optimizer]) -> None:
        model(data).square().mean().backward()
        for one in used:
            one.step()
            one.zero_grad()

    config = OptimizerConfig(kind=kind, lr=1e-2)
    used = optimizers.create(config, whole)
    step(whole, used)
    broken = copy.deepcopy(whole)
    again = optimizers.create(config, broken)
    for old, new in zip(used, again, strict=True):
        # As a file gives it back: contiguous, whatever it was.
        tensors, facts = checkpoint.pack_optimizer(old.state_dict())
        tensors = {
            name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        new.load_state_dict(checkpoint.unpack_optimizer(tensors, facts))
        optimizers.lay_out_alike(new)
    for _ in range(2):
        step(whole, used)
        step(broken, again)
    for one, other in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(one, other)
