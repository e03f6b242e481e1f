"""One generation of pictures or clips from text, with what the comparisons need of it.

Legend: B pictures or clips, C latent channels, L latent positions, F frames, H height, W width.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

STRIP = 5
"""Frames of a clip that stand for it where a picture is needed."""


LEAST_BINNED = 16
"""The least side of latents at which pipelines have a table of sizes to round to; below they raise."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Args:
        steps: denoising steps, at least 1.
        guidance: guidance scale; None for the pipeline's own default.
        size: height and width in pixels; None for the pipeline's own default.
        seed: picture i of a call starts from the noise of `seed + i`, so that it can be drawn again alone.
        frames: of a clip; None for the pipeline's own default.
        guidance_interval: shares of noise between which guidance acts; None for the pipeline's own default.
    """

    steps: int = 28
    guidance: float | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    frames: int | None = None
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least 1 is needed")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size={self.size}: height and width must be positive")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames={self.frames}: at least 1 is needed")


@dataclass
class Sample:
    """What one generation gave.

    Args:
        latents: the final latents as the loop leaves them, (B, L, C), (B, C, H, W) or (B, C, F, H, W), on the
            CPU; None when the pipeline has no step callback.
        pictures: (B, H, W, 3) in [0, 1]; of a clip, `STRIP` of its frames side by side.
        seconds: wall time of the pipeline call.
        clips: (B, F, H, W, 3) in [0, 1]; None when the pipeline draws pictures.
    """

    latents: torch.Tensor | None
    pictures: np.ndarray
    seconds: float
    clips: np.ndarray | None = None


def sample(
    pipe: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    on_step: Callable[[int], None] | None = None,
    batch: int = 8,
) -> Sample:
    """Draw one picture or clip per prompt.

    Args:
        pipe: a diffusers text-to-image or text-to-video pipeline, or one of ours that draws classes.
        prompts: B texts; names or numbers of classes for the latter.
        on_step: called after each denoising step of each pipeline call with its index.
        batch: at most so many pictures in one pipeline call.

    Raises:
        TypeError: the pipeline takes neither a text prompt nor names of classes.
        ValueError: no prompt, a batch below 1, or no such class.
    """
    if not prompts:
        raise ValueError("no prompt was given")
    if batch < 1:
        raise ValueError(f"batch={batch}: at least 1 is needed")
    parts = [
        _one_call(pipe, prompts[first : first + batch], sampling, first, on_step)
        for first in range(0, len(prompts), batch)
    ]
    latents = [part.latents for part in parts if part.latents is not None]
    clips = [part.clips for part in parts if part.clips is not None]
    return Sample(
        latents=torch.cat(latents) if latents else None,
        pictures=np.concatenate([part.pictures for part in parts]),
        seconds=sum(part.seconds for part in parts),
        clips=np.concatenate(clips) if clips else None,
    )


def _one_call(
    pipe: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    first: int,
    on_step: Callable[[int], None] | None,
) -> Sample:
    arguments = call_arguments(pipe, sampling, len(prompts))
    # The CPU's noise is the same on every machine.
    generators = [torch.Generator("cpu").manual_seed(sampling.seed + first + i) for i in range(len(prompts))]
    last: dict[str, torch.Tensor] = {}

    def after_step(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = tensors["latents"]
        if on_step is not None:
            on_step(index)
        return {}

    def after_old_step(index: int, _: Any, latents: torch.Tensor) -> None:
        after_step(None, index, None, {"latents": latents})

    known = inspect.signature(pipe.__call__).parameters
    if "callback_on_step_end" in known:
        arguments["callback_on_step_end"] = after_step
    elif "callback" in known:  # older pipelines of diffusers, PixArt's among them
        arguments["callback"] = after_old_step
    if "callback_on_step_end_tensor_inputs" in known:
        arguments["callback_on_step_end_tensor_inputs"] = ["latents"]
    arguments["class_labels" if draws_classes(pipe) else "prompt"] = list(prompts)
    _synchronize(pipe)
    started = time.perf_counter()
    output = pipe(generator=generators, output_type="np", **arguments)
    _synchronize(pipe)
    seconds = time.perf_counter() - started
    latents = last["latents"].detach().float().cpu() if last else None
    if "frames" in output:
        clips = np.asarray(output.frames, dtype=np.float32)
        return Sample(latents, strip(clips), seconds, clips)
    pictures = np.asarray(output.images, dtype=np.float32)
    if pictures.shape[-1] == 1:  # grey
        pictures = pictures.repeat(3, axis=-1)
    return Sample(latents, pictures, seconds)


def strip(clips: np.ndarray, count: int = STRIP) -> np.ndarray:
    """Clips (B, F, H, W, 3) as one picture each: `count` frames side by side, (B, H, count W, 3)."""
    chosen = np.linspace(0, clips.shape[1] - 1, count).round().astype(int)
    return np.concatenate([clips[:, i] for i in chosen], axis=2)


def draws_clips(pipe: Any) -> bool:
    """Whether a pipeline's pictures move."""
    return "num_frames" in inspect.signature(pipe.__call__).parameters


