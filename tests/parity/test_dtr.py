"""DTR against the authors' code: masks, the routed network, its losses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit import models
from ditkit.models.dtr import UncertaintyWeighting, min_snr_losses
from ditkit.models.routing import channel_masks
from ditkit.processes import GaussianDiffusion
from golden import cases, compare, load, part, read, record

SYSTEM = "dtr"
Tensors = dict[str, Tensor]


def network(case: dict[str, Any], tensors: Tensors) -> Any:
    options = dict(case["args"])
    routing = {
        "sharing_ratio": options.pop("sharing_ratio", 0.8),
        "num_timesteps": options.pop("taskcount", 1000),
        "alpha": case.get("alpha", 4),
    }
    if options.get("num_classes") == 1:  # unconditional: no label to drop
        options.setdefault("class_dropout_prob", 0.0)
    model = models.create("dtr", routing=routing, **options)
    if case.get("init_method", SYSTEM.upper()) != SYSTEM.upper():  # masks drawn at random are given
        model.channel_routing.masks = tensors["outputs.unit_mapping"].float()
        model.channel_routing.neutral = False
    return load(SYSTEM, model, part(tensors, "weights"))


def network_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    model, inputs = network(case, tensors), part(tensors, "inputs")
    x, t = inputs["x"], inputs["t"]
    y = inputs.get("y", torch.zeros(len(x), dtype=torch.long))
    blocks = {f"blocks.{index}": f"block.{index}" for index in range(len(model.blocks))}
    with record(model, blocks) as seen:
        computed = {"sample": model(x, t, y).sample}
        computed |= {blocks[name]: value for name, value in seen.items()}
    mask = model.channel_routing(t)
    computed["active_mask"] = torch.ones(len(x), 1, model.config["hidden_size"]) if mask is None else mask
    computed["unit_mapping"] = model.channel_routing.masks
    for name in part(tensors, "outputs"):
        if match := re.fullmatch(r"cfg_(\d+)p(\d+)", name):
            half, null = len(x) // 2, model.y_embedder.null_label if model.y_embedder.dropout else 0
            labels = torch.cat([y[:half], torch.full_like(y[:half], null)])
            twice = torch.cat([t[:half], t[:half]])
            computed[name] = model.forward_with_cfg(x, twice, labels, float(f"{match[1]}.{match[2]}"), "all")
    return computed


def mask_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    return {
        f"{index}.mask": channel_masks(steps, width, ratio, alpha)
        for index, (steps, width, ratio, alpha) in enumerate(case["exact"])
    }


def loss_outputs(case: dict[str, Any], tensors: Tensors, path: Path) -> Tensors:
    """The file has no weights of its own: the model is another file's, named in `what`."""
    name = re.search(r"model of (\w+)", case["what"])
    assert name, case
    model, inputs = network(*read(path.with_name(f"{name[1]}.safetensors"))), part(tensors, "inputs")
    computed: Tensors = {}
    x, t, y, noise = (inputs[key] for key in ("x_start", "t", "y", "noise"))
    for wanted in {output.rpartition(".")[0] for output in part(tensors, "outputs")} - {"uw"}:
        schedule, weighting = wanted.split(".")
        process = GaussianDiffusion.create(1000, schedule=schedule)
        losses = process.training_losses(lambda s, time: model(s, time, y).sample, x, t, noise)
        if match := re.fullmatch(r"min_snr_([\d.]+)", weighting):
            losses = min_snr_losses(process, losses, t, float(match[1]))
        computed |= {f"{wanted}.{key}": value for key, value in losses.items()}
    uw = part(inputs, "uw")
    if uw:
        weighting = UncertaintyWeighting(len(uw["loss_scale"]))
        weighting.load_state_dict({"loss_scale": uw["loss_scale"]})
        process = GaussianDiffusion.create(1000, schedule=case.get("uw_schedule", "linear"))
        losses = process.training_losses(
            lambda s, time: model(s, time, uw["y"]).sample, uw["x_start"], uw["t"], uw["noise"]
        )
        computed |= {f"uw.{key}": value for key, value in losses.items()}
        computed["uw.loss"] = weighting(losses["loss"])
    return computed


@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    if "args" in case:
        computed = network_outputs(case, tensors)
    elif "exact" in case:
        computed = mask_outputs(case, tensors)
    else:
        computed = loss_outputs(case, tensors, path)
    compare(computed, part(tensors, "outputs"), atol=1e-5)
