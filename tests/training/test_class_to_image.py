"""Every class-conditional architecture through the trainer, from its configuration to its samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ditkit.models as models
from ditkit.hub import load as open_pipeline
from ditkit.models import lit
from ditkit.models.building import DataShape, build
from ditkit.pipelines.class_conditional import ClassConditionalPipeline
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.times import logit_normal, shifted
from ditkit.training.config import ConfigError, load
from ditkit.training.tasks import find
from ditkit.training.trainer import train
from training_recipes import MODELS, OBJECTIVES, PROCESSES, interrupted, open_task, options, records, weights

PAIRS = [(arch, process) for arch, processes in PROCESSES.items() for process in processes]


@pytest.mark.parametrize(("arch", "process"), PAIRS)
def test_trains_resumes_bit_exact_and_draws(training_file, tmp_path, monkeypatch, arch, process):
    changes: dict[str, Any] = {"steps": 3, "task_options": options(arch, process)}
    export = train(training_file("whole", **changes))
    interrupted(training_file("broken", **changes), monkeypatch, at=2)
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((export / "process.json").read_text())["process"] == process
    pipe = open_pipeline(export)
    assert isinstance(pipe, ClassConditionalPipeline)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(["flag", "keycap"], guidance_scale=2.0, num_inference_steps=2, output_type="latent").images
    assert drawn.shape == (2, 3, 8, 8) and torch.isfinite(torch.as_tensor(drawn)).all()


def test_times_and_shift_of_a_flow(training_file):
    """The network is shown times of the distribution asked for, the scheduler is shifted alike."""
    chosen = {"time_distribution": "logit-normal", "time_mean": 0.5, "shift": 3.0}
    path = training_file(task_options={**options("sit", "flow"), **chosen})
    task, noise, rows = open_task(path)
    seen: list[torch.Tensor] = []
    task.model.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    task(rows, noise)
    twin = open_task(path)[1]
    twin.normal(*task.samples.shape[1:])
    uniform = twin.uniform()
    share = shifted(logit_normal(uniform, 0.5), 3.0)
    torch.testing.assert_close(seen[0], 1 - share)
    assert task.process.shift == 3
    pipe = open_pipeline(
        train(training_file("short", steps=1, task_options={**options("sit", "flow"), **chosen}))
    )
    assert pipe.scheduler.config["shift"] == 3
    auto = open_task(training_file("auto", task_options={**options("sit", "flow"), "shift": "auto"}))[0]
    assert auto.process.shift == pytest.approx((3 * 8 * 8 / 4096) ** 0.5)


@pytest.mark.parametrize("arch", MODELS)
def test_overfits_a_tiny_batch(training_file, tmp_path, arch):
    train(
        training_file(
            steps=80,
            data={"kind": "emoji", "split": "heldout", "groups": ["keycap", "flag"]},
            task_options=options(arch, PROCESSES[arch][0]),
            optimizer={"lr": 4e-3},
            schedule={"kind": "constant"},
            checkpoint_every=1000,
            ema=None,
        )
    )
    key = "mse" if "mse" in records(tmp_path / "run")[0] else "loss"
    curve = [row[key] for row in records(tmp_path / "run")]
    assert sum(curve[-10:]) < 0.7 * sum(curve[:10]), (sum(curve[:10]), sum(curve[-10:]))


def test_without_objectives_the_loss_is_the_process_s(training_file):
    task, noise, rows = open_task(training_file(task_options=options("dit")))
    losses = task(rows, noise)
    twin = open_task(training_file(task_options=options("dit")))[1]
    epsilon, uniform = twin.normal(*task.samples.shape[1:]), twin.uniform()
    dropped = (twin.uniform() < 0.1).long()
    labels = task.labels[rows]
    direct = GaussianDiffusion.create(1000).training_losses(
        lambda x, t: task.model(x, t, labels, force_drop_ids=dropped).sample,
        task.samples[rows],
        (uniform * 1000).long(),
        epsilon,
    )
    assert set(losses) == set(direct)
    assert all(torch.equal(losses[name], direct[name].mean()) for name in direct)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (options("sit", "gaussian"), ["process", "gaussian can't train sit", "0 to 1"]),
        (options("dit-dh", "gaussian"), ["process", "gaussian can't train dit-dh", "set process: flow"]),
        ({**options("dit"), "shift": "auto"}, ["time_distribution and shift", "process: flow"]),
        ({**options("sit", "flow"), "shift": -1}, ["task_options.shift"]),
        (options("dtr", "flow"), ["flow can't train dtr", "whole timesteps", "SiT"]),
        (options("dimr", "flow"), ["flow can't train dimr", "predicts noise"]),
        ({**options("dimr"), "pixels": 16}, ["dimr is built for 3 x 8 x 8", "3 x 16 x 16"]),
        ({**options("dico"), "pixels": 6}, ["multiples of 4", "6 x 6"]),
        ({**options("dit"), "model": {"widht": 3}}, ["dit can't be built", "widht"]),
        ({**options("dit"), "model": {**MODELS["dit"], "class_dropout_prob": 0}}, ["class_dropout", "0.1"]),
        ({**options("lit"), "inherit_from": "nowhere"}, ["no stage", "'nowhere'"]),
        (options("dit") | {"arch": "d2it-grain", "model": {}}, ["d2it-grain"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(training_file, tmp_path, changes, words):
    run = load(training_file(task_options=changes)).stages[0]
    with pytest.raises(ConfigError) as error:
        find(run.task)(run, tmp_path, {})
    assert all(word in str(error.value) for word in words), error.value


def test_routed_sit_trains_as_a_flow(training_file, tmp_path):
    train(training_file(steps=1, task_options={**options("dtr", "flow"), "arch": "dtr-sit-s/8"}))
    assert records(tmp_path / "run")[0]["loss"] > 0


def test_without_dropped_classes_there_need_be_no_null_class(training_file, tmp_path):
    model = {**MODELS["dit"], "class_dropout_prob": 0}
    chosen = {**options("dit"), "model": model, "class_dropout": 0}
    train(training_file(steps=1, task_options=chosen))
    assert records(tmp_path / "run")[0]["loss"] > 0


def test_starts_from_a_trained_network(training_file, tmp_path, teacher):
    start = {**options("lit"), "inherit_from": teacher, "model": {"num_heads": 2}}
    run = load(training_file(task_options=start)).stages[0]
    task: Any = find(run.task)(run, tmp_path, {})
    trained = models.load(teacher)
    expected, got = lit.inherit(trained, num_heads=2).state_dict(), task.model.state_dict()
    assert set(expected) == set(got)
    assert all(torch.equal(expected[name], got[name]) for name in got if ".attn." not in name)


def test_what_an_architecture_does_not_start_from_is_named(teacher):
    shape = DataShape((8, 8), 3, 2, True)
    with pytest.raises(ValueError, match="dico can't start from a DiT: dico starts from no other"):
        build("dico", shape, {}, Path(teacher))


def test_the_teacher_may_be_an_earlier_stage(training_file, tmp_path):
    import yaml

    first = yaml.safe_load(training_file(steps=1, task_options=options("dit")).read_text())
    output = first.pop("output")
    second = {
        **first,
        "name": "student",
        "objective": {"distillation": {"teacher": "tiny"}},
        "task_options": {**options("lit"), "inherit_from": "tiny", "model": {"num_heads": 2}},
    }
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"output": output, "stages": [first, second]}))
    export = train(path)
    row = json.loads((export.parent / "metrics.jsonl").read_text().splitlines()[0])
    assert {"distilled_noise", "distilled_variance"} <= set(row)


def test_every_architecture_has_a_configuration(request):
    files = (request.config.rootpath / "configs").glob("*_emoji*.yaml")
    named = {stage.task_options.get("arch") for path in files for stage in load(path).stages}
    assert set(MODELS) <= named


@pytest.mark.parametrize("arch", MODELS)
def test_its_configuration_builds_a_small_model(request, arch):
    """What the file describes exists, takes its data's size, and has one to three million parameters."""
    name = {"dit-dh": "rae"}.get(arch, arch.replace("-", "_"))
    stages = load(request.config.rootpath / "configs" / f"{name}_emoji.yaml").stages
    chosen, first = stages[-1].task_options, stages[0].task_options
    side, channels = chosen.get("pixels"), 3
    if side is None:  # the tokens of the first stage's vision transformer
        side, channels = stages[-1].data.size // first["model"]["patch_size"], first["model"]["hidden_size"]
    shape = DataShape((side, side), channels, 9, chosen["process"] == "gaussian")
    config = first["model"] | chosen["model"] if "inherit_from" in chosen else chosen["model"]
    with torch.device("meta"):
        model = build(chosen["arch"], shape, config)
    assert model.unfit_for(chosen["process"]) is None
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 3.2e6


def test_every_objective_is_tried():
    from ditkit import registry

    assert set(registry.entries("objective")) <= set(OBJECTIVES)
