"""The training loop of fits: AdamW, exact resume, Ctrl-C between two steps.

Every random number is a function of the seed and the step, so that a fit which was stopped and goes on takes,
on one machine, bit for bit the steps it would have taken.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.fitting.errors import FittingError
from ditkit.fitting.run import PROGRESS, Progress
from ditkit.training import checkpoint
from ditkit.training.order import BatchNoise, SampleOrder, mix

Loss = Callable[[Tensor, BatchNoise], dict[str, Tensor]]
"""(sample indices (B,), random numbers) -> scalars; `"loss"` is minimised."""


@dataclass(frozen=True)
class Settings:
    """Of the loop.

    Args:
        steps: optimizer steps, >= 1.
        batch: samples a step, >= 1.
        optimizer: makes it from the parameters.
        clip: largest norm of the gradient; None: as it comes.
        checkpoint_every: steps between two saved states.
    """

    steps: int
    batch: int
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    seed: int = 0
    clip: float | None = 1.0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise FittingError(f"{name} must be at least 1; got {getattr(self, name)}")


def optimise(
    what: str,
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    count: int,
    settings: Settings,
    folder: Path,
    progress: Progress,
) -> list[dict[str, float]]:
    """Minimise a loss over `count` samples.

    Args:
        what: shown beside the bar.
        parameters: trained in place, by name; the only ones that get gradients.

    Returns:
        What `loss` gave, step by step.

    Raises:
        FittingError: the loss is not finite, or a saved state is of other parameters.
    """
    order = SampleOrder(count, mix(settings.seed, 7))
    optimizer = settings.optimizer(list(parameters.values()))
    states = folder / PROGRESS / "states"
    history = _restore(states, parameters, optimizer, order)
    with deferred_interrupt() as stopped:
        while len(history) < settings.steps:
            step = len(history)
            noise = BatchNoise(
                settings.seed, step, settings.batch, torch.arange(settings.batch), _device(parameters)
            )
            losses = loss(order.take(settings.batch), noise)
            value = float(losses["loss"].detach())
            if not math.isfinite(value):
                raise FittingError(f"{what}: the loss at step {step} is {value}; lower lr")
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
            optimizer.step()
            history.append({name: float(value.detach()) for name, value in losses.items()})
            done = len(history)
            progress(f"{what}, loss {value:.4g}", done, settings.steps)
            if stopped() or done % settings.checkpoint_every == 0 or done == settings.steps:
                _save(states, parameters, optimizer, order, history)
            if stopped():
                raise KeyboardInterrupt
    optimizer.zero_grad(set_to_none=True)
    return history


def _device(parameters: Mapping[str, nn.Parameter]) -> torch.device:
    return next(iter(parameters.values())).device


def _save(
    states: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    order: SampleOrder,
    history: list[dict[str, float]],
) -> None:
    tensors, facts = checkpoint.pack_optimizer(optimizer.state_dict())
    state = {"optimizer": facts, "position": list(order.position), "history": history}
    parts = {"parameters": {name: p.data for name, p in parameters.items()}, "optimizer": tensors}
    checkpoint.write(states, checkpoint.Checkpoint(len(history), parts, state), keep=1)


def _restore(
    states: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    order: SampleOrder,
) -> list[dict[str, float]]:
    saved = checkpoint.newest(states)
    if saved is None:
        return []
    if set(saved.tensors["parameters"]) != set(parameters):
        raise FittingError(f"{states} holds the state of other parameters; choose another folder")
    for name, parameter in parameters.items():
        parameter.data.copy_(saved.tensors["parameters"][name])
    optimizer.load_state_dict(
        checkpoint.unpack_optimizer(saved.tensors["optimizer"], saved.state["optimizer"])
    )
    order.position = tuple(saved.state["position"])
    return list(saved.state["history"])


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C: the body asks for it when it may stop. A second one acts at once.

    Outside the main thread, where signals do not arrive, nothing is held back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Trained:
    """Parameters that take gradients, by name, and their values before."""

    parameters: dict[str, nn.Parameter]
    before: dict[str, Tensor]

    def changed(self) -> dict[str, Tensor]:
        """Those that are not what they were."""
        return {
            name: parameter.detach().clone()
            for name, parameter in self.parameters.items()
            if not torch.equal(parameter, self.before[name])
        }


@contextlib.contextmanager
def trainable(model: nn.Module, names: list[str]) -> Iterator[Trained]:
    """The named parameters take gradients, no others do; afterwards the model is as it was, values too."""
    every = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in every.items()}
    chosen = {name: every[name] for name in names}
    trained = Trained(chosen, {name: parameter.detach().clone() for name, parameter in chosen.items()})
    training = model.training
    try:
        for name, parameter in every.items():
            parameter.requires_grad_(name in chosen)
        yield trained
    finally:
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.copy_(trained.before[name])
                parameter.grad = None
        for name, parameter in every.items():
            parameter.requires_grad_(flags[name])
        model.train(training)
