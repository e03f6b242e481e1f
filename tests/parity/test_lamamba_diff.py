"""LaMamba-Diff against the authors' code: the scan, the paths, one SS2D, the network and its modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.models.lamamba_diff import SS2D, LaMambaDiff, merge, scan, scan_paths
from ditkit.models.selective_scan import selective_scan
from golden import cases, compare, load, part, read, record

SYSTEM = "lamamba-diff"
Tensors = dict[str, Tensor]
NAMES = {
    "in_resolution": "input_size",
    "in_chans": "in_channels",
    "dims": "hidden_size",
    "depths": "depth",
    "bottleneck_depth": "middle_depth",
    "ssm_d_state": "ssm_state",
    "sd_unet_decoder_design": "extra_decoder_blocks",
}
FIXED = {"norm_layer": "ln", "downsample_version": "v1", "forward_type": "v2", "skip_concat": False}


def network_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    options = dict(case["constructor"])
    for name, value in FIXED.items():
        assert options.pop(name, value) == value, f"{name} has no other value here"
    if options.get("ssm_dt_rank") == "auto":
        options["ssm_dt_rank"] = None
    if options.pop("unconditional", False):
        options |= {"num_classes": 0, "class_dropout_prob": 1.0}
    model = LaMambaDiff(**{NAMES.get(name, name): value for name, value in options.items()})
    load(SYSTEM, model, part(tensors, "weights"))
    inputs, expected = part(tensors, "inputs"), part(part(tensors, "outputs"), "mid")
    # A stage's output is the authors' after downsampling; ours are the downsampling's and the last block's.
    ours = {name: _place(model, name) for name in expected}
    with record(model, set(ours.values())) as seen:
        out = model(inputs["x"], inputs["t"], inputs.get("y")).sample
    middle = {name: seen[ours[name]] for name in expected}
    middle = {
        name: value.flatten(0, 1) if name.endswith(".attn") else value for name, value in middle.items()
    }
    computed = {"out": out, **{f"mid.{name}": value for name, value in middle.items()}}
    if "outputs.cfg" in tensors:
        guided = model.forward_with_cfg(inputs["x"], inputs["t"], inputs["y"], float(case["cfg_scale"]))
        computed["cfg"] = guided
    return computed


def _place(model: LaMambaDiff, name: str) -> str:
    module: Any = model.get_submodule(name)
    if not hasattr(module, "blocks"):
        return name
    return (
        f"{name}.downsample" if hasattr(module, "downsample") else f"{name}.blocks.{len(module.blocks) - 1}"
    )


def function_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    inputs, expected = part(tensors, "inputs"), part(tensors, "outputs")
    out, last = selective_scan(*(inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")))
    image, ys = inputs["image"], inputs["ys"]
    paths, cross = (scan_paths(*image.shape[2:], continuous) for continuous in (True, False))
    inverse = paths.argsort(dim=1)
    computed = {
        "scan": out,
        "scan_last_state": last,
        "continuous_xs": scan(image, paths),
        "cross_scan_xs": scan(image, cross),
        "continuous_merge": merge(ys.flatten(3), paths),
        "cross_merge": merge(ys.flatten(3), cross),
        "continuous_paths_lr": paths[:2],
        "continuous_paths_tb": paths[2:],
        "continuous_reverse_lr": inverse[:2],
        "continuous_reverse_tb": inverse[2:],
    }
    options = dict(case["ss2d"])
    assert options.pop("forward_type", "v2") == "v2"
    module = SS2D(
        options.pop("d_model"),
        state=options.pop("d_state"),
        ratio=options.pop("ssm_ratio"),
        dt_rank=None if options["dt_rank"] == "auto" else options["dt_rank"],
        conv=options.pop("d_conv"),
        conv_bias=options.pop("conv_bias"),
        continuous=options.pop("continuous_scan"),
    )
    assert set(options) == {"dt_rank"}, f"options that this test does not know: {options}"
    module.load_state_dict(part(tensors, "weights.ss2d"))
    computed["ss2d"] = module(inputs["ss2d_x"])
    return {name: computed[name].reshape(expected[name].shape) for name in expected}


@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    outputs = network_outputs if "constructor" in case else function_outputs
    compare(outputs(case, tensors), part(tensors, "outputs"), atol=1e-5)
