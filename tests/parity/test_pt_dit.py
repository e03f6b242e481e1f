"""PT-DiT against the authors' code: the prediction, the positions and every step of the first block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.models.pt_dit import PTDiT, pool_proxies
from ditkit.models.windows import shift_mask
from golden import cases, compare, load, part, read, record

SYSTEM = "pt-dit"
# Arguments of the authors' constructor that mean nothing at inference, or have one released value.
FIXED = {
    "dropout": 0.0,
    "norm_num_groups": 32,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "attention_type": "default",
}


def network(case: dict[str, Any], tensors: dict[str, Tensor]) -> PTDiT:
    options = dict(case["args"])
    for name, value in FIXED.items():
        assert options.pop(name, value) == value, f"{name} has no other value here"
    width = options["num_heads"] * options.pop("head_dim")
    assert options.pop("cross_attention_dim", width) == width
    names = {"sample_size": "input_size", "frame": "num_frames", "num_layers": "depth"}
    model = PTDiT(hidden_size=width, **{names.get(name, name): value for name, value in options.items()})
    weights = part(tensors, "weights")
    table = weights.get("pos_embed.pos_embed")
    load(SYSTEM, model, weights)
    if table is not None:
        side = model.latent_size[0] // model.config["patch_size"]
        ours = model.positions((table.shape[1], side, side)).flatten(2, 3)
        compare({"positions": ours}, {"positions": table}, atol=1e-5)
    return model


@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    model, inputs = network(case, tensors), part(tensors, "inputs")
    block = model.transformer_blocks[0]
    first = {}
    block.register_forward_hook(
        lambda module, arguments, output: first.update(
            input_windows=arguments[0].flatten(0, 1), output_windows=output.flatten(0, 1)
        )
    )
    steps = {
        "proxy_attn1": "proxy_self_attention",
        "pvisual_attn2": "visual_cross_attention",
        "attn1": "window_attention",
        "attn3": "shift_window_attention",
    }
    with record(block, steps) as seen:
        sample = model(
            inputs["hidden_states"],
            inputs["timestep"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            encoder_attention_mask=inputs.get("encoder_attention_mask"),
        ).sample
    expected = part(tensors, "outputs")
    wanted = part(expected, "block0")
    batch = len(inputs["hidden_states"])
    windows = first["input_windows"].unflatten(0, (batch, -1))
    computed = first | {steps[name]: value for name, value in seen.items()}
    computed["proxy_tokens"] = pool_proxies(windows, model.window, model.proxy_sides, model.config["proxy"])
    computed = {name: computed[name].reshape(value.shape) for name, value in wanted.items()}
    patch = model.config["patch_size"]
    frames, height, width = inputs["hidden_states"].shape[2:]
    compare(
        {
            "sample": sample,
            "shift_window_mask": shift_mask(
                (frames, height // patch, width // patch),
                model.window,
                tuple(side // 2 for side in model.window),
            ),
            **{f"block0.{name}": value for name, value in computed.items()},
        },
        expected,
        atol=1e-5,
    )
