"""Every objective: its numbers, its training, and that resuming and sharing the batch change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ditkit import models, registry
from ditkit.models.dimr import multi_scale_loss
from ditkit.models.dtr import UncertaintyWeighting, min_snr_losses
from ditkit.models.dynamic import choosing
from ditkit.models.lit import distillation_losses
from ditkit.seams.taps import Reading, reading
from ditkit.training.checkpoint import newest
from ditkit.training.config import ConfigError, load
from ditkit.training.objectives import Objective, Objectives
from ditkit.training.objectives.haste import attention_loss, projection_loss
from ditkit.training.objectives.sra import distances, less_noise
from ditkit.training.order import BatchNoise, split_rows
from ditkit.training.tasks import find
from ditkit.training.trainer import TrainingError, train
from training_recipes import OBJECTIVES, changes, interrupted, open_task, options, records, weights


def plain(task: Any, rows: Tensor, noise: BatchNoise, groups: int = 1) -> dict[str, Any]:
    """The process's losses and what went into them, computed beside the task."""
    clean, labels = task.samples[rows], task.labels[rows]
    epsilon, uniform = noise.normal(*clean.shape[1:]), noise.uniform()
    dropped = (noise.uniform() < 0.1).long()
    t = ((rows * groups // noise.batch_size + uniform.double()) / groups * 1000).long()
    noisy, seen = task.process.q_sample(clean, t, epsilon), []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.append(task.model(x, time, labels, force_drop_ids=dropped))
        return seen[0].sample

    losses = task.process.training_losses(network, clean, t, epsilon)
    return {"losses": losses, "t": t, "noise": epsilon, "noisy": noisy, "labels": labels,
            "dropped": dropped, "output": seen[0]}  # fmt: skip


def aligned(name: str, task: Any, rows: Tensor, noise: BatchNoise) -> Tensor:
    """The loss with tokens, and attention, that follow a teacher's."""
    made = task.objectives.made[name]
    with reading(task.model, made.reads(noise.step, 0.5)) as inside:
        seen = plain(task, rows, noise)
    loss, student = seen["losses"]["loss"].mean(), inside.hidden[1]
    if name == "sra":
        t = less_noise(task.process, seen["t"], noise.uniform(), 0.2)
        noisy, labels = task.process.q_sample(task.samples[rows], t, seen["noise"]), seen["labels"]
        with torch.no_grad(), reading(task.model, Reading(frozenset({2}))) as teacher:
            task.model(noisy, t, labels, force_drop_ids=seen["dropped"])
        return loss + 0.5 * distances(made.head(student), teacher.hidden[2], "cosine", "features").mean()
    view = made.teachers[0](task.pictures.images(rows.numpy()), (4, 4), [1, 2])
    loss = loss + 0.5 * projection_loss(made.projectors[0](student), view.tokens).mean()
    if name == "repa":
        return loss
    ours = [inside.attention[layer].logits() for layer in (1, 2)]
    return loss + 0.5 * attention_loss(ours, [view.attention[2], view.attention[1]]).mean()


def budgeted(task: Any, rows: Tensor, noise: BatchNoise) -> Tensor:
    """The loss as chosen and complete, and the budget's after the whole of its warm-up."""
    clean, labels = task.samples[rows], task.labels[rows]
    epsilon, uniform = noise.normal(*clean.shape[1:]), noise.uniform()
    t = ((rows % 4 + uniform) / 4 * 1000).long()
    dropped = (noise.uniform() < 0.1).long()

    def loss() -> Tensor:
        def network(x: Tensor, time: Tensor) -> Tensor:
            return task.model(x, time, labels, force_drop_ids=dropped).sample

        return task.process.training_losses(network, clean, t, epsilon)["loss"].mean()

    with choosing(task.model, draw=noise.uniform) as chosen:
        as_chosen = loss()
    with choosing(task.model, complete=True):
        complete = loss()
    assert not torch.equal(as_chosen, complete)
    return as_chosen + complete + 2 * (chosen.ratio().mean() - 0.5) ** 2


def direct(name: str, task: Any, rows: Tensor, noise: BatchNoise, teacher: str) -> Tensor:
    """The loss by the functions beside the architectures."""
    if name in ("repa", "haste", "sra"):
        return aligned(name, task, rows, noise)
    if name == "dydit":
        return budgeted(task, rows, noise)
    groups = 4 if name in ("uncertainty-weighting", "both") else 1
    seen = plain(task, rows, noise, groups)
    losses, t = seen["losses"], seen["t"]
    if name == "min-snr":
        return min_snr_losses(task.process, losses, t, 3.0)["loss"].mean()
    if groups > 1:
        assert torch.equal(t // 250, torch.arange(4).repeat_interleave(len(rows) // 4))
        losses = min_snr_losses(task.process, losses, t) if name == "both" else losses
        weighting: UncertaintyWeighting = task.objectives.made["uncertainty-weighting"].weighting
        assert weighting.loss_scale.abs().min() > 0
        return weighting(losses["loss"])
    if name == "switch-prior":
        return losses["loss"].mean() + 0.7 * task.model.prior_loss(t, noise.shared_generator())
    if name == "multi-scale":
        return multi_scale_loss(seen["output"].stages, seen["noise"], task.model.loss_weights).mean()
    trained = models.load(teacher)
    predicted = trained(seen["noisy"], t, seen["labels"], force_drop_ids=seen["dropped"]).sample
    followed = distillation_losses(seen["output"].sample, predicted, 3)["loss"]
    return (losses["loss"] + followed).mean()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_numbers_are_those_of_the_functions(training_file, teacher, name):
    path = training_file(**changes(name, teacher))
    task, noise, rows = open_task(path)
    loss = task(rows, noise)["loss"]
    expected = direct(name, task, rows, open_task(path)[1], teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    without = plain(task, rows, open_task(path)[1])["losses"]["loss"].mean()
    assert abs(float((loss - without).detach())) > 1e-4  # it does change the loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_a_batch_make_up_the_whole(training_file, teacher, name):
    task, noise, rows = open_task(training_file(**changes(name, teacher)))
    whole = task(rows, noise)
    parts = [
        task(part, BatchNoise(task.run.seed, noise.step, len(rows), part, torch.device("cpu")))
        for part in split_rows(len(rows), 4)
    ]
    for key, value in whole.items():
        if name == "dydit" and key in ("budget", "loss"):
            continue  # the square of a mean over the batch, which only processes share
        together = torch.stack([part[key] for part in parts]).mean()
        torch.testing.assert_close(together, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resume_is_bit_exact(training_file, tmp_path, monkeypatch, teacher, name):
    run = {"steps": 4, **changes(name, teacher)}
    train(training_file("whole", **run))
    interrupted(training_file("broken", **run), monkeypatch, at=3)
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    one, other = (newest(tmp_path / f / "tiny/checkpoints") for f in ("whole", "broken"))
    assert one is not None and other is not None
    assert all(torch.equal(one.tensors["model"][k], other.tensors["model"][k]) for k in one.tensors["model"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_overfits_a_tiny_batch(training_file, tmp_path, teacher, name):
    run = changes(name, teacher)
    run |= {"steps": 100, "optimizer": {"lr": 4e-3}, "schedule": {"kind": "constant"}, "ema": None}
    if name == "sra":  # its teacher
        run["ema"] = {"decay": 0.9}
    train(training_file(data={"kind": "emoji", "groups": ["keycap", "flag"]}, checkpoint_every=1000, **run))
    curve = [row["mse"] for row in records(tmp_path / "run")]
    first, last = sum(curve[:10]) / 10, sum(curve[-20:]) / 20
    assert last < 0.6 * first, (first, last)


SCRIPT = "import sys\nfrom ditkit.training.trainer import train\nfor path in sys.argv[1:]:\n    train(path)\n"


def test_two_processes_equal_one(training_file, tmp_path, teacher):
    names = ["both", "switch-prior", "multi-scale", "distillation", "haste", "sra", "dydit"]
    for name in names:
        train(training_file(f"one-{name}", steps=3, **changes(name, teacher)))
    paths = [training_file(f"two-{name}", steps=3, **changes(name, teacher)) for name in names]
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(script), *map(str, paths)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        one, two = records(tmp_path / f"one-{name}"), records(tmp_path / f"two-{name}")
        assert len(one) == len(two) == 3
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            assert all(abs(a[k] - b[k]) <= 1e-5 * max(1, abs(a[k])) for k in a), (name, a, b)


def test_order_in_the_file_changes_no_bit(training_file, tmp_path):
    chosen = {"uncertainty-weighting": {"groups": 4}, "min-snr": {"k": 2}}
    turned = dict(reversed(chosen.items()))
    for output, objective in (("one", chosen), ("other", turned)):
        path = training_file(output, steps=2, task_options=options("dit"))
        raw = {**yaml.safe_load(path.read_text()), "objective": objective}
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        assert list(load(path).stages[0].objective) == list(objective)
        train(path)
    assert records(tmp_path / "one") == records(tmp_path / "other")


def test_weights_of_groups_have_their_own_rate_and_are_not_exported(training_file, tmp_path):
    path = training_file(
        steps=1,
        objective={"uncertainty-weighting": {"groups": 4, "lr": 0.02}},
        task_options=options("dit"),
        optimizer={"lr": 1e-3, "weight_decay": 0.1, "clip_grad_norm": 1e-3},
        schedule={"kind": "constant"},
    )
    train(path)
    saved = newest(tmp_path / "run/tiny/checkpoints")
    assert saved is not None
    scale = saved.tensors["model"]["objectives.made.uncertainty-weighting.weighting.loss_scale"]
    # Adam's first step has the length of its rate; a gradient clipped with the network's would still.
    assert scale.abs().tolist() == pytest.approx([0.02] * 4, rel=1e-3)
    assert not any("objectives" in name for name in weights(tmp_path / "run"))


def test_clipping_leaves_the_network_s_gradient_to_the_network(training_file, tmp_path):
    from ditkit.training.trainer import Trainer

    run = load(training_file(objective={"uncertainty-weighting": {"groups": 4}}, task_options=options("dit")))
    from accelerate import Accelerator

    task = find("class-to-image")(run.stages[0], tmp_path, {})
    trainer = Trainer(run.stages[0], tmp_path, task, Accelerator(cpu=True))
    assert len(trainer.parameters) == len(trainer.clipped) + 1
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == [1e-3, 0.025]


def test_the_teacher_stays_frozen_and_in_eval_mode(training_file, teacher, tmp_path):
    task, noise, rows = open_task(training_file(**changes("distillation", teacher)))
    task.train()
    followed = task.objectives.made["distillation"]
    assert followed.training and not followed.teacher.training
    task(rows, noise)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in followed.teacher.parameters())
    assert not any("teacher" in name for name, p in task.named_parameters() if p.requires_grad)


def test_a_flow_has_no_distilled_variance(training_file, tmp_path):
    teacher = str(train(training_file("flow", steps=1, task_options=options("sit", "flow"))))
    path = training_file(
        objective={"distillation": {"teacher": teacher}}, task_options=options("dico", "flow")
    )
    task, noise, rows = open_task(path)
    named = task(rows, noise)
    assert "distilled_noise" in named and "distilled_variance" not in named


def test_heldout_losses_are_the_process_s(training_file, tmp_path):
    train(
        training_file(
            steps=1, heldout_every=1, objective={"uncertainty-weighting": {"groups": 4}},
            task_options=options("dit"),
        )
    )  # fmt: skip
    (row,) = [row for row in records(tmp_path / "run") if "heldout_loss" in row]
    assert set(row) == {"step", "heldout_loss", "heldout_mse", "heldout_vb"}


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"mim-snr": {}}, ["mim-snr", "Did you mean", "min-snr"]),
        ({"min-snr": {"kk": 3}}, ["min-snr.kk", "no such key", "it has k"]),
        ({"min-snr": {"k": -1}}, ["min-snr.k", "-1"]),
        ({"distillation": {}}, ["distillation.teacher", "needed"]),
        ({"min-snr": 3}, ["min-snr"]),
        (["min-snr"], ["objective"]),
    ],
)
def test_a_wrong_file_is_refused(training_file, chosen, words):
    with pytest.raises(ConfigError) as error:
        load(training_file(objective=chosen))
    assert all(word in str(error.value) for word in words), error.value


def test_overrides_reach_an_objective(training_file):
    read = load(training_file(), ["objective.min-snr.k=3", "objective.multi-scale="]).stages[0].objective
    assert read == {"min-snr": {"k": 3}, "multi-scale": {}}
    read = load(training_file(objective={"min-snr": None}), ["objective.min-snr.k=3"]).stages[0].objective
    assert read == {"min-snr": {"k": 3}}
    with pytest.raises(ConfigError, match="no such key"):
        load(training_file(), ["objective.min-snr.g=3"])


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"objective": {"min-snr": {}}}, ["tiny.objective", "min-snr", "process: flow"]),
        (
            {"objective": {"uncertainty-weighting": {}}, "batch_size": 12, "task_options": options("dit")},
            ["groups=8", "batch_size=12"],
        ),
        ({"objective": {"switch-prior": {}}, "task_options": options("dit")}, ["DiT has no experts"]),
        ({"objective": {"multi-scale": {}}, "task_options": options("dit")}, ["one resolution"]),
        (
            {"objective": {"multi-scale": {"coefficients": [1.0]}}, "task_options": options("dimr")},
            ["coefficients", "2 resolutions"],
        ),
        ({"objective": {"distillation": {"teacher": "gone"}}}, ["distillation", "'gone'"]),
    ],
)
def test_what_does_not_fit_is_refused(training_file, tmp_path, run, words):
    stage = load(training_file(**run)).stages[0]
    with pytest.raises(ConfigError) as error:
        find(stage.task)(stage, tmp_path, {})
    assert all(word in str(error.value) for word in words), error.value


