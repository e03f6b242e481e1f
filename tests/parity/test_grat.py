"""Criss-cross group attention against GRAT's authors' code: permutation, mask, a whole attention module."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Call, part, through
from torch import Tensor

from ditkit.methods.grat import GRAT
from ditkit.seams import executors
from ditkit.seams.layout import TokenLayout
from golden import cases, read

TOLERANCE = 1e-5
FILES = cases("grat")


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], TokenLayout, GRAT]:
    case, tensors = read(path)
    text = case.get("text_length", 0)
    grid = (case["frames"], case["height"], case["width"])
    layout = TokenLayout(grid, text, "suffix" if text else "none")
    method = GRAT(pattern="cross", group=(case["group_t"], case["group_h"], case["group_w"]))
    return case, tensors, layout, method


def valid_text(case: dict[str, Any], layout: TokenLayout) -> Tensor:
    """(1, 1, 1, L): the keys that may be read."""
    valid = torch.ones(layout.length, dtype=torch.bool)
    valid[layout.image_length + case.get("attendable_text", layout.text_length) :] = False
    return valid[None, None, None]


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("path", FILES)
def test_permutation_and_mask(path: Path):
    case, tensors, layout, method = load(path)
    plan = method.static_mask(layout, torch.device("cpu"))
    order = plan.tiling.order.flatten()
    assert torch.equal(order, tensors["outputs.permutation"].long())
    x = torch.arange(layout.image_length, dtype=torch.float32)[None, :, None]
    assert torch.equal(plan.tiling.join(plan.tiling.split(x)), x)
    whole = torch.cat([order, torch.arange(layout.image_length, layout.length)])
    allowed = (plan.mask & valid_text(case, layout))[0, 0][whole][:, whole]
    assert torch.equal(allowed, tensors["outputs.mask_reordered"].bool())
    assert method.density(layout.grid, layout.text_length) == pytest.approx(plan.share)


@pytest.mark.parametrize("executor", ["auto", "dense", "gather"])
@pytest.mark.parametrize("path", FILES)
def test_module(path: Path, executor: str):
    """The same module under diffusers' own processor, both kinds of block."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

    case, tensors, layout, method = load(path)
    options = case["attention_kwargs"]
    unknown = set(options) - set(inspect.signature(Attention).parameters)
    assert not unknown, f"{path.name}: diffusers' Attention has no {sorted(unknown)}"
    attention = Attention(**options, processor=HunyuanVideoAttnProcessor2_0()).eval()
    weights = part(tensors, "weights")
    if not any(name.startswith("to_out") for name in weights):
        attention.to_out = None  # single-stream blocks project elsewhere
    attention.load_state_dict(weights)
    strategy = GRAT(pattern="cross", group=method.group, executor=executor).strategy()
    inputs, call = part(tensors, "inputs"), Call()
    rotary = (inputs["rotary_cos"], inputs["rotary_sin"]) if "rotary_cos" in inputs else None
    image, text = inputs["hidden_states"], inputs.get("encoder_hidden_states")
    joined = text is None and layout.text_length > 0  # given as one sequence
    if joined:
        image, text = image.split([layout.image_length, layout.text_length], dim=1)
    with torch.no_grad(), through(strategy, layout, options["heads"], call):
        image, text = attention(
            image,
            encoder_hidden_states=text,
            attention_mask=valid_text(case, layout),
            image_rotary_emb=rotary,
        )
    if joined:
        image = torch.cat([image, text], dim=1)
    assert call.shares == [executors.density(*_lists(method, layout), layout)]
    outputs = part(tensors, "outputs")
    torch.testing.assert_close(image, outputs["hidden_states"], atol=TOLERANCE, rtol=TOLERANCE)
    if "encoder_hidden_states" in outputs:
        torch.testing.assert_close(text, outputs["encoder_hidden_states"], atol=TOLERANCE, rtol=TOLERANCE)


def _lists(method: GRAT, layout: TokenLayout) -> tuple[executors.BlockLists, executors.Tiling]:
    plan = method.static_mask(layout, torch.device("cpu"))
    return plan.lists, plan.tiling
