"""The state of a run: all of it goes into a checkpoint and comes back out of one.

It is the trained parameters, their average, the optimizers, the random state, the position in the data and
how many updates were made. Whatever the file and the data determine is rebuilt at the start instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from ditkit.training import checkpoint as ckpt
from ditkit.training import optimizers, sharding
from ditkit.training.average import WeightAverage
from ditkit.training.config import RunConfig
from ditkit.training.order import SampleOrder


class TrainingError(RuntimeError):
    """Training can't go on; what was saved is kept."""


@dataclass
class RunState:
    """What changes while a run trains.

    Args:
        parameters: what is trained, by name.
        optimizers: each with some of them.
        average: of all of them, in their order; None where the run keeps none.
        order: of the samples.
        step: updates made.
        skipped: steps in a row whose gradient was too long.
    """

    parameters: dict[str, nn.Parameter]
    optimizers: list[Any]
    average: WeightAverage | None
    order: SampleOrder
    step: int = 0
    skipped: int = 0


def save(state: RunState, run: RunConfig, folder: Path, accelerator: Accelerator) -> None:
    """Write a checkpoint under `folder` (main process; all have to come); see `ditkit.training.checkpoint`.

    Raises:
        TrainingError: a parameter is not finite, or the disk takes no more.
    """
    accelerator.wait_for_everyone()
    checkpoint = _pack(state, run, folder, accelerator.is_main_process)
    if accelerator.is_main_process:
        with writing(f"{run.name}: the checkpoint of step {state.step}", folder):
            ckpt.write(folder, checkpoint, run.keep_checkpoints)
    accelerator.wait_for_everyone()


def _pack(state: RunState, run: RunConfig, folder: Path, here: bool) -> ckpt.Checkpoint:
    """The state as files hold it, whole where it is wanted `here`."""
    weights = sharding.gather({name: p.data for name, p in state.parameters.items()}, here)
    if broken := [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]:
        raise TrainingError(
            f"{run.name}: after step {state.step}, {broken[0]} and {len(broken) - 1} more parameters "
            f"are not finite; they are not saved. {kept(folder)}"
        )
    tensors = {"model": weights, "rng": {"torch": torch.get_rng_state()}}
    facts: dict[str, Any] = {
        "optimizers": [],
        "data_position": list(state.order.position),
        "skipped": state.skipped,
    }
    for index, optimizer in enumerate(state.optimizers):
        packed, settings = ckpt.pack_optimizer(optimizer.state_dict())
        tensors[f"optimizer-{index}"] = sharding.gather(packed, here)
        facts["optimizers"].append(settings)
    if state.average:
        facts["ema"] = state.average.state_dict()
        shadow = facts["ema"].pop("shadow_params")
        tensors["ema"] = sharding.gather(dict(zip(state.parameters, shadow, strict=True)), here)
    return ckpt.Checkpoint(state.step, tensors, facts)


def restore(state: RunState, run: RunConfig, folder: Path, device: torch.device) -> bool:
    """Go back to the newest intact checkpoint under `folder`; False where there is none.

    Raises:
        DamagedError: there are checkpoints and none is intact.
        TrainingError: the checkpoint is of a run with other settings.
    """
    saved = ckpt.newest(folder)
    if saved is None:
        return False
    _check(saved, state, run, folder)
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.copy_(sharding.part_like(saved.tensors["model"][name], parameter))
    for index, (optimizer, facts) in enumerate(zip(state.optimizers, saved.state["optimizers"], strict=True)):
        loaded = ckpt.unpack_optimizer(saved.tensors[f"optimizer-{index}"], facts)
        optimizers.share_out(loaded, optimizer)
        optimizer.load_state_dict(loaded)
        optimizers.lay_out_alike(optimizer)
    if state.average:
        shadow = [
            sharding.part_like(saved.tensors["ema"][name].to(device), parameter)
            for name, parameter in state.parameters.items()
        ]
        state.average.load_state_dict({**saved.state["ema"], "shadow_params": shadow})
    torch.set_rng_state(saved.tensors["rng"]["torch"])
    state.order.position = tuple(saved.state["data_position"])
    state.step, state.skipped = saved.step, saved.state.get("skipped", 0)
    return True


def _check(saved: ckpt.Checkpoint, state: RunState, run: RunConfig, folder: Path) -> None:
    """Refuse a checkpoint that does not hold this state."""
    if set(saved.tensors.get("model", state.parameters)) != set(state.parameters):
        raise TrainingError(
            f"{run.name}: the checkpoint in {folder.parent} is of another model, or of objectives "
            "with other parameters; choose another output"
        )
    average = ["ema"] if state.average else []
    tensors = {"model", "rng", *average, *(f"optimizer-{index}" for index in range(len(state.optimizers)))}
    facts = {"optimizers", "data_position", *average}
    if missing := sorted({*(tensors - set(saved.tensors)), *(facts - set(saved.state))}):
        raise TrainingError(
            f"{run.name}: the checkpoint in {folder.parent} has no {' and no '.join(missing)}: the "
            "run had other settings; choose another output"
        )


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Say `what` it was that a full disk did not take, and what is kept under `folder`.

    Raises:
        TrainingError: in place of what was raised.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(f"{what} could not be written: {reason}. {kept(folder)}") from error


def kept(folder: Path) -> str:
    """What a run that stops leaves behind under `folder`, and what to do."""
    saved = ckpt.found(folder)
    if not saved:
        return "There was no checkpoint yet."
    return f"{saved[-1]} is kept; --resume goes on from it once the cause is gone."
