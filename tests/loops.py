"""Denoising loops over tiny transformers: a plain one, and one behind a pipeline-like object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tiny_models import Tiny, output

Before = Callable[[int], None]


def velocity(model: nn.Module, tiny: Tiny, arguments: dict[str, Any], sample: Tensor, level: float) -> Tensor:
    """What a transformer predicts for a sample at a noise level of 0 to 1, in the sample's shape."""
    time = torch.full((sample.shape[0],), level * tiny.scale, dtype=sample.dtype)
    predicted = output(model(**{**arguments, "hidden_states": sample, tiny.timestep: time}))
    return predicted[:, : sample.shape[1]] if predicted.shape != sample.shape else predicted


def denoise(
    model: nn.Module,
    tiny: Tiny,
    steps: int = 10,
    batch: int = 1,
    seed: int = 0,
    size: int = 0,
    guidance: str = "none",
    before: Before | None = None,
) -> Tensor:
    """A generation with a bare transformer: Euler steps from level 1 to 0.

    Args:
        guidance: `"none"`; `"sequential"`: a second forward with other conditions in each step; `"batched"`:
            both in one forward.
        before: called with the index before each step; may raise to abort.
    """
    arguments = tiny.inputs(batch, seed, size)
    other = tiny.inputs(batch, seed + 1003, size)
    sample = arguments["hidden_states"]
    with torch.no_grad():
        for index in range(steps):
            if before is not None:
                before(index)
            level = 1 - index / steps
            if guidance == "batched":
                both = join(arguments, other)
                doubled = torch.cat([sample, sample])
                given, free = velocity(model, tiny, both, doubled, level).chunk(2)
                change = free + 2 * (given - free)
            else:
                change = velocity(model, tiny, arguments, sample, level)
                if guidance == "sequential":
                    free = velocity(model, tiny, other, sample, level)
                    change = free + 2 * (change - free)
            sample = sample - 0.3 * change / steps
    return sample


def join(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two sets of arguments as one batch; what has no batch dimension is taken from the first."""
    batch = one["hidden_states"].shape[0]
    shared = ("img_ids", "txt_ids", "image_rotary_emb", "num_frames", "height", "width", "added_cond_kwargs")
    joined = dict(one)
    for name, value in one.items():
        if name in shared:
            continue
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
            joined[name] = torch.cat([value, other[name]])
        elif isinstance(value, list):
            joined[name] = [*value, *other[name]]
    return joined


class Pipe:
    """As much of a diffusers pipeline as `apply` and the step clock look at: parts and a scheduler."""

    def __init__(self, model: nn.Module, tiny: Tiny, scheduler: Any = None, **parts: Any) -> None:
        self.transformer = model
        self.tiny = tiny
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.parts = parts

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler, **self.parts}

    def __call__(
        self,
        steps: int = 10,
        batch: int = 1,
        seed: int = 0,
        size: int = 0,
        guidance: bool = False,
        start: int = 0,
        before: Before | None = None,
    ) -> Tensor:
        """A generation; `start` > 0 begins inside the schedule, as img2img does."""
        arguments = self.tiny.inputs(batch, seed, size)
        other = self.tiny.inputs(batch, seed + 1003, size)
        sample = arguments["hidden_states"]
        self.scheduler.set_timesteps(steps)
        if start:
            self.scheduler.set_begin_index(start)
        with torch.no_grad():
            for index, time in enumerate(self.scheduler.timesteps[start:]):
                if before is not None:
                    before(index)
                level = float(time) / 1000
                change = velocity(self.transformer, self.tiny, arguments, sample, level)
                if guidance:
                    free = velocity(self.transformer, self.tiny, other, sample, level)
                    change = free + 2 * (change - free)
                sample = self.scheduler.step(0.3 * change, time, sample, return_dict=False)[0]
        return sample
