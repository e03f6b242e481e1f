"""The budget of a dynamic network: how it is reached, and where the training starts and stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ditkit import models
from ditkit.models.dynamic import choosing
from ditkit.training.config import ConfigError, load
from ditkit.training.objectives.dydit import DyDiTOptions, target
from ditkit.training.tasks import find
from ditkit.training.trainer import train
from training_recipes import open_task, records

SMALL = {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 4}
EAGER = {"width_bias": 1.0, "token_bias": 1.0}  # routers that have not far to go
BUDGET = {"flops": 0.5, "warmup": 4, "hold": 1}


def changes(process: str = "gaussian", **budget: Any) -> dict[str, Any]:
    """A run of a fresh dynamic network."""
    arch = "dydit-sit" if process == "flow" else "dydit"
    task = {"arch": arch, "process": process, "pixels": 8, "model": {**SMALL, **EAGER}}
    return {"objective": {"dydit": {**BUDGET, **budget}}, "task_options": task}


def test_the_target_comes_down_from_one():
    options = DyDiTOptions(flops=0.7)
    found = [target(options, step) for step in (0, 99, 100, 500, 1000, 5000)]
    assert found == pytest.approx([1, 1, 0.97, 0.85, 0.7, 0.7])


def test_the_complete_network_is_left_at_the_second_stage(training_file, tmp_path):
    train(training_file(steps=4, **changes(complete_until=0.5)))
    assert ["complete" in row for row in records(tmp_path / "run")] == [True, True, False, False]


def test_a_least_share_of_tokens(training_file):
    run = changes(least_tokens=1.0, least_tokens_weight=3.0)
    task, noise, rows = open_task(training_file(**run))
    named = task(rows, noise)
    tokens = task.objectives.made["dydit"].chosen.tokens()
    torch.testing.assert_close(named["least_tokens"], (1 - tokens).clamp(min=0).mean())
    assert named["least_tokens"] > 0


def test_the_budget_is_reached(training_file, tmp_path):
    run = changes(warmup=20, hold=5) | {"steps": 60, "optimizer": {"lr": 1e-2}, "ema": None}
    run["task_options"]["model"] |= {"width_bias": 3.0, "token_bias": 3.0}
    run |= {"schedule": {"kind": "constant"}, "checkpoint_every": 1000, "batch_size": 32}
    export = train(training_file(**run))
    spent = [row["flops"] for row in records(tmp_path / "run")]
    assert spent[0] > 0.7 and sum(spent[-20:]) / 20 == pytest.approx(0.5, abs=0.06)
    model = models.load(export).eval()  # what inference spends without noise
    times = torch.linspace(0, 999, 32).long()
    with torch.no_grad(), choosing(model) as seen:
        model(torch.randn(32, 3, 8, 8), times, torch.zeros(32, dtype=torch.long))
    assert 0.25 < float(seen.ratio().mean()) < 0.75


def test_it_starts_from_a_static_network(training_file, tmp_path):
    static = train(training_file("static", steps=2, task_options={**changes()["task_options"], "arch": "dit",
                                                                 "model": SMALL}))  # fmt: skip
    options = {"arch": "dydit", "inherit_from": str(static), "process": "gaussian", "pixels": 8}
    stage = load(training_file(objective={"dydit": BUDGET}, task_options=options)).stages[0]
    task: Any = find(stage.task)(stage, tmp_path, {})
    before = models.load(static).eval()
    batch = (torch.randn(4, 3, 8, 8), torch.tensor([0, 300, 600, 999]), torch.zeros(4, dtype=torch.long))
    with torch.no_grad():
        assert torch.equal(task.model.eval()(*batch).sample, before(*batch).sample)


def test_updates_with_a_long_gradient_are_left_out(training_file, tmp_path):
    plain = changes() | {"steps": 2, "ema": None, "schedule": {"kind": "constant"}}
    start = train(training_file("start", **{**plain, "steps": 1, "optimizer": {"lr": 1e-12}}))
    skipped = train(training_file("skipped", **plain, optimizer={"lr": 1e-2, "skip_grad_norm": 1e-6}))
    moved = train(training_file("moved", **plain, optimizer={"lr": 1e-2, "skip_grad_norm": 1e6}))
    a, b, c = (models.load(folder).state_dict() for folder in (start, skipped, moved))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert any(not torch.allclose(a[name], c[name], atol=1e-4) for name in a)
    assert [row["skipped"] for row in records(tmp_path / "skipped")] == [1, 1]
    assert [row["skipped"] for row in records(tmp_path / "moved")] == [0, 0]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"objective": {"dydit": {}}}, ["dydit", "DiT choose nothing", "ditkit compress"]),
        ({"objective": {"dydit": {"flops": 1.5}}}, ["dydit.flops", "1.5"]),
        ({**changes(), "objective": {"dydit": BUDGET, "uncertainty-weighting": {"groups": 4}}}, ["times"]),
    ],
)
def test_what_does_not_fit_is_refused(training_file, tmp_path, run, words):
    with pytest.raises(ConfigError) as error:
        stage = load(training_file(**run)).stages[0]
        find(stage.task)(stage, tmp_path, {})
    assert all(word in str(error.value) for word in words), error.value


def test_a_budget_below_what_always_runs_is_refused(training_file):
    task, noise, rows = open_task(training_file(**changes(flops=0.02)))
    with pytest.raises(ValueError, match=r"flops=0\.02: what always runs spends 0\.\d+ already"):
        task(rows, noise)


def test_export_loads_as_a_pipeline(training_file, tmp_path):
    import ditkit

    export = train(training_file(steps=1, **changes("flow")))
    pipe = ditkit.load(export)
    pipe.set_progress_bar_config(disable=True)
    drawn: Any = pipe([0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert type(pipe.transformer).__name__ == "DySiT" and len(drawn.images) == 2
    assert Path(export / "transformer" / "config.json").is_file()
