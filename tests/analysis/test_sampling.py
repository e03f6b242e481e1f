from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny_pipelines
from ditkit.analysis.sampling import Sampling, call_arguments, sample


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.flux()


def test_a_picture_per_prompt(pipe) -> None:
    steps: list[int] = []
    drawn = sample(pipe, ["red apple", "blue fish"], Sampling(steps=3), steps.append)
    assert drawn.pictures.shape == (2, 16, 16, 3)
    assert drawn.pictures.min() >= 0
    assert drawn.pictures.max() <= 1
    assert drawn.latents is not None
    assert drawn.latents.shape == (2, 16, 16)
    assert steps == [0, 1, 2]
    assert drawn.seconds > 0


@pytest.mark.parametrize("guidance", [None, 1.0, 3.0])
def test_batches_do_not_matter(pipe, guidance) -> None:
    """A picture is the same whether drawn with others, in smaller batches, or alone with its own seed."""
    prompts = ["red apple", "blue fish", "green rocket"]
    together = sample(pipe, prompts, Sampling(steps=3, guidance=guidance, seed=5))
    split = sample(pipe, prompts, Sampling(steps=3, guidance=guidance, seed=5), batch=2)
    alone = sample(pipe, prompts[2:], Sampling(steps=3, guidance=guidance, seed=7))
    torch.testing.assert_close(together.latents, split.latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.latents[2:], alone.latents, atol=1e-4, rtol=1e-4)


def test_guidance_takes_effect(pipe) -> None:
    prompts = ["red apple"]
    without = sample(pipe, prompts, Sampling(steps=3, guidance=1.0))
    with_it = sample(pipe, prompts, Sampling(steps=3, guidance=4.0))
    assert np.abs(without.pictures - with_it.pictures).max() > 1e-3


def test_names_of_guidance(pipe) -> None:
    asked = Sampling(steps=4, guidance=2.0, size=(16, 32))
    assert call_arguments(pipe, asked, 2) == {
        "num_inference_steps": 4,
        "true_cfg_scale": 2.0,
        "negative_prompt": ["", ""],
        "max_sequence_length": 8,
        "height": 16,
        "width": 32,
    }
    distilled = tiny_pipelines.flux(guidance_embeds=True)
    assert call_arguments(distilled, asked, 2)["guidance_scale"] == 2.0
    assert "true_cfg_scale" not in call_arguments(distilled, asked, 2)
    assert call_arguments(pipe, Sampling(), 1) == {
        "num_inference_steps": 28,
        "max_sequence_length": 8,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps=0"), ({"size": (0, 16)}, r"size=\(0, 16\)")],
)
def test_wrong_settings(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_wrong_calls(pipe) -> None:
    with pytest.raises(ValueError, match="no prompt"):
        sample(pipe, [], Sampling())
    with pytest.raises(ValueError, match="batch=0"):
        sample(pipe, ["red"], Sampling(), batch=0)

    class Labels:
        def __call__(self, class_labels): ...

    with pytest.raises(TypeError, match="Labels takes no text prompt"):
        sample(Labels(), ["red"], Sampling())
