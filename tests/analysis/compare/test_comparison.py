"""A comparison end to end, at a size of seconds: equal cost, resume, a model that fails, the report."""

from __future__ import annotations

import base64
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from comparisons import BROKEN, TINY, written
from ditkit.analysis.compare import comparison, runs
from ditkit.analysis.compare.comparison import CompareError, compare
from ditkit.analysis.compare.config import load
from ditkit.analysis.compare.result import QUANTITIES
from ditkit.registry import UnknownNameError
from ditkit.training import trainer
from ditkit.training.config import ConfigError


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison, one model of which cannot be built."""
    folder = tmp_path_factory.mktemp("compare")
    compare(written(folder, models=[*TINY["models"], BROKEN]))
    return folder / "out"


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_flops_are_equal_within_a_step(done: Path) -> None:
    dit, lit, _ = found(done)["models"]
    budget = 6 * dit["flops_per_step"]
    assert dit["steps"] == 6
    assert lit["flops_per_step"] != dit["flops_per_step"]
    for model in (dit, lit):
        assert abs(model["flops"] - budget) < model["flops_per_step"]
        for run in model["runs"]:
            assert run["finished"]
            assert [point["step"] for point in run["points"]][-1] == model["steps"]
            assert run["points"][-1]["flops"] == model["flops"]


def test_every_run_is_measured_at_its_points(done: Path) -> None:
    result = found(done)
    for model in result["models"][:2]:
        assert [run["seed"] for run in model["runs"]] == [0, 1]
        for run in model["runs"]:
            assert len(run["points"]) == 2
            seconds = [point["seconds"] for point in run["points"]]
            assert 0 < seconds[0] < seconds[1]
            assert all(0 <= point["recognised"] <= 1 for point in run["points"])
        ends = [run["points"][-1]["loss"] for run in model["runs"]]
        spread = model["at_end"]["loss"]
        assert spread == {"mean": sum(ends) / 2, "low": min(ends), "high": max(ends), "seeds": 2}
    assert set(result["truth"]) == {"distance", "recognised"}


def test_a_model_that_cannot_be_built_is_reported(done: Path) -> None:
    broken = found(done)["models"][2]
    assert broken["name"] == "broken" and "33" in broken["failure"] and broken["runs"] == []


class _Page(HTMLParser):
    """The text and the pictures of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.sources = "", []

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.sources += [value for name, value in attrs if name == "src"]


