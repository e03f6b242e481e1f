"""What a pipeline hands to its transformer, found by running it for one step: no pipeline class is named.

B batch, C channels.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.analysis.sampling import Sampling, call_arguments
from ditkit.fitting.errors import FittingError
from ditkit.seams.anatomy import Anatomy, bind, describe
from ditkit.seams.host import inside


def transformer_of(target: Any) -> nn.Module:
    """The transformer of a pipeline, or the module itself.

    Raises:
        FittingError: a pipeline with no transformer or with two.
    """
    if isinstance(target, nn.Module):
        return inside(target)
    parts = getattr(target, "components", {})
    found = [
        part for name, part in parts.items() if name.startswith("transformer") and isinstance(part, nn.Module)
    ]
    if len(found) != 1:
        raise FittingError(
            f"{type(target).__name__} has {len(found)} transformers; fitting needs exactly one"
        )
    return inside(found[0])


class _Seen(Exception):
    """Raised to leave the pipeline once the step was seen."""


@dataclass
class FirstStep:
    """The first forward of a generation and what the pipeline made of it.

    Args:
        arguments: of the transformer's forward by name, without the sample and the timestep.
        timestep: as the transformer gets it.
        divisor: what the scheduler's timestep was divided by: 1, or its number of training steps.
        sign: what the transformer's output was multiplied by on its way to the scheduler, 1 or -1.
        shape: of one sample, without the batch.
    """

    arguments: dict[str, Any]
    timestep: Tensor
    divisor: float
    sign: float
    shape: tuple[int, ...]


def first_step(pipe: Any, prompts: Sequence[str]) -> FirstStep:
    """Run a pipeline without guidance up to its first scheduler step and look.

    Raises:
        FittingError: the pipeline changes the sample or the prediction in a way that this does not know.
    """
    model = transformer_of(pipe)
    anatomy = describe(model)
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["arguments"] = bind(module, args, kwargs)

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        seen["output"] = out if isinstance(out, Tensor) else out[0]

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    generators = [torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))]
    try:
        with torch.no_grad(), _stopping_at_step(pipe, seen), contextlib.suppress(_Seen):
            pipe(prompt=list(prompts), generator=generators, **_unguided(pipe, len(prompts)))
    finally:
        for handle in handles:
            handle.remove()
    if "prediction" not in seen or "arguments" not in seen:
        raise FittingError(f"{type(pipe).__name__} calls no scheduler.step: it can't be fitted")
    return _understood(pipe, anatomy, seen)


def _unguided(pipe: Any, count: int) -> dict[str, Any]:
    arguments = call_arguments(pipe, Sampling(steps=2), count)
    known = inspect.signature(pipe.__call__).parameters
    if "true_cfg_scale" in known:
        arguments["true_cfg_scale"] = 1.0
    elif "guidance_scale" in known and not getattr(transformer_of(pipe).config, "guidance_embeds", False):
        arguments["guidance_scale"] = 1.0
    return arguments


@contextlib.contextmanager
def _stopping_at_step(pipe: Any, seen: dict[str, Any]) -> Iterator[None]:
    scheduler = pipe.scheduler
    signature = inspect.signature(scheduler.step)

    def step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        seen["prediction"], seen["sample"], seen["time"] = (
            bound["model_output"], bound["sample"], float(bound["timestep"]),
        )  # fmt: skip
        raise _Seen

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _understood(pipe: Any, anatomy: Anatomy, seen: dict[str, Any]) -> FirstStep:
    arguments = dict(seen["arguments"])
    sample, timestep = arguments.pop(anatomy.sample), torch.as_tensor(arguments.pop(anatomy.timestep))
    for name in ("self", "return_dict"):
        arguments.pop(name, None)
    name = type(pipe).__name__
    if sample.shape != seen["sample"].shape or not torch.equal(sample, seen["sample"].to(sample.dtype)):
        raise FittingError(
            f"{name} gives its transformer {tuple(sample.shape)}, which is not the sample it denoises, "
            f"{tuple(seen['sample'].shape)}: it scales it or adds a condition, which fitting does not know"
        )
    prediction = seen["prediction"]
    output = first_channels(seen["output"], prediction.shape)
    signs = [sign for sign in (1.0, -1.0) if torch.equal(sign * output.to(prediction.dtype), prediction)]
    if not signs:
        raise FittingError(f"{name} changes its transformer's output before the scheduler's step in a way "
                           "that fitting does not know")  # fmt: skip
    if timestep.ndim > 1:
        raise FittingError(f"{name} gives every token its own timestep, which fitting does not know")
    divisor = seen["time"] / float(timestep.flatten()[0])
    divisor = float(round(divisor)) if abs(divisor - round(divisor)) < 1e-3 * divisor else divisor
    return FirstStep(arguments, timestep, divisor, signs[0], tuple(sample.shape[1:]))


def first_channels(output: Tensor, shape: Sequence[int]) -> Tensor:
    """The prediction in an output that has a variance behind it: (B, 2 C, ...) -> (B, C, ...)."""
    return output[:, : shape[1]] if output.ndim >= 4 and output.shape[1] > shape[1] else output
