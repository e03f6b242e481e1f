"""The class-conditional pipeline: the authors' loops by diffusers' schedulers, labels, sizes, pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from ditkit import models
from ditkit.models.dit import DiT, SiT
from ditkit.pipelines.class_conditional import ClassConditionalPipeline
from ditkit.processes import GaussianDiffusion, Transport
from ditkit.processes.gaussian_sampling import trajectory
from ditkit.processes.transport_sampling import sample_ode

BETAS = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def model(cls: type[DiT] = DiT, **config: Any) -> DiT:
    torch.manual_seed(0)
    defaults = dict(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=5)
    built = cls(**{**defaults, **config}).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return built


def ddpm(**config: Any) -> DDPMScheduler:
    return DDPMScheduler(
        **{**BETAS, "variance_type": "learned_range", "timestep_spacing": "linspace", **config}
    )


def pipeline(transformer: DiT, scheduler: Any = None, vae: Any = None) -> ClassConditionalPipeline:
    flow = isinstance(transformer, SiT)
    scheduler = scheduler or (FlowMatchEulerDiscreteScheduler() if flow else ddpm())
    pipe = ClassConditionalPipeline(transformer, scheduler, vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: ClassConditionalPipeline, labels: Any = (1, 3), seed: int = 0, **options: Any) -> Tensor:
    options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(seed), **options}
    return pipe(labels, output_type="latent", **options).images


def start(batch: int = 2, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("channels", [3, "all"])
def test_ddpm_scheduler_gives_the_authors_loop(channels: Any) -> None:
    """Same guided network, schedule, learned variance and noise: the same trajectory."""
    network, steps = model(), 20
    generator = torch.Generator().manual_seed(4)
    noises = [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(steps)]
    pairs = torch.tensor([1, 3, 5, 5])
    states = trajectory(
        GaussianDiffusion.create(1000, str(steps)),
        lambda x, t: network.forward_with_cfg(x, t, pairs, 3.0, channels),
        start().repeat(2, 1, 1, 1),
        noises=[noise.repeat(2, 1, 1, 1) for noise in noises],
    )
    seen: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"])
        return {}

    latents(
        pipeline(network),
        latents=start(),
        seed=4,
        guidance_scale=3.0,
        guidance_channels=channels,
        num_inference_steps=steps,
        callback_on_step_end=keep,
    )
    assert len(seen) == steps
    for found, expected in zip(seen, states, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected[:2], atol=1e-4 * scale, rtol=0)


def test_flow_scheduler_gives_the_authors_euler() -> None:
    network, pairs = model(SiT), torch.tensor([1, 3, 5, 5])
    points = sample_ode(
        Transport(),
        lambda x, t: network.forward_with_cfg(x, t, pairs, 2.0),
        start().repeat(2, 1, 1, 1),
        method="euler",
        points=11,
    )
    found = latents(pipeline(network), latents=start(), guidance_scale=2.0, num_inference_steps=10)
    torch.testing.assert_close(found, points[-1, :2], atol=1e-4, rtol=1e-4)


def test_a_function_as_sampler() -> None:
    network = model(SiT)
    found = latents(
        pipeline(network),
        latents=start(),
        guidance_scale=1.0,
        sampler=lambda predict, noise: sample_ode(Transport(), predict, noise, points=2)[-1],
    )
    labels = torch.tensor([1, 3])
    expected = sample_ode(Transport(), lambda x, t: network(x, t, labels).sample, start(), points=2)[-1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(**BETAS), DPMSolverMultistepScheduler(), ddpm(variance_type="fixed_small")]
)
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_other_schedulers_use_the_prediction_only(scheduler: Any, learn_sigma: bool) -> None:
    found = latents(pipeline(model(learn_sigma=learn_sigma), scheduler))
    assert found.shape == (2, 4, 8, 8) and found.isfinite().all()


class TestLabels:
    @pytest.mark.parametrize("cls", [DiT, SiT])
    def test_alone_or_together(self, cls: type[DiT]) -> None:
        pipe = pipeline(model(cls))
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
        together = latents(pipe, [0, 4, 4], generator=generators)
        for index, label in enumerate((0, 4, 4)):
            alone = latents(pipe, label, generator=[torch.Generator().manual_seed(index + 1)])
            torch.testing.assert_close(together[index], alone[0], atol=1e-4, rtol=1e-4)
        assert not torch.equal(together[1], together[2])

    def test_pictures_of_each(self) -> None:
        calls: list[list[int]] = []
        network = model()
        network.y_embedder.register_forward_pre_hook(lambda module, given: calls.append(given[0].tolist()))
        found = latents(pipeline(network), [3, 1], num_images_per_label=2, num_inference_steps=1)
        assert found.shape[0] == 4
        assert calls == [[3, 3, 1, 1, 5, 5, 5, 5]]

    def test_no_guidance_costs_half_and_none_is_no_class(self) -> None:
        batches: list[int] = []
        network = model()
        network.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
        plain = latents(pipeline(network), [1], guidance_scale=1.0, num_inference_steps=1)
        without = latents(pipeline(network), None, guidance_scale=4.0, num_inference_steps=1)
        assert batches == [1, 1]
        null = latents(pipeline(network), [5], guidance_scale=1.0, num_inference_steps=1)
        assert torch.equal(without, null) and not torch.equal(plain, null)

    def test_model_without_null_class(self) -> None:
        pipe = pipeline(model(class_dropout_prob=0.0))
        assert latents(pipe, [4], guidance_scale=1.0).shape == (1, 4, 8, 8)
        for labels, scale in (([4], 2.0), (None, 1.0)):
            with pytest.raises(ValueError, match="no null class"):
                latents(pipe, labels, guidance_scale=scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [6]}, "classes are 0 to 4"),
        ({"labels": -1}, "classes are 0 to 4"),
        ({"labels": []}, "whole numbers"),
        ({"labels": torch.ones(2)}, "whole numbers"),
        ({"height": 9}, "height=9: expected a multiple of 2"),
        ({"guidance_channels": 5}, "can't be guided"),
        ({"num_images_per_label": 0}, "num_images_per_label=0"),
        ({"latents": torch.zeros(3, 4, 8, 8)}, r"expected \(2, 4, H, W\)"),
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"output_type": "pil"}, "give the pipeline a vae"),
    ],
)
def test_wrong_arguments_are_explained(options: dict[str, Any], message: str) -> None:
    network = model()
    network.register_forward_pre_hook(lambda module, given: pytest.fail("work was done"))
    arguments = {"labels": [0, 1], "output_type": "latent", **options}
    with pytest.raises(ValueError, match=message):
        pipeline(network)(arguments.pop("labels"), **arguments)


def test_wrong_schedulers_are_explained() -> None:
    for transformer, scheduler, message in (
        (model(), FlowMatchEulerDiscreteScheduler(), "does not fit a DiT"),
        (model(SiT), ddpm(), "does not fit a SiT"),
        (model(learn_sigma=False), ddpm(), "learn_sigma=True"),
    ):
        with pytest.raises(ValueError, match=message):
            latents(pipeline(transformer, scheduler))
    flow = latents(pipeline(model(learn_sigma=False), FlowMatchEulerDiscreteScheduler()), latents=start())
    assert torch.equal(flow, latents(pipeline(model(SiT, learn_sigma=False)), latents=start()))


class TestPictures:
    def test_pixels(self) -> None:
        pipe = pipeline(model(SiT, in_channels=1))
        pictures = pipe([0, 1], num_inference_steps=2).images
        assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]
        array = pipe([0], num_inference_steps=2, height=4, width=10, output_type="np").images
        assert array.shape == (1, 4, 10, 1) and 0 <= array.min() <= array.max() <= 1
        assert pipe([0], num_inference_steps=2, output_type="pt", return_dict=False)[0].shape == (1, 1, 8, 8)

    def test_through_a_vae(self) -> None:
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
        ).eval()
        pipe = pipeline(model(), vae=vae)
        found = pipe(
            [0], num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt"
        ).images
        assert found.shape == (1, 3, 16, 16)
        decoded = vae.decode(
            latents(pipe, [0], seed=1, num_inference_steps=2) / vae.config["scaling_factor"]
        ).sample
        torch.testing.assert_close(found, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
        assert pipe([0], num_inference_steps=1, height=24, width=8, output_type="pt").images.shape == (
            1,
            3,
            24,
            8,
        )
        with pytest.raises(ValueError, match="width=10: expected a multiple of 4"):
            pipe([0], width=10)


@pytest.mark.parametrize("cls", [DiT, SiT])
def test_saved_and_loaded(cls: type[DiT], tmp_path: Path) -> None:
    pipe = pipeline(model(cls))
    pipe.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is cls and type(loaded.scheduler) is type(pipe.scheduler)
    assert torch.equal(latents(loaded), latents(pipe))


@pytest.mark.parametrize("way", ["load(folder)", "ClassConditionalPipeline.from_pretrained(folder)"])
def test_any_architecture_is_loaded_where_nothing_is_imported_yet(way: str, tmp_path: Path) -> None:
    dico = models.create("dico", input_size=8, in_channels=3, hidden_size=16, depth=(1, 1, 1, 1, 1))
    pipeline(dico).save_pretrained(tmp_path)
    code = (
        "import sys; from ditkit import load; folder = sys.argv[1]\n"
        "from ditkit.pipelines.class_conditional import ClassConditionalPipeline\n"
        f"print(type({way}.transformer).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "DiCo", done.stderr
