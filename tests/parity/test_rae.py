"""DiT-DH against the authors' code: backbone, head, both kinds of guidance. Their clock is 1 for noise and
their velocity points to it; ours is 0, and it points to the data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditkit import models
from ditkit.models.guidance import guide
from ditkit.models.rae import EPS, RepresentationAutoencoder, authors_decoder
from ditkit.models.teachers import Teacher
from ditkit.processes.times import MOST_NOISE, dimension_shift, logit_normal
from ditkit.processes.transport import Transport
from ditkit.processes.transport_sampling import sample_ode
from ditkit.training.tasks.representation_autoencoder import noise_levels
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


def rae_transport(case: dict[str, Any], tensors: Tensors) -> Tensors:
    model = network(
        *read(next(path for (path,) in (p.values for p in cases(SYSTEM)) if path.stem == "ddt_head"))
    )
    inputs, points = part(tensors, "inputs"), case["num_steps"]
    process = Transport(times="logit-normal", shift=case["time_dist_shift"])
    x_t: list[Tensor] = []

    def velocity(state: Tensor, time: Tensor) -> Tensor:
        x_t.append(state)
        return model(state, time, inputs["labels"]).sample

    time = 1 - inputs["t"]
    losses = process.training_losses(velocity, inputs["data"], inputs["noise"], time)
    target = process.plan.velocity(inputs["noise"], inputs["data"], process.plan.time(time, inputs["data"]))
    ends = {"until": MOST_NOISE, "method": "euler", "points": points}
    states = sample_ode(process, velocity, inputs["init"], **ends)
    return {
        "x_t": x_t[0],
        "prediction": -model(x_t[0], time, inputs["labels"]).sample,
        "target": -target,
        "loss": losses["loss"],
        "time_grid": 1 - process.moved(torch.linspace(0, MOST_NOISE, points)),
        "ode_euler_second": states[1],
        "ode_euler_end": states[-1],
        "logitnormal": logit_normal(
            inputs["uniform"],
            case["logitnormal"]["mu"],
            case["logitnormal"]["sigma"],
            case["logitnormal"]["low"],
            case["logitnormal"]["high"],
        ),
    }


class StandIn(nn.Module):
    """A vision transformer that keeps the pixels it is shown and gives the tokens it is told."""

    def __init__(self, tokens: Tensor, patch: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=patch)
        self.tokens, self.pixels = tokens, torch.empty(0)

    def forward(self, pixel_values: Tensor, output_attentions: bool) -> Any:
        self.pixels = pixel_values
        return SimpleNamespace(last_hidden_state=self.tokens)


def rae_decoder(case: dict[str, Any], tensors: Tensors) -> Tensors:
    inputs, grid = part(tensors, "inputs"), case["grid"]
    assert grid == case["latent_grid"] and case["eps"] == EPS
    encoder = {"model_type": "vit", "hidden_size": case["hidden_size"], "num_attention_heads": 2}
    model = RepresentationAutoencoder(
        encoder_config={
            **encoder,
            "num_hidden_layers": 1,
            "intermediate_size": 8,
            "image_size": 16,
            "patch_size": 4,
        },
        image_mean=case["encoder_mean"],
        image_std=case["encoder_std"],
        grid=grid,
        patch_size=case["patch_size"],
        decoder_hidden_size=case["decoder_hidden_size"],
        decoder_num_hidden_layers=case["layers"],
        decoder_num_attention_heads=case["heads"],
        decoder_intermediate_size=case["intermediate"],
    ).eval()
    weights = part(tensors, "weights")
    model.decoder.load_state_dict(authors_decoder(weights))
    torch.testing.assert_close(model.decoder.decoder_pos_embed, weights["decoder_pos_embed"])
    model.latents_mean.copy_(inputs["latent_mean"])
    model.latents_var.copy_(inputs["latent_var"])
    tokens, side = inputs["tokens"], inputs["image"].shape[-1]
    shown = Teacher(StandIn(tokens[:, :1], side), case["encoder_mean"], case["encoder_std"])
    shown(2 * inputs["image"] - 1, (1, 1))
    sigma = noise_levels(inputs["noise_uniform"].flatten(), case["tau"], "uniform")
    return {
        "encoder_input": shown.network.pixels,
        "logits": model.decoder(tokens).logits,
        "noised_tokens": tokens + sigma[:, None, None] * inputs["noise_normal"],
        "encoded_latent": model.normalise(tokens),
        "decoded": (model.decode(inputs["latent"]).sample + 1) / 2,
    }


RUN = {"ddt_head": ddt_head, "rae_transport": rae_transport, "rae_decoder": rae_decoder}


@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    compare(RUN[case["name"]](case, tensors), part(tensors, "outputs"), atol=1e-5)


def test_the_shift_and_the_grid_of_the_paper() -> None:
    process = Transport(shift=dimension_shift(768 * 16 * 16))
    assert process.shift == pytest.approx(6.9282, abs=5e-5)
    assert dimension_shift(768 * 32 * 32) == pytest.approx(13.856, abs=5e-4)
    grid = 1 - process.moved(torch.linspace(0, MOST_NOISE, 50, dtype=torch.float64))
    assert float(grid[0]) == 1 and float(grid[-1]) == pytest.approx(0.0069, abs=5e-5)
