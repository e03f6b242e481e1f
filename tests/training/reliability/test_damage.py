"""Full disks, damaged checkpoints, parts that are gone, broken numbers: said, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from ditkit.training import checkpoint as ckpt
from ditkit.training import loop
from ditkit.training import records as records_file
from ditkit.training.tasks.class_to_image import ClassToImageTask
from ditkit.training.trainer import TrainingError, train
from training_recipes import records, weights


def equal(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def ditkit_train(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which can write files of `limit` bytes at most."""

    def before() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return subprocess.run(
        [sys.executable, "-m", "ditkit", "train", *map(str, arguments)],
        capture_output=True, text=True, preexec_fn=before, env={**os.environ, "COLUMNS": "500"},
    )  # fmt: skip


@pytest.mark.slow
def test_a_disk_that_takes_no_more_keeps_the_last_checkpoint(training_file, tmp_path):
    """The optimizer's file no longer fits: Python ignores the signal and gets an error, as of a full disk."""
    train(training_file("whole"))
    path = training_file("full", steps=2)
    train(path)
    shutil.rmtree(tmp_path / "full/tiny/export")
    path = training_file("full")
    done = ditkit_train(path, "--resume", limit=300_000)
    assert done.returncode == 1, done.stderr
    assert "checkpoint of step 4 could not be written" in done.stderr
    assert "step-00000002 is kept" in done.stderr
    assert "Traceback" not in done.stderr
    saved = tmp_path / "full/tiny/checkpoints"
    assert [p.name for p in saved.iterdir()] == ["step-00000002"]  # the half-written one makes room
    assert ditkit_train(path, "--resume").returncode == 0
    equal(tmp_path / "full", tmp_path / "whole")


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "state.json"])
def test_no_space_left_while_any_file_is_written(training_file, tmp_path, monkeypatch, file):
    train(training_file("whole"))
    save, write = ckpt.save_file, Path.write_text

    def save_file(tensors: Any, path: Path) -> None:
        if path.name == file and "00000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    def write_text(self: Path, *arguments: Any, **options: Any) -> int:
        if self.name == file and "00000004" in str(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, *arguments, **options)

    path = training_file("full")
    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "save_file", save_file)
        patch.setattr(Path, "write_text", write_text)
        with pytest.raises(TrainingError, match=r"step 4 .*No space left.*step-00000002 is kept"):
            train(path)
    train(path, resume=True)
    equal(tmp_path / "full", tmp_path / "whole")


