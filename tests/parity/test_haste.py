"""REPA and HASTE against the authors' code: losses and gradients through the network, and their samplers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.models.dit import SiT
from ditkit.models.guidance import guide
from ditkit.processes.transport import Transport
from ditkit.processes.transport_sampling import guided_within, sample_heun, sample_ode, sample_sde
from ditkit.seams.taps import Reading, reading
from ditkit.training.objectives.haste import attention_loss, projection_loss, projector
from golden import cases, compare, part, read

SYSTEM = "haste"
PATHS: dict[str, Any] = {"linear": "linear", "cosine": "gvp"}  # their names and ours
Tensors = dict[str, Tensor]


def network(case: dict[str, Any], weights: Tensors) -> tuple[SiT, list[Any]]:
    """The network and its projectors with the authors' weights; a table of as many rows as classes has no
    null class."""
    options = {k: v for k, v in case["args"].items() if k != "decoder_hidden_size"}
    options["num_classes"] = classes = case.get("num_classes", options.get("num_classes", 1000))
    dropout = 0.1 * (len(weights["y_embedder.embedding_table.weight"]) > classes)
    model = SiT(**options, learn_sigma=False, class_dropout_prob=dropout)
    own = {name: value for name, value in weights.items() if not name.startswith("projectors.")}
    model.load_state_dict(own)
    projectors = []
    for index, teacher_width in enumerate(case["z_dims"]):
        made = projector(options["hidden_size"], case["projector_dim"], teacher_width)
        made.load_state_dict(part(weights, f"projectors.{index}"))
        projectors.append(made)
    return model, projectors


def loss_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    inputs = part(tensors, "inputs")
    model, projectors = network(case, part(tensors, "weights"))
    model.train()
    attends = "teacher_q" in inputs
    layers = (5, 6, 7, 8) if attends else ()
    depth = case["encoder_depth"]
    samples: list[Tensor] = []

    def ours(x: Tensor, t: Tensor) -> Tensor:
        """Their time runs from data to noise, and their velocity with it."""
        torch.testing.assert_close(x, inputs["model_input"], atol=1e-6, rtol=0)
        samples.append(model(x, 1 - t, inputs["labels"]).sample)
        return -samples[0]

    flow = Transport(path=PATHS[case["path"]])
    with reading(model, Reading(frozenset({depth}), frozenset(layers))) as inside:
        losses = flow.training_losses(ours, inputs["images"], inputs["noise"], 1 - inputs["t"])
    projected = [project(inside.hidden[depth]) for project in projectors]
    wanted = [inputs["teacher_tokens"]] if attends else [
        inputs[f"teacher_tokens.{i}"] for i in range(len(projectors))
    ]  # fmt: skip
    losses_of = [projection_loss(p, z) for p, z in zip(projected, wanted, strict=True)]
    projection = torch.stack(losses_of).mean()
    computed = {"sample": samples[0], "denoising_loss": losses["loss"], "proj_loss": projection}
    if not attends:
        return {**computed, **{f"proj_features.{i}": p for i, p in enumerate(projected)}}
    logits = [inside.attention[layer].logits() for layer in layers]
    maps = (inputs["teacher_q"] @ inputs["teacher_k"].transpose(-1, -2)).softmax(-1)
    attention = attention_loss(logits, list(maps)).mean()
    total = losses["loss"].mean() + case["proj_coeff"] * projection + case["attn_coeff"] * attention
    total.backward()
    gradients = {
        "grad_qkv_block5": model.blocks[5].attn.qkv.weight.grad,
        "grad_x_embed": model.x_embedder.proj.weight.grad,
    }
    return {
        **computed,
        **gradients,
        "proj_features": projected[0],
        "attn_loss": attention,
        "attn_logits_block4_first4rows": logits[0][:, :, :4],
        "total": total,
    }


@torch.no_grad()
def sampler_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    """Guidance on all channels, where their time lies in an interval; states in float64."""
    inputs = part(tensors, "inputs")
    model = network(case, part(tensors, "weights"))[0].eval()
    null = torch.full_like(inputs["labels"], case["null_label"])

    def run(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return -model(x.float(), (1 - t).float(), labels).sample.to(x.dtype)

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return run(x, t, inputs["labels"])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return guide(plain(x, t), run(x, t, null), case["cfg_scale"], x.shape[1])[0]

    choose = guided_within(guided, plain, 1 - case["guidance_high"], 1 - case["guidance_low"])

    def chosen(x: Tensor, t: Tensor) -> Tensor:
        return choose(float(t[0]))(x, t)

    flow, start, steps = Transport(), inputs["latents"].double(), case["num_steps"]
    noises = inputs["sde_noise"].double()
    return {
        "euler": sample_ode(flow, chosen, start, method="euler", points=steps + 1)[-1],
        "euler_nocfg": sample_ode(flow, plain, start, method="euler", points=steps + 1)[-1],
        "heun": sample_heun(flow, choose, start, steps=steps),
        "euler_maruyama": sample_sde(flow, chosen, start, points=steps, noises=noises).sample,
    }


@pytest.mark.parametrize("path", cases(SYSTEM))
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    computed = (sampler_outputs if "num_steps" in case else loss_outputs)(case, tensors)
    compare(computed, part(tensors, "outputs"), atol=1e-4)


@pytest.mark.parametrize(("width", "parameters"), [(768, 7_344_896), (1024, 7_869_184), (1152, 8_131_328)])
def test_projectors_have_the_published_size(width: int, parameters: int) -> None:
    with torch.device("meta"):
        made = projector(width, 2048, 768)
    assert sum(p.numel() for p in made.parameters()) == parameters


@pytest.mark.parametrize(
    ("size", "parameters"), [("b", 137_845_008), ("l", 465_955_600), ("xl", 683_242_512)]
)
def test_training_sizes_are_the_published_ones(size: str, parameters: int) -> None:
    """Network and projector, of the authors' SiT without variance channels."""
    from ditkit import models

    with torch.device("meta"):
        model = models.create(f"sit-{size}/2", learn_sigma=False)
        made = projector(model.config["hidden_size"], 2048, 768)
    assert sum(p.numel() for module in (model, made) for p in module.parameters()) == parameters
