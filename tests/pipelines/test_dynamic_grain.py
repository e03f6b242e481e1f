"""The pipeline of two grains: where maps come from, one noise for a coarse region, pictures, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ditkit.models.d2it import D2iT, GrainTransformer
from ditkit.models.d2it_autoencoder import DualGrainAutoencoder
from ditkit.pipelines.class_conditional import ClassConditionalPipeline
from ditkit.pipelines.dynamic_grain import DynamicGrainPipeline
from ditkit.processes import Transport
from ditkit.processes.transport_sampling import sample_ode, sample_sde

MAP = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]])


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def pipeline(scheduler: Any = None, **parts: Any) -> DynamicGrainPipeline:
    torch.manual_seed(0)
    scheduler = scheduler or DDPMScheduler(variance_type="learned_range", clip_sample=False)
    learned = isinstance(scheduler, DDPMScheduler)
    size: Any = dict(hidden_size=16, depth=1, num_heads=2, num_classes=5)
    content = randomised(D2iT(input_size=8, in_channels=3, refine_depth=1, learn_sigma=learned, **size))
    vae = DualGrainAutoencoder(
        ch=4, ch_mult=(1, 2, 2), decoder_ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), z_channels=3,
        scaling_factor=0.5, shift_factor=0.3,
    )  # fmt: skip
    parts = {
        "vae": vae.eval(),
        "grain_transformer": randomised(GrainTransformer(4, **size)),
        "fine_ratio": 0.25,
        **parts,
    }
    pipe = DynamicGrainPipeline(content, scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, labels: Any = (1, 3), seed: int = 0, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": 3, "generator": generator, "output_type": "latent", **options}
    return pipe(labels, **settings)


def alike(latents: Tensor) -> Tensor:
    """Whether the four cells of a region are the same, (B, h, w)."""
    cells = latents.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    return (cells == cells[..., :1]).all(-1).all(1)


SAMPLERS = {
    "ode": lambda network, noise: sample_ode(Transport(), network, noise, method="euler", points=4)[-1],
    "sde": lambda network, noise: sample_sde(Transport(), network, noise, points=4).sample,
}


class TestOneNoise:
    @pytest.mark.parametrize(
        "scheduler",
        [None, DDIMScheduler(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)],
        ids=["ddpm", "ddim", "flow"],
    )
    def test_with_any_scheduler(self, scheduler: Any) -> None:
        pipe, states = pipeline(scheduler), []
        pipe.transformer.register_forward_pre_hook(lambda module, given: states.append(given[0]))
        drawn = draw(pipe, grain=MAP)
        for latents in (drawn.images, *states):
            assert torch.equal(alike(latents), ~MAP.bool().expand(len(latents), -1, -1))
        assert len(states) == 3 and len(states[0]) == 4  # with guidance

    @pytest.mark.parametrize("name", SAMPLERS)
    def test_with_a_sampler(self, name: str) -> None:
        pipe = pipeline(FlowMatchEulerDiscreteScheduler())
        drawn = draw(pipe, grain=MAP, sampler=SAMPLERS[name]).images
        assert torch.equal(alike(drawn), ~MAP.bool().expand(2, -1, -1))

    def test_noise_of_a_step_is_that_of_one_cell(self) -> None:
        """DDPM's steps add a region's noise in full, not a mean over its cells."""
        pipe = pipeline()
        start = torch.zeros(64, 3, 8, 8)
        for layer in (pipe.transformer.final_layer, pipe.transformer.refine_layer):
            layer.linear.weight.data.zero_()
            layer.linear.bias.data.zero_()
        spread = [
            draw(pipe, [0] * 64, grain=grain, latents=start, guidance_scale=1.0).images.std().item()
            for grain in (torch.zeros(4, 4), torch.ones(4, 4))
        ]
        assert spread[0] == pytest.approx(spread[1], rel=0.1)

    def test_fine_everywhere_is_the_ordinary_pipeline(self) -> None:
        pipe = pipeline(vae=None)
        plain = ClassConditionalPipeline(pipe.transformer, pipe.scheduler)
        plain.set_progress_bar_config(disable=True)
        fine = draw(pipe, grain=torch.ones(4, 4)).images
        torch.testing.assert_close(fine, draw(plain).images, atol=1e-5, rtol=1e-5)


class TestMaps:
    def test_given(self) -> None:
        pipe = pipeline()
        one, two = draw(pipe, grain=MAP), draw(pipe, grain=MAP.bool().expand(2, -1, -1))
        assert torch.equal(one.images, two.images) and torch.equal(one.grain, MAP.bool().expand(2, -1, -1))

    def test_drawn_are_the_grain_transformers(self) -> None:
        pipe = pipeline()
        drawn, again, other = draw(pipe), draw(pipe), draw(pipe, seed=1)
        assert torch.equal(drawn.images, again.images) and not torch.equal(drawn.grain, other.grain)
        generator = torch.Generator().manual_seed(0)
        torch.randn(2, 3, 8, 8, generator=generator)  # the noise is drawn first
        expected = pipe.grain_transformer.sample(torch.tensor([1, 3]), generator=generator)
        assert torch.equal(drawn.grain, expected)
        assert torch.equal(draw(pipe, grain=drawn.grain).grain, drawn.grain)
        steps = [draw(pipe, [1] * 8, num_grain_steps=n).grain for n in (1, 16)]
        assert not torch.equal(*steps)

    def test_random_ones_have_the_datas_share(self) -> None:
        pipe = pipeline(grain_transformer=None)
        drawn = draw(pipe, [0] * 64, num_inference_steps=1, grain="random").grain
        assert drawn.float().mean().item() == pytest.approx(0.25, abs=0.05)

    @pytest.mark.parametrize("grain", [None, "random"])
    def test_alone_or_together(self, grain: Any) -> None:
        pipe = pipeline()
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        together = draw(pipe, [0, 4], generator=seeds, grain=grain)
        for index, label in enumerate((0, 4)):
            alone = draw(pipe, label, generator=[torch.Generator().manual_seed(index + 1)], grain=grain)
            assert torch.equal(together.grain[index], alone.grain[0])
            torch.testing.assert_close(together.images[index], alone.images[0], atol=1e-4, rtol=1e-4)

    def test_without_a_class(self) -> None:
        drawn = draw(pipeline(), None)
        assert drawn.images.shape == (1, 3, 8, 8) and drawn.grain.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grain": torch.ones(3, 3)}, r"expected one for each region, \(4, 4\) or \(2, 4, 4\)"),
        ({"grain": torch.ones(3, 4, 4)}, "grain has shape"),
        ({"grain": "noisy"}, "grain='noisy' is unknown"),
        ({"height": 24}, r"draws maps of \(4, 4\) regions"),
        ({"height": 18}, "height=18: expected a multiple of 4"),
        ({"generator": [torch.Generator()] * 3}, "3"),
        ({"guidance_channels": 4}, "can't be guided"),
    ],
)
def test_wrong_arguments_are_explained(options: dict[str, Any], message: str) -> None:
    pipe = pipeline()
    pipe.transformer.register_forward_pre_hook(lambda module, given: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        draw(pipe, **options)


def test_a_share_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"fine_ratio=1\.5"):
        pipeline(fine_ratio=1.5)


def test_pictures_are_the_decoders() -> None:
    pipe = pipeline()
    found = draw(pipe, output_type="pt").images
    latents = draw(pipe).images
    expected = pipe.vae.decode(latents / 0.5 + 0.3).sample
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1))
    wide = draw(pipe, output_type="pt", height=24, width=8, grain=torch.ones(6, 2)).images
    assert wide.shape == (2, 3, 24, 8)
    (images,) = draw(pipe, return_dict=False, output_type="pil")
    assert [image.size for image in images] == [(16, 16)] * 2


@pytest.mark.parametrize("whole", [True, False])
def test_saved_and_loaded(whole: bool, tmp_path: Path) -> None:
    pipe = pipeline(**({} if whole else {"vae": None, "grain_transformer": None}))
    pipe.save_pretrained(tmp_path)
    loaded = DynamicGrainPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config["fine_ratio"] == 0.25
    options: dict[str, Any] = {"output_type": "pt"} if whole else {"grain": "random"}
    mine, theirs = draw(pipe, **options), draw(loaded, **options)
    assert torch.equal(mine.images, theirs.images) and torch.equal(mine.grain, theirs.grain)
