import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ditkit import models
from ditkit.training import checkpoint
from ditkit.training import trainer as training
from ditkit.training.checkpoint import found, newest
from ditkit.training.config import load
from ditkit.training.schedule import learning_rate_factor
from ditkit.training.trainer import TrainingError, train
from training_recipes import stopped_after


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "tiny" / "export" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_runs_and_exports(training_file, tmp_path):
    export = train(training_file())
    assert (export / "model_index.json").is_file()
    assert json.loads((export / "process.json").read_text())["classes"] == ["flag", "keycap"]
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert models.load(export).config["hidden_size"] == 32


def test_will_not_overwrite(training_file):
    train(training_file(steps=1))
    with pytest.raises(FileExistsError, match="--resume"):
        train(training_file(steps=1))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resume_is_bit_exact(training_file, tmp_path, monkeypatch, kind):
    optimizer = {"lr": 1e-3, "kind": kind, "clip_grad_norm": 1.0}
    train(training_file("whole", optimizer=optimizer))

    class Killed(BaseException):
        pass

    take_step = training.Trainer._train_step

    def dies_at_step_five(self):
        if self.step == 4 and newest(self.folder / "checkpoints").step == 4 and not killed:
            killed.append(True)
            raise Killed
        return take_step(self)

    killed: list[bool] = []
    monkeypatch.setattr(training.Trainer, "_train_step", dies_at_step_five)
    path = training_file("broken", optimizer=optimizer)
    with pytest.raises(Killed):
        train(path)
    torch.rand(7)  # a resumed run must not depend on the process's random state
    train(path, resume=True)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("part", ["model", "optimizer-0", "ema", "data_position"])
def test_every_part_of_a_checkpoint_matters(training_file, tmp_path, monkeypatch, part):
    """Taking one part of the state away changes what the resumed run computes."""
    train(training_file("whole"))
    path = training_file("cut", steps=4, schedule={"kind": "constant"})
    train(path)
    whole = training_file("whole_constant", schedule={"kind": "constant"})
    train(whole)
    read = newest

    def without(folder):
        saved = read(folder)
        if saved is not None:
            if part == "data_position":
                saved.state["data_position"] = [0, 0]
            else:
                saved.tensors[part] = {k: torch.zeros_like(v) for k, v in saved.tensors[part].items()}
        return saved

    monkeypatch.setattr(checkpoint, "newest", without)
    folder = tmp_path / "cut" / "tiny"
    (folder / "export").rename(folder / "earlier_export")
    train(training_file("cut", steps=6, schedule={"kind": "constant"}), resume=True)
    one, other = weights(tmp_path / "whole_constant"), weights(tmp_path / "cut")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_resumed_weights_move(training_file, tmp_path):
    train(training_file(steps=4))
    folder = tmp_path / "run" / "tiny"
    before = newest(folder / "checkpoints").tensors["model"]
    (folder / "export").rename(folder / "old")
    train(training_file(steps=5), resume=True)
    after = newest(folder / "checkpoints").tensors["model"]
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_accumulation_changes_nothing(training_file, tmp_path):
    train(training_file("one"))
    train(training_file("four", accumulation=4))
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "four"), strict=True):
        assert abs(a - b) <= 1e-6 * max(1, abs(a))


def test_overfits_a_tiny_batch(training_file, tmp_path):
    data = {"kind": "emoji", "split": "heldout", "groups": ["keycap", "flag"]}
    model = {"arch": "dit", "process": "flow", "pixels": 8,
             "model": {"patch_size": 2, "hidden_size": 64, "depth": 3, "num_heads": 4}}  # fmt: skip
    train(
        training_file(
            steps=300, data=data, task_options=model, checkpoint_every=1000, schedule={"kind": "constant"}
        )
    )
    curve = [loss for _, loss in losses(tmp_path / "run")]
    assert sum(curve[-30:]) < 0.35 * sum(curve[:30])


def test_gaussian_process_learns_its_variance(training_file, tmp_path):
    options = {"arch": "dit", "process": "gaussian", "pixels": 8,
               "model": {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2}}  # fmt: skip
    train(training_file(task_options=options, sample_every=6, heldout_every=6))
    rows = [json.loads(line) for line in (tmp_path / "run/tiny/metrics.jsonl").read_text().splitlines()]
    assert {"loss", "mse", "vb"} <= set(rows[0])
    assert any("heldout_loss" in row for row in rows)
    assert list((tmp_path / "run/tiny/samples").glob("*.png"))


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(training_file, tmp_path, monkeypatch):
    from ditkit.training.tasks.class_to_image import ClassToImageTask

    healthy = ClassToImageTask.forward

    def sick(self, indices, noise):
        losses = healthy(self, indices, noise)
        step = len(found(tmp_path / "run/tiny/checkpoints"))
        return {name: value * float("nan") if step else value for name, value in losses.items()}

    monkeypatch.setattr(ClassToImageTask, "forward", sick)
    with pytest.raises(TrainingError, match="nan"):
        train(training_file())
    saved = newest(tmp_path / "run/tiny/checkpoints")
    assert saved is not None and all(torch.isfinite(v).all() for v in saved.tensors["model"].values())


def test_learning_rate_schedules(training_file):
    def factors(**schedule):
        run = load(training_file(steps=10, schedule=schedule)).stages[0]
        return [learning_rate_factor(run, step) for step in range(10)]

    assert factors(kind="constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1, 1]
    decayed = factors(kind="constant", decay_steps=5, final_factor=0.2)
    assert decayed[:6] == [1] * 6 and decayed[-1] == pytest.approx(1 - 0.8 * 4 / 5)
    cosine = factors(kind="cosine")
    assert cosine[0] == 1 and cosine[5] == pytest.approx(0.5) and all(math.isfinite(f) for f in cosine)


RUN = "import sys; from ditkit.training.trainer import train; train(sys.argv[1], resume=True)"


def test_kill_nine_loses_only_the_steps_since_the_checkpoint(training_file, tmp_path):
    changes = {"steps": 60, "checkpoint_every": 5}
    train(training_file("whole", **changes))
    path = training_file("killed", **changes)
    records = tmp_path / "killed" / "tiny" / "metrics.jsonl"
    kills = 0
    for wanted in (7, 23):
        child = subprocess.Popen([sys.executable, "-c", RUN, str(path)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and child.poll() is None:
            if records.exists() and len(records.read_text().splitlines()) >= wanted:
                child.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        child.wait()
    assert kills
    train(path, resume=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stopped_before_the_first_checkpoint_logs_every_step_once(training_file, tmp_path):
    path = training_file(checkpoint_every=6)
    with stopped_after(2), pytest.raises(KeyboardInterrupt):
        train(path)
    train(path, resume=True)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_measures_stand_beside_the_heldout_loss(training_file, tmp_path):
    """With the averaged weights, wherever the held-out loss is taken."""
    run = load(training_file(heldout_every=4)).stages[0]
    seen = []

    def measure(task, step):
        seen.append(step)
        return {"compared": float(step), "training": float(task.training)}

    training.run_stage(run, tmp_path / "stage", {}, measure)
    lines = (tmp_path / "stage" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "heldout_loss" in row]
    assert seen == [4, 6]
    assert [(row["step"], row["compared"], row["training"]) for row in rows] == [(4, 4.0, 0.0), (6, 6.0, 0.0)]
