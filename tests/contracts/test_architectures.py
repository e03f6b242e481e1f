"""Every method of the registry on every architecture of ours, through the pipeline that `generate` uses.

It works, or it is refused with a reason before any work; nothing of it is left either way.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import ditkit
from architectures import CASES
from contracts.test_methods import ACTIVE
from ditkit.pipelines.class_conditional import ClassConditionalPipeline
from ditkit.pipelines.denoising import scheduler_for
from ditkit.registry import Entry, entries
from ditkit.seams.errors import SeamError, UnsupportedModelError
from ditkit.seams.facts.ours import REFUSED

STEPS = 8
OPEN = {"dit", "sit", "dtr", "switch-dit"}
"""They take every method."""


def build(name: str) -> Any:
    if name in CASES:
        return CASES[name].model()
    torch.manual_seed(0)
    from ditkit import models

    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = models.create(name, **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def pipeline(name: str) -> ClassConditionalPipeline:
    model = build(name)
    learned = model.predicted_channels > model.in_channels
    scheduler = scheduler_for("flow" if model.unfit_for("gaussian") else "gaussian", learned, clip=True)
    pipe = ClassConditionalPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: ClassConditionalPipeline, guidance: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn: Any = pipe([1, 3], guidance, num_inference_steps=STEPS, generator=generator, output_type="latent")
    return drawn.images


@pytest.mark.parametrize("name", ["dit", "sit", *CASES])
@pytest.mark.parametrize("entry", entries("method").values(), ids=entries("method").keys())
def test_works_or_is_refused(entry: Entry, name: str) -> None:
    pipe = pipeline(name)
    method = entry.target(**ACTIVE.get(entry.name, {}))
    forwards: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        with ditkit.apply(pipe, method) as run:
            found = draw(pipe)
            steps = run.report().steps
    except (SeamError, UnsupportedModelError) as refusal:
        assert not forwards, f"refused in the middle of a generation: {refusal}"
        cls = type(pipe.transformer).__name__
        assert cls in str(refusal) and len(str(refusal)) > len(cls) + 20, refusal
        assert name not in OPEN, refusal
        # A LiT has blocks to skip; its attention and its tokens are what it can't give.
        assert name != "lit" or {"attention", "tokens"} & set(entry.seam), refusal
        if cls in REFUSED:
            assert REFUSED[cls] in str(refusal)
    else:
        assert type(pipe.transformer).__name__ not in REFUSED
        assert found.isfinite().all() and found.shape == (2, pipe.transformer.in_channels, 8, 8)
        assert steps == STEPS
    finally:
        handle.remove()
    hooked = [key for key, module in pipe.transformer.named_modules() if hasattr(module, "_diffusers_hook")]
    assert not hooked
    assert torch.equal(draw(pipe), draw(pipeline(name)))


def test_flow_scheduler_is_the_one_of_sit() -> None:
    assert isinstance(pipeline("sit").scheduler, FlowMatchEulerDiscreteScheduler)
