"""DiT-DH against the authors' code: backbone, head, both kinds of guidance. Their clock is 1 for noise and
their velocity points to it; ours is 0, and it points to the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit import models
from ditkit.models.guidance import guide
from golden import cases, compare, load, part, read, record

SYSTEM = "rae"
CONFIG = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio")
USUAL = {"use_qknorm": False, "use_swiglu": True, "use_rmsnorm": True}
Tensors = dict[str, Tensor]


def network(case: dict[str, Any], tensors: Tensors) -> Any:
    arguments = case["args"]
    assert {name: arguments[name] for name in USUAL} == USUAL, arguments
    config = {name: arguments[name] for name in (*CONFIG, "num_classes")}
    more = {"rope": arguments["use_rope"], "position_table": arguments["use_pos_embed"]}
    return load("dit-dh", models.create("dit-dh", **config, **more), part(tensors, "weights"))


def ddt_head(case: dict[str, Any], tensors: Tensors) -> Tensors:
    model, inputs, outputs = network(case, tensors), part(tensors, "inputs"), part(tensors, "outputs")
    x, time, labels = inputs["x"], 1 - inputs["t"], inputs["y"]
    blocks = [name.replace("block.", "blocks.") for name in outputs if name.startswith("block.")]
    with record(model, [*blocks, "s_projector"]) as seen:
        sample = model(x, time, labels).sample
    tokens = model.backbone(x, time, labels)
    null = torch.cat([labels, torch.full_like(labels, model.y_embedder.null_label)])
    scale, weak = case["cfg_scale"], -outputs["weak_sample"]
    cfg = model.forward_with_cfg(x.repeat(2, 1, 1, 1), time.repeat(2), null, scale)
    assert case["cfg_interval"] == [0.0, 1.0]
    return {
        **{name.replace("blocks.", "block."): value for name, value in seen.items() if "block" in name},
        "s": tokens,
        "s_projected": seen["s_projector"],
        "sample": -sample,
        "sample_given_s": -model(0.9 * x, time, labels, backbone_tokens=tokens).sample,
        "cfg": -cfg,
        "autoguidance": -guide(sample, weak, scale, model.in_channels)[0],
        "weak_sample": -weak,
    }


RUN = {"ddt_head": ddt_head}


@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    compare(RUN[case["name"]](case, tensors), part(tensors, "outputs"), atol=1e-5)
