"""What an objective sees of a training step, and where it may act on the loss.

The loss of a batch is the mean over its samples of

    (product of sample weights) x ((product of error weights) x error + bound)

and the sum of the terms, each with its weight. `error` is how far the prediction is off and `bound` what a
learned variance adds; without objectives it is what the process gives, bit for bit. A batch is shared by
processes and accumulation steps: an objective sees some of its rows, all parts have equally many, and the
loss is the mean over the parts. Whatever concerns the whole batch follows from `draws` (`rows`, `batch_size`,
draws that are the same in every part).

What lies inside the network is read when an objective asks for it before the forward (`reads`); the run's
averaged parameters are there in every step.

Dimensions: B samples of the part at hand, C channels, H and W. Samples are (B, C, H, W) where the conditions
are classes; with text they may be clips (B, C, F, H, W) or packed tokens (B, L, C), as the network takes
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ditkit.data.config import Section
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.noising import Process
from ditkit.seams.errors import UnsupportedModelError
from ditkit.seams.taps import Inside, Reading, check, hidden_after
from ditkit.training.order import BatchNoise


def model_folder(name: str) -> Path:
    """The folder at that path, where there are no stages."""
    return Path(name)


def no_pictures() -> Tensor:
    """Where a step has no pictures.

    Raises:
        ValueError: always.
    """
    raise ValueError("this step has no pictures")


def no_network(noisy: Tensor, model_timestep: Tensor) -> Any:
    """Where a step can't run its network on other samples.

    Raises:
        ValueError: always.
    """
    raise ValueError("this step runs its network on no other samples")


@dataclass(frozen=True)
class Setting:
    """What the objectives of a run are built for.

    Args:
        model: the network that is trained.
        process: how samples are noised, and what the network predicts.
        batch_size: of the whole batch.
        facts: what is known of the training beside the network: "process", "classes", ...
        find: the folder of a model that a file names: an earlier stage's export, or a path.
        averages: whether the run keeps an average of the parameters (`ema`).
        pictures: whether the pictures themselves are there (`TrainingStep.pictures`), not their latents only.
        labels: whether the conditions are classes (`TrainingStep.labels`).
        example: runs the model on one sample; None: on its own `example_inputs`.
    """

    model: Any
    process: Process
    batch_size: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    find: Callable[[str], Path] = model_folder
    averages: bool = True
    pictures: bool = True
    labels: bool = True
    example: Callable[[], Any] | None = None


@dataclass(frozen=True)
class TrainingStep:
    """A training step after the network's forward and before the backward.

    Args:
        model: the network, unwrapped.
        process: how samples were noised.
        step: updates made before.
        progress: share of the run done, 0 to below 1.
        clean, noise, noisy: samples, their noise and what the network saw, (B, ...).
        timestep: steps of the process, or times in [0, 1] of a flow, (B,).
        model_timestep: what `network` was given, (B,).
        output: the network's prediction, float32, (B, ...).
        outputs: those of all resolutions, lowest first, of a model that has several; else `output` alone.
        losses: what the process gives, (B,) each: "loss" and its parts.
        draws: random numbers of the batch, and which rows of it these are.
        labels: (B,), before dropping; None where the conditions are no classes.
        dropped: 1 where the label was dropped, (B,); None for a model without null class.
        inside: what the objectives asked to read of the forward.
        pictures: gives the clean pictures in the data's own size, (B, 3, H', W') in [-1, 1]; of clips one for
            each latent frame, the first of those that it covers, (B, 3, F, H', W').
        averaged: gives the run's average of the network's trained parameters by name, as it is before the
            update; empty where the run keeps none.
        again: runs the network once more on the same input, and gives what `losses` holds.
        network: runs the network on samples like `noisy`, at times like `model_timestep`, under the step's
            own conditions.
    """

    model: Any
    process: Process
    step: int
    progress: float
    clean: Tensor
    noise: Tensor
    noisy: Tensor
    timestep: Tensor
    model_timestep: Tensor
    output: Tensor
    outputs: list[Tensor]
    losses: dict[str, Tensor]
    draws: BatchNoise
    labels: Tensor | None = None
    dropped: Tensor | None = None
    inside: Inside = field(default_factory=Inside)
    pictures: Callable[[], Tensor] = no_pictures
    averaged: Callable[[], Mapping[str, Tensor]] = dict
    again: Callable[[], dict[str, Tensor]] = dict
    network: Callable[[Tensor, Tensor], Any] = no_network


class Term(NamedTuple):
    """A loss of its own, a scalar or (B,), logged as it is and added with its weight."""

    value: Tensor
    weight: float = 1.0


class Objective(nn.Module):
    """One change to the loss. What it does not override it leaves alone.

    Its parameters are trained, averaged and checkpointed with the model's, and are not exported. Modules that
    are not trained must be frozen (`requires_grad_(False)`), and are rebuilt at the start.

    Attributes:
        claims: what only one objective may do: "times", "error", "alignment" with a vision transformer.
        without_labels: whether it works without labels and whatever the axes of the samples, so that tasks of
            text, pictures or clips, take it too.
        learning_rate: of its own parameters, without weight decay; None: as the run's.
    """

    Options: type[Section] = Section
    claims: frozenset[str] = frozenset()
    learning_rate: float | None = None
    without_labels: ClassVar[bool] = False

    def __init__(self, options: Any, setting: Setting) -> None:
        """
        Raises:
            ValueError: the model or the process does not allow it; the reason.
        """
        super().__init__()
        self.options = options

    def reads(self, step: int, progress: float) -> Reading:
        """What to read inside the network in the forward after `step` updates; see `TrainingStep.inside`."""
        return Reading()

    def around(self, model: Any, draws: BatchNoise) -> contextlib.AbstractContextManager[Any]:
        """What the forward of the network, `model`, runs in."""
        return contextlib.nullcontext()

    def times(self, uniform: Tensor, draws: BatchNoise) -> Tensor:
        """Where in the schedule the samples lie: uniform numbers (B,) to others in [0, 1); claim "times"."""
        raise NotImplementedError

    def error(self, step: TrainingStep) -> Tensor:
        """The prediction's error in place of the process's, (B,); claim "error"."""
        raise NotImplementedError

    def error_weight(self, step: TrainingStep) -> Tensor | None:
        """What the prediction's error is multiplied with, (B,); the bound is not."""
        return None

    def sample_weight(self, step: TrainingStep) -> Tensor | None:
        """What the whole loss of a sample is multiplied with, (B,)."""
        return None

    def terms(self, step: TrainingStep) -> dict[str, Term]:
        """Losses that are added, by the name under which they are logged."""
        return {}


def gaussian(process: Process) -> GaussianDiffusion:
    """The process, which must be Gaussian with whole timesteps and predict the noise.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(process, GaussianDiffusion):
        raise ValueError("its timesteps are those of Gaussian diffusion; it does not go with process: flow")
    if process.prediction != "epsilon":
        raise ValueError(f"it needs a network that predicts noise; got prediction={process.prediction!r}")
    return process


def readable(model: Any, what: Reading) -> Reading:
    """What is to be read of a model, which must have it.

    Raises:
        ValueError: it has not; the reason.
    """
    try:
        check(model, what)
    except UnsupportedModelError as error:
        raise ValueError(str(error)) from error
    return what


def width_behind(setting: Setting, block: int) -> int:
    """Channels of the tokens behind a block of the network that is trained, counted from 1.

    Raises:
        ValueError: its blocks can't be read, or there is no such block.
    """
    model = setting.model
    readable(model, Reading(frozenset({block})))
    example = setting.example or (lambda: model(**model.example_inputs()))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return hidden_after(model, block, example).shape[-1]
    finally:
        model.train(training)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which computations beside the network stay in float32."""
    return torch.autocast(tensor.device.type, enabled=False)
