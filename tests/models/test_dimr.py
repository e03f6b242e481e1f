"""DiMR: norms, targets, loss, options, what a checkpoint's shapes tell."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from architectures import CASES, DIMR_STAGES, inputs
from ditkit import models
from ditkit.models.dimr import (
    VARIANTS,
    DiMR,
    TimeLayerNorm,
    multi_scale_loss,
    multi_scale_noise,
    rising_guidance,
)
from ditkit.models.layouts import LAYOUTS


def three_stages() -> list[dict[str, Any]]:
    """Grids of 2, 4 and 8; the lowest sees the latent averaged down by 2."""
    low = {**DIMR_STAGES[0], "max_height": 2, "max_width": 2, "image_input_ratio": 2}
    middle = {**DIMR_STAGES[1], "max_height": 4, "max_width": 4, "input_feature_ratio": 2}
    return [low, middle, DIMR_STAGES[1]]


def test_starts_without_time_and_with_open_blocks() -> None:
    model = DiMR(DIMR_STAGES, num_classes=5).eval()
    latent, times, labels = inputs(model)
    assert torch.equal(model(latent, times, labels).sample, model(latent, times * 0, labels).sample)
    assert model(latent, times, labels).sample.abs().max() > 0


def test_time_moves_between_two_values() -> None:
    norm = TimeLayerNorm(4)
    with torch.no_grad():
        norm.weight.param0.fill_(3.0), norm.weight.param1.fill_(1.0), norm.weight.nodecay_weight.fill_(99.0)
    assert norm.weight(torch.tensor([-1.0, 0.0, 1.0]))[:, 0].tolist() == pytest.approx([1.0, 2.0, 3.0])


def test_three_resolutions_and_their_gradients() -> None:
    model = CASES["dimr"].model(stages=three_stages())
    assert model.loss_weights == [1 / 16, 1 / 4, 1]
    output = model(*inputs(model))
    assert [tuple(stage.shape[2:]) for stage in output.stages] == [(2, 2), (4, 4), (8, 8)]
    assert output.sample is output.stages[-1]
    output.stages[-1].square().mean().backward()
    assert model.stage_networks[0].blocks[0].attn.qkv.weight.grad is not None
    stopped = CASES["dimr"].model(stages=three_stages(), block_grad_to_lowres=True)
    stopped(*inputs(stopped)).stages[-1].square().mean().backward()
    assert stopped.stage_networks[0].blocks[0].attn.qkv.weight.grad is None


@pytest.mark.parametrize("norm", ["LN", "RMSN"])
def test_other_norms(norm: str) -> None:
    model = CASES["dimr"].model(norm_type=norm)
    latent, times, labels = inputs(model)
    assert model(latent, times, labels).sample.isfinite().all()


def test_norms_of_the_class_work_in_transformers_only() -> None:
    model = CASES["dimr"].model(norm_type="ADARMSN", stages=DIMR_STAGES[:1])
    assert model(*inputs(model)).sample.isfinite().all()
    both = CASES["dimr"].model(norm_type="ADARMSN")
    with pytest.raises(ValueError, match="transformer stages only"):
        both(*inputs(both))


def test_unconditional_and_normalized() -> None:
    model = CASES["dimr"].model(num_classes=None, normalize_input=True)
    latent, times, _ = inputs(model)
    assert torch.allclose(model(latent, times).sample, model(latent * 3, times).sample, atol=1e-5)
    assert not [name for name in model.state_dict() if "class_embeds" in name]


@pytest.mark.parametrize(("side", "factor"), [(8, 2), (8, 4), (9, 2), (9, 4), (8, 1), (9, 1)])
def test_noise_keeps_its_variance(side: int, factor: int) -> None:
    noise = torch.randn(4000, 1, side, side, generator=torch.Generator().manual_seed(0))
    low = multi_scale_noise(noise, factor)
    odd = side % 2 and factor > 1
    assert low.shape[-1] == ((side - 1) // factor + 1 if odd else side // factor)
    middle = low[..., low.shape[-1] // 2, low.shape[-1] // 2]  # away from the padded border
    assert middle.std().item() == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="brought down by 3"):
        multi_scale_noise(torch.randn(1, 1, 8, 9), 3)


def test_loss_is_zero_for_the_targets() -> None:
    noise = torch.randn(3, 4, 8, 8)
    targets = [multi_scale_noise(noise, factor) for factor in (4, 2, 1)]
    assert multi_scale_loss(targets, noise, (1 / 16, 1 / 4, 1)).tolist() == [0, 0, 0]
    off = [targets[0] + 1, targets[1], targets[2] + 2]
    assert multi_scale_loss(off, noise, (1 / 16, 1 / 4, 1)).tolist() == pytest.approx([1 / 16 + 4] * 3)


def test_guidance_rises_as_noise_falls() -> None:
    scales = rising_guidance(torch.tensor([1000.0, 500.0, 0.0]), 3.0, 1.0)
    assert scales.tolist() == pytest.approx([1.0, 2.0, 3.0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_read_from_shapes(variant: str) -> None:
    with torch.device("meta"):
        state = models.create(f"dimr-{variant}").state_dict()
    settings = LAYOUTS["dimr"].infer(CASES["dimr"].authors(state), {})
    assert settings["num_classes"] == 1000 and settings["norm_type"] == "TDRMSN"
    for found, named in zip(settings["stages"], VARIANTS[variant]["stages"], strict=True):
        assert {key: found[key] for key in named if key != "num_blocks"} == {
            key: value for key, value in named.items() if key != "num_blocks"
        }
        assert found["num_blocks"] == named["num_blocks"] // 2 * 2 + 1


def test_third_resolution_is_near_the_published_size() -> None:
    """525 M; the configuration is inferred."""
    with torch.device("meta"):
        model = models.create("dimr-xl/3r")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(525e6, rel=0.01)
    assert model.latent_size == (64, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "BN"}, "norm_type='BN'"),
        ({"stages": []}, "stages is empty"),
        ({"loss_coeffs": [1.0]}, "one for each of 2"),
        ({"stages": [{**DIMR_STAGES[0], "block_type": "Conv"}]}, "block_type='Conv'"),
        ({"stages": [{**DIMR_STAGES[0], "dropout_prob": 0.1}]}, "only 0 is known"),
        ({"stages": [{**DIMR_STAGES[0], "max_height": 3}, DIMR_STAGES[1]]}, "can't stand above"),
    ],
)
def test_wrong_configurations_are_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiMR(**{"stages": copy.deepcopy(DIMR_STAGES), "num_classes": 5, **change})


def test_too_large_a_latent_is_explained() -> None:
    model = CASES["dimr"].model()
    latent, times, labels = inputs(model, 2, (16, 8))
    with pytest.raises(ValueError, match="a grid of 8x4"):
        model(latent, times, labels)