@pytest.mark.parametrize("what", ["the export", "what step 4 gave", "step-00000004.png"])
def test_no_space_left_for_anything_else(training_file, tmp_path, monkeypatch, what):
    changes = {"sample_every": 2}
    train(training_file("whole", **changes))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def export(self: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    add, step = records_file.add, [0]

    def some(folder: Path, number: int, figures: Any) -> None:
        step[0] = number
        full() if what == "what step 4 gave" and number == 4 else add(folder, number, figures)

    path = training_file("full", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(records_file, "add", some)
        if what == "the export":
            patch.setattr(ClassToImageTask, "export", export)
        elif what.endswith("png"):
            save = Image.Image.save
            patch.setattr(Image.Image, "save", lambda *given: full() if step[0] == 4 else save(*given))
        last = "step-00000006" if what == "the export" else "step-00000002"
        with pytest.raises(TrainingError, match=rf"{what} could not be .*No space left.*{last} is kept"):
            train(path)
    assert not (tmp_path / "full/tiny/.export.part").exists()
    train(path, resume=True)
    equal(tmp_path / "full", tmp_path / "whole")


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = data[:0]
    else:
        data[len(data) // 2] ^= 1 << 3
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "bit"])
@pytest.mark.parametrize("file", ["model", "optimizer-0", "ema", "rng", "state"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path, file, how):
    for step in (1, 2):
        tensors = {name: {"x": torch.rand(9)} for name in ("model", "optimizer-0", "ema", "rng")}
        last = ckpt.write(tmp_path, ckpt.Checkpoint(step, tensors, {"data_position": [0, 7]}), keep=2)
    damage(last / f"{file}.{'json' if file == 'state' else 'safetensors'}", how)
    with pytest.warns(UserWarning, match="skipping damaged checkpoint .*step-00000002"):
        found = ckpt.newest(tmp_path)
    assert found is not None and found.step == 1


def test_every_bit_of_the_state_counts(tmp_path):
    """A changed digit is still JSON."""
    written = ckpt.Checkpoint(3, {}, {"data_position": [0, 7], "ema": {"decay": 0.9}})
    last = ckpt.write(tmp_path, written, keep=2)
    whole, refused = (last / "state.json").read_bytes(), 0
    for place in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            (last / "state.json").write_bytes(data)
            try:
                assert ckpt.read(last) == written
            except ValueError:
                refused += 1
    assert refused > 7.5 * len(whole)  # the rest are other ways to write the same


def test_a_run_goes_on_from_the_checkpoint_before(training_file, tmp_path):
    train(training_file("whole"))
    path = training_file("hurt")
    train(path)
    folder = tmp_path / "hurt/tiny"
    shutil.rmtree(folder / "export")
    damage(folder / "checkpoints/step-00000006/model.safetensors", "bit")
    with pytest.warns(UserWarning, match="step-00000006"):
        train(path, resume=True)
    equal(tmp_path / "hurt", tmp_path / "whole")


def test_when_none_is_intact_nothing_begins_anew(training_file, tmp_path):
    path = training_file()
    train(path)
    folder = tmp_path / "run/tiny"
    shutil.rmtree(folder / "export")
    logged = (folder / "metrics.jsonl").read_bytes()
    for saved in ckpt.found(folder / "checkpoints"):
        damage(saved / "ema.safetensors", "cut")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ckpt.DamagedError, match=r"no checkpoint .* is intact .*move the folder"),
    ):
        train(path, resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == logged


STATE = ["optimizers", "data_position", "ema", "step"]
PARTS = ["model", "optimizer-0", "ema", "rng"]


@pytest.mark.parametrize("part", [*PARTS, *(f"state {name}" for name in STATE)])
def test_a_part_that_is_gone_is_noticed(training_file, tmp_path, monkeypatch, part):
    """The step too, of which the schedule is a function."""
    path = training_file(steps=4)
    train(path)
    folder = tmp_path / "run/tiny"
    shutil.rmtree(folder / "export")
    for saved in ckpt.found(folder / "checkpoints"):
        record = json.loads((saved / "state.json").read_text())
        del record["self"]
        name = part.removeprefix("state ")
        if part == "state step":
            del record["step"]
        elif part.startswith("state"):
            del record["state"][name]
        else:
            del record["sha256"][f"{name}.safetensors"]
        (saved / "state.json").write_text(json.dumps(record))
    with pytest.raises((TrainingError, ValueError), match=name):
        train(path, resume=True)


@pytest.mark.filterwarnings("ignore:skipping damaged")
@pytest.mark.parametrize("part", ["rng", "step", "ema-step"])
def test_a_part_that_is_of_another_time_is_noticed(training_file, tmp_path, monkeypatch, part):
    """The rest is in `test_trainer`. Nothing of a class-to-image step uses torch's own generator but this."""
    forward = ClassToImageTask.forward

    def shaken(self: Any, *arguments: Any) -> Any:
        losses = forward(self, *arguments)
        return {**losses, "loss": losses["loss"] * (1 + torch.rand(()))}

    monkeypatch.setattr(ClassToImageTask, "forward", shaken)
    whole, cut = training_file("whole", steps=8), training_file("cut", steps=8)
    train(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    folder = tmp_path / "cut/tiny"
    shutil.rmtree(folder / "export")
    shutil.rmtree(folder / "checkpoints/step-00000008")
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "cut", again)
    train(training_file("again", steps=8), resume=True)
    equal(again, tmp_path / "whole")
    read = ckpt.newest

    def other(where: Path) -> ckpt.Checkpoint | None:
        saved = read(where)
        assert saved is not None
        if part == "rng":
            saved.tensors["rng"]["torch"] = torch.Generator().manual_seed(0).get_state()
        elif part == "step":
            saved.step -= 1
        else:
            saved.state["ema"]["optimization_step"] = 0
        return saved

    monkeypatch.setattr(ckpt, "newest", other)
    train(cut, resume=True)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert any(not torch.equal(one[name], two[name]) for name in one)


class Sick:
    """A task whose gradient is not finite at one step, while its loss is."""

    def __init__(self, at: int, value: float) -> None:
        self.at, self.value, self.forward = at, value, ClassToImageTask.forward

    def __call__(self, task: Any, indices: Any, noise: Any) -> Any:
        losses = self.forward(task, indices, noise)
        if noise.step == self.at:
            losses["loss"] = losses["loss"] * self.value
        return losses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_can_be_passed_over(training_file, tmp_path, monkeypatch, value):
    sick = Sick(3, value)
    monkeypatch.setattr(ClassToImageTask, "forward", lambda *given: sick(*given))
    train(training_file(optimizer={"lr": 1e-3, "skip_grad_norm": 100.0}))
    rows = records(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 0, 0]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_skipping_for_ever_stops(training_file, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MOST_SKIPPED", 3)
    with pytest.raises(TrainingError, match=r"4 steps in a row .*skip_grad_norm=1e-09"):
        train(training_file(steps=9, optimizer={"lr": 1e-3, "skip_grad_norm": 1e-9}))


def test_weights_that_are_not_finite_are_not_saved(training_file, tmp_path, monkeypatch):
    """A gradient can be broken under a sound loss."""
    step = torch.optim.AdamW.step

    def breaking(self: Any, *arguments: Any, **options: Any) -> Any:
        result = step(self, *arguments, **options)
        if len(ckpt.found(tmp_path / "run/tiny/checkpoints")) == 1:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    monkeypatch.setattr(loop.math, "isfinite", lambda value: True)
    with pytest.raises(TrainingError, match=r"not finite; they are not saved\. .*step-00000002 is kept"):
        train(training_file())
    saved = ckpt.newest(tmp_path / "run/tiny/checkpoints")
    assert saved is not None and saved.step == 2
    assert all(torch.isfinite(value).all() for value in saved.tensors["model"].values())
