"""DyDiT against the authors' code: what is chosen, masked and sliced forwards, the budget's loss, DyFLUX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit import models
from ditkit.models.dydit import budget_loss
from ditkit.models.dydit_flux import DyFluxTransformer2DModel
from ditkit.models.dynamic import Choice, Choosing, binarise, choosing
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


def budget(case: dict[str, Any], masks: Tensors) -> tuple[Tensor, Tensor]:
    """Ratio and loss of the masks of all blocks: heads and groups (B, N, H), tokens (B, N, T, 1)."""
    seen = Choosing()
    for index in range(case["depth"]):
        heads, groups, tokens = (masks[f"{name}_mask"][:, index] for name in ("attn", "mlp", "token"))
        costs = (0, case["attn_gflops"], case["mlp_gflops"])
        seen.made[torch.nn.Identity()] = Choice(*costs, len(heads), heads, groups, tokens)
    ratio = seen.ratio().mean()
    return ratio, 2.0 * budget_loss(ratio, case["target_ratio"])


def loss_outputs(case: dict[str, Any], tensors: Tensors, path: Path, masked: bool) -> Tensors:
    inputs = part(tensors, "inputs")
    names = ("attn_mask", "mlp_mask", "token_mask")
    soft = {name: inputs[name].requires_grad_() for name in names}
    computed: Tensors = {}
    computed["flops_ratio"], computed["flops_loss"] = budget(case, soft)
    found = torch.autograd.grad(computed["flops_loss"], list(soft.values()))
    computed |= {f"grad_{name}": gradient for name, gradient in zip(soft, found, strict=True)}
    hard = {name: inputs[f"hard_{name}"] for name in names}
    computed["hard_flops_ratio"], computed["hard_flops_loss"] = budget(case, hard)

    scores = inputs["gumbel_logits"].requires_grad_()
    noise = inputs["gumbel_g1"] - inputs["gumbel_g2"]
    drawn = binarise(scores, noise, temperature=5.0)
    computed["gumbel_hard"] = drawn
    computed["gumbel_soft"] = torch.sigmoid((scores + noise) / 5.0)
    (computed["gumbel_grad"],) = torch.autograd.grad(drawn, scores, inputs["gumbel_upstream"])
    computed["gumbel_eval"] = binarise(scores)

    model = network(*read(path.with_name("dydit_dit.safetensors")))
    process = GaussianDiffusion.create(1000, schedule="linear", variance="learned_range")
    for prefix, how in (("", {"masked": masked}), ("complete_", {"complete": True})):
        with torch.no_grad(), choosing(model, **how):
            losses = process.training_losses(
                lambda state, t: model(state, t, inputs["y"]).sample,
                inputs["x_start"],
                inputs["t"],
                inputs["noise"],
            )
        computed |= {f"diff.{prefix}{name}": value for name, value in losses.items()}
    return computed


def flux_outputs(case: dict[str, Any], tensors: Tensors, masked: bool) -> Tensors:
    model = DyFluxTransformer2DModel(**case["args"])
    model.load_state_dict(part(tensors, "weights"))
    model.eval()
    inputs = part(tensors, "inputs")
    inputs |= {name: inputs[name][0] for name in ("img_ids", "txt_ids")}  # the same for all samples
    computed: Tensors = {}
    seen: dict[str, Any] = {}
    names = {
        f"{kind}.{index}": block
        for kind, blocks in (
            ("double", model.transformer_blocks),
            ("single", model.single_transformer_blocks),
        )
        for index, block in enumerate(blocks)
    }
    hooks = [
        block.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, output))
        for name, block in names.items()
    ]
    with torch.no_grad(), choosing(model, masked=masked) as chosen:
        computed["sample"] = model(**inputs).sample
    for hook in hooks:
        hook.remove()
    for name, block in names.items():
        text, image = seen[name]
        if name.startswith("double"):
            computed |= {f"{name}.txt": text, f"{name}.img": image}
        else:
            computed[name] = torch.cat([text, image], dim=1)
        tokens = chosen.made[block].tokens
        assert tokens is not None
        computed[f"token_mask.{name}"] = tokens
    return computed


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "sliced"])
@pytest.mark.parametrize("path", cases(SYSTEM))
def test_golden(path: Path, masked: bool) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    if "depth" in case:
        computed = loss_outputs(case, tensors, path, masked)
    elif "num_single_layers" in case["args"]:
        computed = flux_outputs(case, tensors, masked)
    else:
        with torch.no_grad():
            computed = network_outputs(case, tensors, masked)
    compare(computed, part(tensors, "outputs"), atol=1e-5)
