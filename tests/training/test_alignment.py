"""Tokens that follow a teacher's: when it ends, whose tokens they are, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditkit.models.teachers import Teacher
from ditkit.processes.transport import Transport
from ditkit.seams.taps import hidden_after
from ditkit.training.config import ConfigError, load
from ditkit.training.objectives import Setting, create
from ditkit.training.order import BatchNoise
from ditkit.training.tasks import find
from ditkit.training.trainer import Trainer
from training_recipes import OBJECTIVES, open_task, options


def chosen(name: str, vision: str, **changes: Any) -> dict[str, Any]:
    return {"objective": {name: {**OBJECTIVES[name][1][name], "teacher": vision, **changes}}}


def gradients(task: Any, noise: BatchNoise, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    task.zero_grad()
    task(rows, noise)["loss"].backward()
    return {k: p.grad.clone() for k, p in task.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stop_at", [0.5, 4])
def test_after_the_stop_the_gradient_is_the_plain_one(training_file, vision, monkeypatch, stop_at):
    stopped = open_task(
        training_file(task_options=options("dit"), **chosen("haste", vision, stop_at=stop_at))
    )
    alone = open_task(training_file(task_options=options("dit")))
    monkeypatch.setattr(Teacher, "forward", None)  # neither is the teacher asked
    alone[0].model.load_state_dict(stopped[0].model.state_dict())
    found, expected = gradients(*stopped), gradients(*alone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    projectors = stopped[0].objectives.made["haste"].projectors
    assert all(p.grad is not None and not p.grad.any() for p in projectors.parameters())


def test_before_the_stop_it_is_not(training_file, vision):
    task, noise, rows = open_task(training_file(task_options=options("dit"), **chosen("haste", vision)))
    losses = task(rows, noise)
    assert {"alignment", "attention_alignment"} <= set(losses)
    losses["loss"].backward()
    assert all(p.grad.any() for p in task.objectives.made["haste"].projectors.parameters())
    teachers = task.objectives.made["haste"].teachers
    assert not any(p.requires_grad for p in teachers.parameters())
    assert not task.train().objectives.made["haste"].teachers[0].network.training


def test_several_teachers_are_averaged(training_file, vision):
    values = []
    for teachers in (vision, [vision, vision]):
        path = training_file(task_options=options("dit"), **chosen("repa", teachers))  # type: ignore[arg-type]
        task, noise, rows = open_task(path)
        made = task.objectives.made["repa"]
        made.projectors[-1].load_state_dict(made.projectors[0].state_dict())
        values.append(task(rows, noise)["alignment"])
    assert values[0].isfinite() and len(made.projectors) == 2


def test_the_teacher_may_see_larger_pictures(training_file, vision):
    path = training_file(task_options=options("dit"), **chosen("repa", vision, teacher_pixels=32))
    task, noise, rows = open_task(path)
    seen = []
    task.objectives.made["repa"].teachers[0].network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape), with_kwargs=True
    )
    assert task(rows, noise)["alignment"].isfinite()
    assert seen == [(8, 3, 32, 32)]


@pytest.mark.parametrize("arch", ["dit", "dtr", "switch-dit", "lit", "pt-dit", "dico"])
def test_every_architecture_with_tokens_can_follow(training_file, vision, arch):
    """DiCo's lowest level has one block: SRA needs two, and is left out there."""
    names = {"repa": chosen("repa", vision)["objective"]["repa"]}
    if arch != "dico":
        names["sra"] = OBJECTIVES["sra"][1]["sra"]
    task, noise, rows = open_task(training_file(task_options=options(arch), objective=names))
    losses = task(rows, noise)
    losses["loss"].backward()
    for name in names:
        assert losses[{"repa": "alignment", "sra": "self_alignment"}[name]].isfinite()
        made = task.objectives.made[name]
        assert all(p.grad is not None and p.grad.any() for p in made.parameters() if p.requires_grad)


