"""What a run of a comparison costs."""

from __future__ import annotations

from pathlib import Path

import torch

from comparisons import written
from ditkit import models
from ditkit.analysis.compare import runs
from ditkit.analysis.compare.config import load
from ditkit.analysis.meter import count


def test_the_flops_of_a_step_by_hand(tmp_path: Path) -> None:
    """Twice the batch is twice the FLOPs; a backward pass is about twice a forward."""
    file = load(written(tmp_path))
    contender = file.models[0]
    cost = runs.training_cost(file, contender)
    doubled = load(written(tmp_path), ["run.batch_size=16"])
    assert runs.training_cost(doubled, contender).flops_per_step == 2 * cost.flops_per_step
    model = models.create(
        "dit", input_size=8, in_channels=3, num_classes=2, learn_sigma=False, **contender.model
    )
    with count(model) as spent, torch.no_grad():
        model(torch.randn(8, 3, 8, 8), torch.rand(8), torch.zeros(8, dtype=torch.long))
    assert 2.7 * spent.flops < cost.flops_per_step < 3.05 * spent.flops
    assert cost.parameters == sum(p.numel() for p in model.parameters())