def test_the_report_holds_every_figure_and_needs_nothing_else(done: Path) -> None:
    html = (done / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(html)
    result = found(done)
    for model in result["models"][:2]:
        assert str(model["steps"]) in page.text
        for quantity in QUANTITIES:
            figures = model["at_end"][quantity.key]
            for value in (figures["mean"], figures["low"], figures["high"]):
                assert quantity.show(value) in page.text
    assert result["models"][2]["failure"].split("(")[0] in page.text
    for text in result["verdicts"]:
        assert text in page.text
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert "http" not in re.sub(r"data:[^\"]+", "", html)
    svg = next(base64.b64decode(s.split(",")[1]).decode() for s in page.sources if "svg" in s)
    for label in ("steps", "seconds of training", "training FLOPs", "held-out loss", "dit", "lit"):
        assert f">{label}</text>" in svg
    # curves, true pictures, and for each model its last samples and those along the training
    assert len(page.sources) == 1 + 1 + 2 * (1 + 2)


def test_a_finished_comparison_is_not_repeated(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = found(done)

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(runs, "run_stage", refuse)
    again = compare(done.parent / "compare.yaml", resume=True)
    assert json.loads(json.dumps(again.as_dict())) == before


def test_an_output_in_use_is_refused(done: Path) -> None:
    with pytest.raises(FileExistsError, match="--resume"):
        compare(done.parent / "compare.yaml")


def test_a_run_with_other_settings_is_not_continued(done: Path) -> None:
    with pytest.raises(FileExistsError, match=r"run\.optimizer"):
        compare(done.parent / "compare.yaml", ["run.optimizer.lr=0.5"], resume=True)


def test_the_same_noise_for_every_seed_and_model(done: Path, tmp_path: Path) -> None:
    """Two models of one network under two names score the same, so nothing but the network tells."""
    dit = TINY["models"][0]
    result = compare(written(tmp_path, models=[dit, {**dit, "name": "twin"}], seeds=[0]))
    one, other = result.entries
    figures = [[(p.loss, p.distance, p.recognised) for p in e.runs[0].points] for e in (one, other)]
    assert figures[0] == figures[1]
    first = found(done)["models"][0]["runs"][0]["points"][-1]
    assert first["loss"] == one.runs[0].points[-1].loss


def test_a_stopped_comparison_continues(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the third run; then only what is missing runs, to the same figures."""
    path = written(tmp_path)
    take_step = trainer.Trainer._train_step

    def stopped(self: Any) -> Any:
        if self.run.seed == 1 and self.step == 4:
            raise KeyboardInterrupt
        return take_step(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(path)
    partial = found(tmp_path / "out")
    assert "not finished: seed 1" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert [run["finished"] for model in partial["models"] for run in model["runs"]] == [True, False] * 2
    steps: list[tuple[str, int]] = []

    def watched(self: Any) -> Any:
        steps.append((self.run.name, self.step))
        return take_step(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", watched)
    compare(path, resume=True)
    assert steps[0] == ("dit, seed 1", 3)  # from the checkpoint at the first point
    assert {name for name, _ in steps} == {"dit, seed 1", "lit, seed 1"}
    for whole, continued in zip(found(done)["models"], found(tmp_path / "out")["models"], strict=False):
        for one, other in zip(whole["runs"], continued["runs"], strict=True):
            ends = (one["points"][-1], other["points"][-1])
            assert ends[0]["loss"] == ends[1]["loss"] and ends[0]["distance"] == ends[1]["distance"]


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = trainer.Trainer._train_step

    def breaks(self: Any) -> Any:
        if self.run.name == "dit, seed 1":
            raise trainer.TrainingError("the loss at step 1 is <nan>")
        return take_step(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", breaks)
    result = compare(written(tmp_path))
    dit, lit = result.entries
    assert [run.finished for run in dit.runs] == [True, False] and all(run.finished for run in lit.runs)
    assert result.failures() == ["dit: seed 1: TrainingError: the loss at step 1 is <nan>"]
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "the loss at step 1 is &lt;nan&gt;" in html
    monkeypatch.setattr(trainer.Trainer, "_train_step", take_step)
    assert compare(tmp_path / "compare.yaml", resume=True).failures() == []


def test_all_models_failing_is_an_error(tmp_path: Path) -> None:
    models = [BROKEN, {**BROKEN, "name": "too"}]
    with pytest.raises(CompareError, match="every model failed"):
        compare(written(tmp_path, models=models, budget={"flops": 1e9}))


def test_the_reference_must_build(tmp_path: Path) -> None:
    budget = {"reference": "broken", "steps": 3}
    with pytest.raises(ConfigError, match="broken cannot be built"):
        comparison.plan(load(written(tmp_path, models=[*TINY["models"], BROKEN], budget=budget)))


def test_a_budget_below_one_step(tmp_path: Path) -> None:
    entries = comparison.plan(load(written(tmp_path, budget={"flops": 10.0})))
    assert all(entry.steps is None and "the budget is 10" in str(entry.failure) for entry in entries)


def test_equal_parameters(tmp_path: Path) -> None:
    changes = {"equal": "parameters", "budget": {"steps": 5}}
    entries = comparison.plan(load(written(tmp_path, **changes, tolerance=0.2)))
    assert [entry.steps for entry in entries] == [5, 5]
    wide = copy.deepcopy(TINY["models"])
    wide[1]["model"]["hidden_size"] = 64
    with pytest.raises(ConfigError, match=r"lit \d+,\d+.*within 20%"):
        comparison.plan(load(written(tmp_path, **changes, tolerance=0.2, models=wide)))


def test_an_unknown_architecture_is_refused_before_any_work(tmp_path: Path) -> None:
    models = [TINY["models"][0], {"name": "x", "arch": "dito"}]
    with pytest.raises(UnknownNameError, match="dit"):
        compare(written(tmp_path, models=models))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_the_task_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="no held-out 'msee'"):
        compare(written(tmp_path, evaluation={**TINY["evaluation"], "loss": "msee"}, seeds=[0]))


@pytest.mark.slow
def test_the_shipped_comparison(tmp_path: Path) -> None:
    """All seven architectures train, at a cost per sample of one order."""
    config = Path(__file__).parents[3] / "configs" / "compare_archs.yaml"
    small = ["points=1", "pictures=4", "draws=1", "sampling_steps=2"]
    changes = [f"output={tmp_path / 'out'}", "seeds=[0]", "budget.steps=2", "run.batch_size=16"]
    result = compare(config, [*changes, *(f"evaluation.{change}" for change in small)])
    assert len(result.entries) == 7 and result.failures() == []
    costs = [entry.flops_per_step for entry in result.entries]
    assert all(cost is not None and 0.7 < cost / (costs[0] or 1) < 1.5 for cost in costs)
