"""Guidance by another model, and in a part of the noise levels alone, on every architecture of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from architectures import CASES
from ditkit.models.d2it import D2iT
from ditkit.pipelines.class_conditional import AUTOGUIDANCE_SCALE, ClassConditionalPipeline
from ditkit.pipelines.denoising import scheduler_for

STEPS = 3


def pipeline(name: str, seed: int = 0) -> ClassConditionalPipeline:
    model = CASES[name].model(seed)
    learned = model.predicted_channels > model.in_channels
    process = "flow" if model.unfit_for("gaussian") else "gaussian"
    pipe = ClassConditionalPipeline(model, scheduler_for(process, learned, clip=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, scale: float | None, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
    return pipe([1, 3], scale, **settings, **options).images


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_is_guided_by_another_model(name: str, tmp_path: Path) -> None:
    pipe, weak = pipeline(name), pipeline(name, seed=1).transformer
    plain = draw(pipe, 1.0)
    pipe.guide_by(weak)
    assert torch.equal(draw(pipe, 1.0), plain)
    guided = draw(pipe, 2.0)
    assert guided.isfinite().all() and not torch.equal(guided, plain)
    assert torch.equal(draw(pipe, None), draw(pipe, AUTOGUIDANCE_SCALE))
    pipe.guide_by(pipe.transformer)  # itself: nothing to be pushed away from
    torch.testing.assert_close(draw(pipe, 2.0), plain, atol=1e-5, rtol=1e-4)
    pipe.guide_by(weak)
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, 2.0), guided)


def test_the_formula() -> None:
    pipe, weak = pipeline("dit-dh"), pipeline("dit-dh", seed=1).transformer
    pipe.guide_by(weak)
    labels, state, time = torch.tensor([1, 3]), torch.randn(2, 4, 8, 8), torch.full((2,), 0.4)
    network = pipe._network(labels, 1.42, None)
    with torch.no_grad():
        strong, other = (model(state, time, labels).sample for model in (pipe.transformer, weak))
        torch.testing.assert_close(network(state, time), other + 1.42 * (strong - other))


@pytest.mark.parametrize("name", ["dit-dh", "dtr"])
@pytest.mark.parametrize("guiding", [True, False])
def test_guidance_in_an_interval(name: str, guiding: bool) -> None:
    """Both kinds of guidance; by hand: the steps inside the interval guided, those outside not."""
    pipe = pipeline(name)
    if guiding:
        pipe.guide_by(pipeline(name, seed=1).transformer)
    whole, none = draw(pipe, 2.0), draw(pipe, 1.0)
    assert torch.equal(draw(pipe, 2.0, guidance_interval=(0.0, 1.0)), whole)
    assert torch.equal(draw(pipe, 2.0, guidance_interval=(0.999999, 0.9999999)), none)
    calls: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    late = draw(pipe, 2.0, guidance_interval=(0.0, 0.5))
    handle.remove()
    assert not torch.equal(late, whole) and not torch.equal(late, none)
    if not guiding:  # a guided step runs labels and null labels
        assert calls[0] == 2 and calls[-1] == 4
    with pytest.raises(ValueError, match=r"guidance_interval=\(0.5, 0.2\)"):
        draw(pipe, 2.0, guidance_interval=(0.5, 0.2))


def test_models_of_other_samples_are_refused() -> None:
    pipe = pipeline("dit-dh")
    for config, words in (
        ({"in_channels": 3}, "of 3 channels can't guide a DiTDH of 4"),
        ({"num_classes": 7}, "of 7 classes can't guide a DiTDH of 5"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.guide_by(CASES["dit-dh"].model(**config))
    pipe.guide_by(CASES["dtr"].model())
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler does not fit a DiT"):
        draw(pipe, 2.0)


def test_without_labels_a_model_still_guides() -> None:
    pipe = pipeline("dit-dh")
    options = {"num_inference_steps": STEPS, "output_type": "latent", "latents": torch.randn(1, 4, 8, 8)}
    plain = pipe(None, 2.0, **options).images
    pipe.guide_by(pipeline("dit-dh", seed=1).transformer)
    assert not torch.equal(pipe(None, 2.0, **options).images, plain)
    assert torch.equal(pipe(None, 1.0, **options).images, plain)


def test_maps_of_grains_guide_too() -> None:
    from ditkit.pipelines.dynamic_grain import DynamicGrainPipeline

    models: list[D2iT] = [CASES["d2it"].model(seed) for seed in (0, 1)]
    pipe = DynamicGrainPipeline(
        models[0], scheduler_for("gaussian", True, clip=False), guiding_transformer=models[1]
    )
    pipe.set_progress_bar_config(disable=True)
    grain = torch.eye(4)
    assert not torch.equal(draw(pipe, 2.0, grain=grain), draw(pipe, 1.0, grain=grain))
