"""DiMR against the authors' code: all stages, their features, targets and loss; the functions alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.models.dimr import DiMR, multi_scale_loss, multi_scale_noise, our_name, time_dependent
from golden import cases, compare, load, part, read

SYSTEM = "dimr"
Tensors = dict[str, Tensor]


def factor(full: int, low: int) -> int:
    return full // low if full % 2 == 0 else (full - 1) // max(low - 1, 1)


def network_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    assert case.get("pe_type", "APE").startswith("APE"), case
    rows = case.get("num_classes")
    model = DiMR(
        stages=case["stage_configs"],
        in_channels=case["channels"],
        num_classes=None if rows is None else rows - 1,  # theirs counts the null class
        norm_type=case["norm_type"],
        loss_coeffs=case["loss_coeffs"],
        block_grad_to_lowres=case["block_grad_to_lowres"],
    )
    load(SYSTEM, model, part(tensors, "weights"))
    inputs, expected = part(tensors, "inputs"), part(tensors, "outputs")
    time = inputs["log_snr"] / 4
    stages = model.predictions(inputs["x"], time, inputs.get("y"))
    computed: Tensors = {}
    for index, (prediction, features) in enumerate(stages):
        computed |= {f"stage{index}": prediction, f"stage{index}_skips_concat": features}
        ratio = factor(inputs["eps"].shape[-1], prediction.shape[-1])
        computed[f"target_stage{index}"] = multi_scale_noise(inputs["eps"], ratio)
    predictions = [prediction for prediction, _ in stages]
    computed["loss_per_sample"] = multi_scale_loss(predictions, inputs["eps"], model.loss_weights)
    for name, value in part(expected, "tdp").items():
        parameter = model.get_submodule(our_name(f"{name}.").removesuffix("."))
        computed[f"tdp.{name}"] = parameter(time)[: len(value)]  # one row where all times are equal
    # What users call, with the authors' time of a whole step, is the same network.
    steps = (time + 1) * model.config["num_timesteps"] / 2 - 1
    called = model(inputs["x"], steps, inputs.get("y"))
    torch.testing.assert_close(called.sample, predictions[-1], atol=1e-4, rtol=1e-4)
    return computed


def function_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    inputs = part(tensors, "inputs")
    names = ("param0", "param1", "weight", "bias", "times")
    computed = {"tdp": time_dependent(*(inputs[name] for name in names))}
    for name in part(tensors, "outputs"):
        if match := re.fullmatch(r"targets_(noscale_)?w(\d+)", name):
            ratio = factor(inputs["eps"].shape[-1], int(match[2]))
            computed[name] = multi_scale_noise(inputs["eps"], ratio, scale_correction=match[1] is None)
    return computed


@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    outputs = network_outputs if "stage_configs" in case else function_outputs
    compare(outputs(case, tensors), part(tensors, "outputs"), atol=1e-5)