def test_another_kind_of_teacher_is_refused(training_file, tmp_path, teacher):
    stage = load(training_file(objective={"distillation": {"teacher": teacher}})).stages[0]  # a flow
    with pytest.raises(ConfigError, match=r"teacher: its (predicted channels|process) are"):
        find(stage.task)(stage, tmp_path, {})


def test_tasks_with_a_loss_of_their_own_refuse(training_file, tmp_path):
    stage = load(training_file(task="autoencoder", task_options={}, objective={"min-snr": {}})).stages[0]
    with pytest.raises(ConfigError, match="'autoencoder' has its own loss"):
        find("autoencoder")(stage, tmp_path, {})


def test_a_checkpoint_with_other_objectives_is_refused(training_file, tmp_path):
    train(training_file(steps=2, task_options=options("dit")))
    (tmp_path / "run/tiny/export").rename(tmp_path / "run/tiny/old")
    path = training_file(
        steps=3, objective={"uncertainty-weighting": {"groups": 4}}, task_options=options("dit")
    )
    with pytest.raises(TrainingError, match="objectives"):
        train(path, resume=True)


def test_two_that_set_the_same_exclude_each_other():
    class One(Objective):
        claims = frozenset({"times"})

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    with pytest.raises(ValueError, match="one and two both set the times"):
        Objectives({"one": One(), "two": One()})


def test_the_command_lists_them():
    from typer.testing import CliRunner

    from ditkit.cli import app

    listed = CliRunner().invoke(app, ["objectives"]).stdout
    assert all(name in listed for name in registry.entries("objective"))
    detail = CliRunner().invoke(app, ["objectives", "distillation"]).stdout
    assert "teacher" in detail and "needed" in detail and "2501.12976" in detail