def test_the_run_s_average_is_the_teacher(training_file, tmp_path):
    """What the student follows are the tokens of the averaged network."""
    from accelerate import Accelerator

    run = load(
        training_file(
            task_options=options("dit"), objective=OBJECTIVES["sra"][1], ema={"decay": 0.5, "warmup": False}
        )
    ).stages[0]
    task: Any = find(run.task)(run, tmp_path, {})
    trainer = Trainer(run, tmp_path, task, Accelerator(cpu=True))
    for _ in range(3):
        trainer._train_step()
    made, seen = task.objectives.made["sra"], []
    terms = made.terms
    made.terms = lambda step: seen.append(step) or terms(step)
    rows = torch.arange(8)
    task(rows, BatchNoise(run.seed, 3, 8, rows, torch.device("cpu")))
    step = seen[0]

    class Same:
        def uniform(self) -> torch.Tensor:
            return torch.zeros(8)

    import dataclasses

    found = made.teacher_tokens(dataclasses.replace(step, draws=Same()))
    times = step.timestep.clamp(min=1)
    with trainer._averaged():
        noisy = task.process.q_sample(step.clean, times, step.noise)
        expected = hidden_after(
            task.model, 2, lambda: task.model(noisy, times, step.labels, force_drop_ids=step.dropped)
        )
    assert torch.equal(found, expected)
    own = hidden_after(
        task.model, 2, lambda: task.model(noisy, times, step.labels, force_drop_ids=step.dropped)
    )
    assert not torch.equal(found, own) and task.model.training and not found.requires_grad


def test_sra_s_weight_follows_the_epochs(training_file):
    objective = {"sra": {**OBJECTIVES["sra"][1]["sra"], "distance": "smooth-l1"}}
    task, _, _ = open_task(training_file(task_options=options("dit"), objective=objective))
    made = task.objectives.made["sra"]

    class Step:
        step = 0
        draws = BatchNoise(0, 0, 8, torch.arange(8), torch.device("cpu"))

    assert made.weight(Step) == pytest.approx(0.04)
    Step.step = -(-made.samples * 1149 // 8)
    assert made.weight(Step) == pytest.approx(0.004, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "changes", "arch", "words"),
    [
        ("haste", {}, "lit", ["haste", "linear"]),
        ("haste", {"attention_layers": [1, 9]}, "dit", ["attention layer 9"]),
        ("haste", {"teacher_layers": [1, 9]}, "dit", ["teacher_layers", "2 layers"]),
        ("repa", {"depth": 7}, "dit", ["block 7", "it has 2"]),
        ("repa", {}, "dimr", ["DiMR"]),
        ("repa", {"teacher": "nowhere"}, "dit", ["teacher", "'nowhere'"]),
    ],
)
def test_what_does_not_fit_is_refused(training_file, tmp_path, vision, name, changes, arch, words):
    run = {"task_options": options(arch), **chosen(name, vision, **changes)}
    stage = load(training_file(**run)).stages[0]
    with pytest.raises(ConfigError) as error:
        find(stage.task)(stage, tmp_path, {})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"haste": {"teacher": "x", "attention_layers": [1]}}, "not as many"),
        ({"sra": {"student_block": 3, "teacher_block": 3}}, "must be behind"),
        ({"haste": {"teacher": "x", "stop_at": 0}}, "stop_at"),
    ],
)
def test_options_that_contradict_each_other(training_file, objective, words):
    with pytest.raises(ConfigError, match=words):
        load(training_file(objective=objective))


def test_sra_needs_the_average(training_file, tmp_path):
    run = {"task_options": options("dit"), "objective": OBJECTIVES["sra"][1], "ema": None}
    stage = load(training_file(**run)).stages[0]
    with pytest.raises(ConfigError, match=r"sra: .*set ema"):
        find(stage.task)(stage, tmp_path, {})


def test_a_teacher_needs_the_pictures(vision):
    setting = Setting(None, Transport(), 8, pictures=False)
    with pytest.raises(ValueError, match="repa: its teacher looks at the pictures"):
        create({"repa": {"teacher": vision}}, setting)


def test_repa_and_haste_exclude_each_other(training_file, tmp_path, vision):
    both = {**chosen("repa", vision)["objective"], **chosen("haste", vision)["objective"]}
    stage = load(training_file(task_options=options("dit"), objective=both)).stages[0]
    with pytest.raises(ConfigError, match="both set the alignment"):
        find(stage.task)(stage, tmp_path, {})


def test_overrides_set_the_stop(training_file, vision):
    path = training_file(**chosen("haste", vision))
    assert load(path, ["objective.haste.stop_at=0.3"]).stages[0].objective["haste"]["stop_at"] == 0.3


def test_overrides_find_the_one_stage_with_an_objective(request):
    path = request.config.rootpath / "configs" / "sit_emoji_haste.yaml"
    teacher, student = load(path, ["objective.haste.stop_at=0.3"]).stages
    assert student.objective["haste"]["stop_at"] == 0.3 and not teacher.objective
    with pytest.raises(ConfigError, match="begin with a stage name"):
        load(path, ["steps=3"])
