"""Local-window attention against CLEAR's authors' code: masks, the whole model, every attention module."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.methods.clear import LocalWindow
from ditkit.seams.layout import TokenLayout
from golden import cases, read

TOLERANCE = 1e-5
# What a case may hold; a key that is not here changes something this test does not know.
OPTIONS = {"window_size", "down_factor", "proportional_attention", "ntk_factor"}
SIZES = {"height_tokens", "width_tokens", "text_length"}
NOTES = {"what", "seed", "system", "name", "config", "note", "notes"}
FILES = cases("clear")


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def method(case: dict[str, Any], tensors: dict[str, Tensor], **changes: Any) -> LocalWindow:
    weights = {
        key: value for key, value in part(tensors, "weights").items() if key.endswith("spatial_weight")
    }
    options = {
        "radius": case["window_size"],
        "down_factor": case.get("down_factor", 1),
        "proportional_attention": case.get("proportional_attention", False),
        "ntk_factor": case.get("ntk_factor", 1),
        "spatial_weight": weights or None,
    }
    return LocalWindow(**{**options, **changes})


def network(case: dict[str, Any], tensors: dict[str, Tensor]) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**case["config"]).eval()
    missing, unexpected = model.load_state_dict(part(tensors, "weights"), strict=False)
    assert not missing
    assert all(name.endswith(".processor.spatial_weight") for name in unexpected)
    return model


def layout(case: dict[str, Any]) -> TokenLayout:
    return TokenLayout((1, case["height_tokens"], case["width_tokens"]), case["text_length"], "prefix")


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    case, tensors = read(path)
    unknown = set(case) - OPTIONS - SIZES - NOTES
    assert not unknown, f"{path.name}: the case has options this test does not know: {sorted(unknown)}"
    return case, tensors


def outputs(model: torch.nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The model's sample, and what each attention module gave: its image part in the double blocks."""
    taps: list[Tensor] = []
    handles = [
        block.attn.register_forward_hook(
            lambda module, args, out: taps.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in (*model.transformer_blocks, *model.single_transformer_blocks)
    ]
    with torch.no_grad():
        sample = model(**part(tensors, "inputs"))[0]
    for handle in handles:
        handle.remove()
    return sample, taps


def tolerance(case: dict[str, Any], tensors: dict[str, Tensor], model: torch.nn.Module) -> float:
    """`TOLERANCE`, or what this machine's arithmetic alone accounts for.

    The last bit of the timestep's frequencies, exponentials that differ from CPU to CPU, moves the networks'
    outputs by 2e-4. How far diffusers' own model, with nothing of ours, is here from where the authors ran it
    is told by their output with full attention; no more than that last bit is let pass.
    """
    expected = tensors.get("outputs.sample_full_attention")
    if expected is None:
        return TOLERANCE
    distance = min(float((sample - expected).abs().max()) for sample in dense(case, tensors, model))
    assert distance < 2e-4
    return max(TOLERANCE, 2 * distance)


def dense(case: dict[str, Any], tensors: dict[str, Tensor], model: torch.nn.Module) -> list[Tensor]:
    """Full attention. Where the case has options for high resolution, the files leave open whether it was run
    with them: it is one of the two."""
    found = [outputs(model, tensors)[0]]
    if case.get("proportional_attention") or case.get("ntk_factor", 1) != 1:
        with ditkit.apply(model, method(case, tensors, radius=math.inf, down_factor=1, spatial_weight=None)):
            found.append(outputs(model, tensors)[0])
    return found


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("path", FILES)
def test_mask(path: Path):
    case, tensors = load(path)
    options = method(case, tensors)
    expected = tensors["outputs.mask"].bool()
    plan = options.strategy().plan(layout(case), 1, torch.device("cpu"))
    assert torch.equal(plan.allowed, expected)
    assert options.pairs(case["height_tokens"], case["width_tokens"], case["text_length"]) == int(
        expected.sum()
    )


@pytest.mark.parametrize("executor", ["auto", "dense", "gather"])
@pytest.mark.parametrize("path", FILES)
def test_model(path: Path, executor: str):
    case, tensors = load(path)
    model = network(case, tensors)
    allowed = tolerance(case, tensors, model)
    with ditkit.apply(model, method(case, tensors, executor=executor)):
        sample, taps = outputs(model, tensors)
    torch.testing.assert_close(sample, tensors["outputs.sample"], atol=allowed, rtol=TOLERANCE)
    layers = [key for key in tensors if key.startswith("outputs.attn_layer")]
    assert len(layers) == len(taps)
    for layer, tap in enumerate(taps):
        torch.testing.assert_close(tap, tensors[f"outputs.attn_layer{layer}"], atol=allowed, rtol=TOLERANCE)


@pytest.mark.parametrize("path", FILES)
def test_full_attention(path: Path):
    """A window over everything is full attention, on a network that is the authors'."""
    case, tensors = load(path)
    model = network(case, tensors)
    assert tolerance(case, tensors, model) < 4e-4
    plain = outputs(model, tensors)[0]
    with ditkit.apply(model, LocalWindow(radius=math.inf)):
        assert torch.equal(outputs(model, tensors)[0], plain)