def draws_classes(pipe: Any) -> bool:
    """Whether a pipeline is one of ours that draws classes, which `pipe.find` knows by name."""
    return hasattr(pipe, "find") and "class_labels" in inspect.signature(pipe.__call__).parameters


def some_classes(pipe: Any, count: int) -> list[str]:
    """`count` classes of a pipeline that draws them: spread over all, or in turn where there are fewer."""
    known = pipe.classes
    if len(known) <= count:
        return [known[i % len(known)] for i in range(count)]
    return [known[round(i)] for i in np.linspace(0, len(known) - 1, count)]


def call_arguments(pipe: Any, sampling: Sampling, count: int) -> dict[str, Any]:
    """The keyword arguments of `pipe(...)` for these settings and `count` prompts.

    Guidance has two names in diffusers: a distilled model takes `guidance_scale` as an input; an
    undistilled FLUX-type model needs `true_cfg_scale` and an empty negative prompt for the second pass.
    """
    known = inspect.signature(pipe.__call__).parameters
    if "prompt" not in known and not draws_classes(pipe):
        raise TypeError(f"{type(pipe).__name__} takes no text prompt; a text-to-image pipeline is needed")
    arguments: dict[str, Any] = {"num_inference_steps": sampling.steps}
    if sampling.guidance is not None:
        distilled = getattr(getattr(pipe, "transformer", None), "config", {}).get("guidance_embeds", True)
        if "true_cfg_scale" in known and not distilled:
            arguments["true_cfg_scale"] = sampling.guidance
            if sampling.guidance > 1:
                arguments["negative_prompt"] = [""] * count
        else:
            arguments["guidance_scale"] = sampling.guidance
    if sampling.guidance_interval is not None:
        if "guidance_interval" not in known:
            raise TypeError(
                f"{type(pipe).__name__} knows no guidance_interval: it guides at every noise level"
            )
        arguments["guidance_interval"] = sampling.guidance_interval
    default = getattr(known.get("max_sequence_length"), "default", None)
    if isinstance(default, int) and text_length(pipe) < default:
        arguments["max_sequence_length"] = text_length(pipe)  # never shown longer padding
    if sampling.size is not None:
        arguments["height"], arguments["width"] = sampling.size
    if "use_resolution_binning" in known and _latent_side(pipe) < LEAST_BINNED:
        arguments["use_resolution_binning"] = False
    if sampling.frames is not None:
        if "num_frames" not in known:
            raise TypeError(f"{type(pipe).__name__} draws pictures; frames are of a text-to-video pipeline")
        arguments["num_frames"] = sampling.frames
    return arguments


def text_length(pipe: Any) -> int:
    """Tokens that a call pads a text to: the call's own default, or what the tokenizer of the sequence, the
    last one, takes where that is less (a micro-model).

    Raises:
        TypeError: neither is there.
    """
    default = getattr(inspect.signature(pipe.__call__).parameters.get("max_sequence_length"), "default", None)
    tokenizers = (name for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if hasattr(pipe, name))
    tokenizer = getattr(pipe, next(tokenizers, ""), None)  # SD3 may come without its third
    lengths = [length for length in (default, getattr(tokenizer, "model_max_length", None)) if length]
    if not lengths:
        raise TypeError(f"{type(pipe).__name__} has no tokenizer and no max_sequence_length")
    return min(lengths)


def _latent_side(pipe: Any) -> int:
    """Of the latents that a transformer was built for, where it says."""
    side = getattr(getattr(pipe, "transformer", None), "config", {}).get("sample_size")
    return side if isinstance(side, int) else LEAST_BINNED


def _synchronize(pipe: Any) -> None:
    if getattr(pipe, "device", torch.device("cpu")).type == "cuda":
        torch.cuda.synchronize()
