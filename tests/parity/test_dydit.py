"""DyDiT against the authors' code: what is chosen, masked and sliced forwards, the budget's loss, DyFLUX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit import models
from ditkit.models.dydit import inherit
from ditkit.models.dynamic import Choosing, binarise, choosing
from ditkit.processes import GaussianDiffusion
from golden import cases, compare, load, part, read, record

SYSTEM = "dydit"
Tensors = dict[str, Tensor]


def network(case: dict[str, Any], tensors: Tensors) -> Any:
    return load(SYSTEM, models.create(SYSTEM, **case["args"]), part(tensors, "weights"))


def network_outputs(case: dict[str, Any], tensors: Tensors, masked: bool) -> Tensors:
    model, inputs = network(case, tensors), part(tensors, "inputs")
    batch = (inputs["x"], inputs["t"], inputs["y"])
    blocks = {f"blocks.{index}": f"block.{index}" for index in range(len(model.blocks))}
    with choosing(model, masked=masked) as seen, record(model, blocks) as outputs:
        computed = {"sample": model(*batch).sample}
        computed |= {blocks[name]: value for name, value in outputs.items()}
    made = list(seen.made.values())
    for name, field in (("attn_mask", "heads"), ("mlp_mask", "groups"), ("token_mask", "tokens")):
        computed[name] = torch.stack([getattr(choice, field) for choice in made], dim=1)
    with choosing(model, complete=True):
        computed["sample_complete"] = model(*batch).sample
    return computed


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "sliced"])
@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path, masked: bool) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    computed = network_outputs(case, tensors, masked)
    compare(computed, part(tensors, "outputs"), atol=1e-5)
