"""DiCo against the authors' code: network, guidance, every named module; Algorithm 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.models.dico import DiCo, text_depthwise
from golden import cases, compare, load, part, read, record

SYSTEM = "dico"
Tensors = dict[str, Tensor]


def network(case: dict[str, Any], tensors: Tensors) -> Tensors:
    model = load(SYSTEM, DiCo(**case["constructor"]), part(tensors, "weights"))
    inputs, wanted = part(tensors, "inputs"), part(tensors, "outputs.mid")
    with record(model, wanted) as middle:
        out = model(inputs["x"], inputs["t"], inputs["y"]).sample
    computed = {"out": out, **{f"mid.{name}": value for name, value in middle.items()}}
    if "cfg_scale" in inputs:
        scale = inputs["cfg_scale"].item()
        computed["cfg"] = model.forward_with_cfg(inputs["x"], inputs["t"], inputs["y"], scale)
    return computed


def outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    if "constructor" in case:
        return network(case, tensors)
    inputs = part(tensors, "inputs")
    assert set(inputs) == {"x", "context"}, f"this test can't interpret the case {case}"
    return {"out": text_depthwise(inputs["x"], inputs["context"])}


@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    compare(outputs(case, tensors), part(tensors, "outputs"), atol=1e-5)
