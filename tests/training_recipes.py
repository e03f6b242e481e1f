"""Tiny class-conditional runs: every architecture, every objective."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from architectures import CASES
from ditkit.training import trainer as training
from ditkit.training.config import load
from ditkit.training.order import BatchNoise
from ditkit.training.tasks import find
from ditkit.training.trainer import train


@contextlib.contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """Within, a training is stopped after so many steps, as by Ctrl-C."""
    take_step = training.Trainer._train_step

    def stops(self: Any) -> Any:
        if self.step == steps:
            raise KeyboardInterrupt
        return take_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "_train_step", stops)
        yield


FROM_DATA = ("input_size", "in_channels", "num_classes", "learn_sigma")
SMALL_DIT = {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "dit": SMALL_DIT,
    "sit": SMALL_DIT,
    **{
        name: {key: value for key, value in CASES[name].tiny.items() if key not in FROM_DATA}
        for name in ("dico", "dtr", "dydit", "switch-dit", "lit", "pt-dit", "dimr", "lamamba-diff", "dit-dh")
    },
}
MODELS["dico"]["depth"] = list(MODELS["dico"]["depth"])
MODELS["pt-dit"]["compress_ratios"] = [1, 2, 2]
MODELS["dit-dh"] = {"hidden_size": [16, 32], "depth": [2, 1], "num_heads": [2, 4], "patch_size": 2}
MODELS["lamamba-diff"] |= {"patch_size": 2, "depth": [1, 1, 1, 1]}

PROCESSES: dict[str, tuple[str, ...]] = {
    name: {"sit": ("flow",), "dit-dh": ("flow",), "dtr": ("gaussian",), "dimr": ("gaussian",)}.get(
        name, ("gaussian", "flow")
    )
    for name in MODELS
}
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "min-snr": ("dit", {"min-snr": {"k": 3}}),
    "uncertainty-weighting": ("dtr", {"uncertainty-weighting": {"groups": 4}}),
    "both": ("dtr", {"uncertainty-weighting": {"groups": 4}, "min-snr": None}),
    "switch-prior": ("switch-dit", {"switch-prior": {"weight": 0.7}}),
    "multi-scale": ("dimr", {}),
    "distillation": ("lit", {"distillation": {"teacher": "TEACHER"}}),
    "repa": ("dit", {"repa": {"teacher": "TEACHER", "depth": 1, "projector": 16}}),
    "haste": ("dit", {"haste": {"teacher": "TEACHER", "depth": 1, "projector": 16, "attention_layers": [1, 2],
                                "teacher_layers": [2, 1], "stop_at": 0.7}}),
    "dydit": ("dydit", {"dydit": {"flops": 0.5, "warmup": 4, "hold": 1}}),
    "sra": ("dit", {"sra": {"student_block": 1, "teacher_block": 2}}),
}  # fmt: skip


def options(arch: str, process: str = "gaussian") -> dict[str, Any]:
    """`task_options` of a run of an architecture on pictures of 8 x 8."""
    return {"arch": arch, "process": process, "pixels": 8, "model": MODELS[arch]}


def changes(name: str, teacher: str) -> dict[str, Any]:
    """A run with one of `OBJECTIVES`.

    Args:
        teacher: the tests' trained network, beside which a vision transformer lies.
    """
    arch, chosen = OBJECTIVES[name]
    folders = {
        "distillation": teacher,
        **dict.fromkeys(("repa", "haste"), str(Path(teacher).parent / "vision")),
    }
    chosen = {k: {**v, "teacher": folders[k]} if k in folders else v for k, v in chosen.items()}
    return {"objective": chosen, "task_options": options(arch)}


def open_task(path: Path) -> tuple[Any, BatchNoise, torch.Tensor]:
    """The task of a file with every parameter moved off its start, the noise of a step, a batch's samples.

    With the tests' seed, the fifth step has samples at little noise, which objectives weigh.
    """
    run = load(path).stages[0]
    torch.manual_seed(0)
    task: Any = find(run.task)(run, path.parent, {})
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    rows = torch.arange(run.batch_size)
    return task, BatchNoise(run.seed, 4, run.batch_size, rows, torch.device("cpu")), rows


def records(folder: Path) -> list[dict[str, float]]:
    """What a run logged, but for its times."""
    rows = [json.loads(line) for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run exported."""
    return load_file(folder / "tiny" / "export" / "transformer" / "diffusion_pytorch_model.safetensors")


class Killed(BaseException):
    pass


def interrupted(path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Train, be killed before the update after `at`, and resume."""
    take_step, killed = training.Trainer._train_step, []

    def dies(self: Any) -> Any:
        if self.step == at and not killed:
            killed.append(True)
            raise Killed
        return take_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_train_step", dies)
        with pytest.raises(Killed):
            train(path)
    torch.rand(7)  # a resumed run must not depend on the process's random state
    train(path, resume=True)
