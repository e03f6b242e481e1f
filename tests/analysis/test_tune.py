"""The search on a tiny pipeline: resumes, survives an interruption, writes what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ditkit
import tiny_pipelines
from ditkit.analysis import tune as module
from ditkit.analysis.contestants import from_recipe
from ditkit.analysis.metrics import relative_l2_each
from ditkit.analysis.result import BenchResult, Row
from ditkit.analysis.sampling import Sampling
from ditkit.analysis.selection import Outcome
from ditkit.analysis.tune import Objective, Trial, TuneError, split, thinned, tune
from ditkit.data.emoji_motion import read_caption
from ditkit.recipes import Recipe

PROMPTS = ["red apple", "green rocket", "cat face", "blue sun", "heart fish", "red cat", "blue apple", "sun"]
SAMPLING = Sampling(steps=6)
ASKED = {
    "prompts": PROMPTS,
    "sampling": SAMPLING,
    "methods": ["taylorseer", "local-window"],
    "name": "tiny",
    "repeats": 1,
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.flux()


@pytest.fixture
def steady(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Times that depend on the setting alone, not on the machine; gives the labels that were drawn."""
    drawn: list[str] = []

    def seconds(recipe: Recipe) -> float:
        steps = recipe.steps or SAMPLING.steps
        for method in recipe.build():
            if isinstance(method, ditkit.TaylorSeer):
                steps = method.computed_steps(steps)
        return steps / SAMPLING.steps

    real = Objective._draw
    real_bench = module.bench

    def draw(self: Objective, recipe: Recipe):
        drawn.append(recipe.describe())
        sample = real(self, recipe)
        sample.seconds = seconds(recipe)
        return sample

    def bench(pipe, recipes, prompts, *, sampling, **kwargs):
        if recipes and thorough:
            result = real_bench(pipe, recipes, prompts, sampling=sampling, **kwargs)
        else:  # errors only
            dense, *others = (real(Objective(pipe, prompts, sampling, 8), r) for r in [Recipe(), *recipes])
            labels = ["dense", *(from_recipe(recipe).label for recipe in recipes)]
            errors = [relative_l2_each(drawn.latents, dense.latents) for drawn in (dense, *others)]
            rows = [
                Row(label, "method", 6, latent_errors=each)
                for label, each in zip(labels, errors, strict=True)
            ]
            result = BenchResult(rows, list(prompts), {}, {"device": "cpu"})
        for row, recipe in zip(result.rows[1:], recipes, strict=True):
            row.time_ratio = seconds(recipe)
        return result

    thorough = "slow" in request.keywords
    monkeypatch.setattr(Objective, "_draw", draw)
    monkeypatch.setattr(module, "bench", bench)
    return drawn


@pytest.mark.slow
def test_a_search(pipe, steady, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.seams.cost.LITTLE", 1.2)  # the tiny model is an eighth attention
    seen: list[tuple[str, int, int]] = []
    result = tune(pipe, 0.4, tmp_path, trials=6, progress=lambda *news: seen.append(news), **ASKED)
    assert result.complete
    assert len(result.trials) == 6
    assert result.chosen is not None
    times = [trial.outcome.time_ratio for trial in result.front]
    errors = [trial.outcome.error for trial in result.front]
    assert times == sorted(times)
    assert errors == sorted(errors, reverse=True)
    # The recipe is the chosen trial's, measured on the other half of the prompts.
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe == result.recipe
    assert recipe.methods == result.chosen.recipe.methods
    assert recipe.model.model_class == "FluxTransformer2DModel"
    assert recipe.settings.steps == 6
    assert recipe.measured.time_ratio < 0.97
    assert recipe.measured.error <= recipe.measured.error_bound <= 0.4
    assert recipe.measured.prompts == 4
    assert result.held.prompts == PROMPTS[1::2]
    assert result.held.settings["seed"] != SAMPLING.seed
    # One recipe and one row of pictures for each point of the front.
    files = sorted((tmp_path / "front").glob("*.yaml"))
    assert [Recipe.load(path).describe() for path in files] == [t.recipe.describe() for t in result.front]
    assert all(Recipe.load(path).measured.error is not None for path in files)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == len(result.held.pictures) * 4
    assert "All trials" in page
    found = json.loads((tmp_path / "tune.json").read_text())
    assert len(found["trials"]) == 6
    assert "local-window" in found["left_out"]
    assert seen[0][1:] == (0, 6)
    # Dense sampling before every setting.
    assert steady[0] == "dense"
    assert steady[1::2] == ["dense"] * len(steady[1::2])


def test_a_second_call_goes_on(pipe, steady, tmp_path: Path) -> None:
    first = tune(pipe, 0.15, tmp_path, trials=3, **ASKED)
    steady.clear()
    again = tune(pipe, 0.15, tmp_path, trials=3, **ASKED)
    assert [t.recipe for t in again.trials] == [t.recipe for t in first.trials]
    assert set(steady) == {"dense"}  # nothing is measured twice


def test_an_interruption_keeps_the_finished_trials(pipe, steady, tmp_path: Path, monkeypatch) -> None:
    real, calls = Objective.__call__, []

    def interrupted(self, recipe, promising):
        calls.append(recipe)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, recipe, promising)

    monkeypatch.setattr(Objective, "__call__", interrupted)
    stopped = tune(pipe, 0.15, tmp_path, trials=5, **ASKED)
    assert not stopped.complete
    assert len(stopped.trials) == 2
    assert "Stopped after 2 of 5 trials" in stopped.headline()
    assert not (tmp_path / "recipe.yaml").exists()
    went_on = tune(pipe, 0.15, tmp_path, trials=4, **ASKED)
    assert went_on.complete
    assert went_on.trials[:2] == stopped.trials
    assert len(went_on.trials) == 4


def test_another_search_in_the_same_folder_is_refused(pipe, steady, tmp_path: Path) -> None:
    tune(pipe, 0.15, tmp_path, trials=1, **ASKED)
    with pytest.raises(TuneError, match=r"its steps is 6, now it is 9.*Use another folder"):
        tune(pipe, 0.15, tmp_path, trials=1, **{**ASKED, "sampling": Sampling(steps=9)})


def test_other_choices_than_a_study_began_with_are_refused(pipe, steady, tmp_path: Path, monkeypatch) -> None:
    """As after a new version of a method: optuna can't go on among other values."""
    tune(pipe, 0.15, tmp_path, trials=1, **ASKED)
    monkeypatch.setattr(module, "_choices", lambda methods: {"taylorseer": {"interval": "2 to 3"}})
    with pytest.raises(TuneError, match=r"its options is .*Use another folder"):
        tune(pipe, 0.15, tmp_path, trials=2, **ASKED)


def test_dense_when_nothing_keeps_the_budget(pipe, steady, tmp_path: Path) -> None:
    result = tune(pipe, 1e-9, tmp_path, trials=3, **ASKED)
    assert result.chosen is None
    assert "the recipe is dense sampling" in result.headline()
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.methods == ()
    assert recipe.steps is None
    with ditkit.apply(pipe, recipe=recipe) as run:
        assert run.methods == ()


def test_what_fails_costs_one_trial_and_is_told(pipe, steady, tmp_path: Path, monkeypatch) -> None:
    real = Objective.__call__

    def failing(self, recipe, promising):
        if recipe.methods:
            raise RuntimeError("not on this machine")
        return real(self, recipe, promising)

    monkeypatch.setattr(Objective, "__call__", failing)
    result = tune(pipe, 0.15, tmp_path, trials=3, **ASKED)
    assert result.failures
    assert "not on this machine" in result.failures[0]
    assert "Failed" in (tmp_path / "report.html").read_text()
    assert len(result.trials) + len(result.failures) >= 3


def test_a_lucky_round_is_measured_again(pipe, monkeypatch) -> None:
    times = iter([1.0, 1.0, 0.1, 1.0, 0.9, 1.0, 0.8, 1.0, 0.7])
    real = Objective._draw

    def draw(self, recipe):
        drawn = real(self, recipe)
        drawn.seconds = next(times)
        return drawn

    monkeypatch.setattr(Objective, "_draw", draw)
    objective = Objective(pipe, PROMPTS[:1], Sampling(steps=2), 1)
    recipe = Recipe(steps=1)
    assert objective(recipe, lambda found: found.time_ratio < 0.5).time_ratio == pytest.approx(0.5)
    assert objective(recipe, lambda found: False).time_ratio == pytest.approx(0.8)


def test_prompts_are_split(pipe) -> None:
    search, heldout = split([str(i) for i in range(9)], pipe)
    assert (search, heldout) == (["0", "2", "4", "6", "8"], ["1", "3", "5", "7"])
    assert split(["a", "b"], pipe) == (["a", "b"], ["a", "b"])
    for one in split(None, tiny_pipelines.wan()):
        assert all(read_caption(text) for text in one) and len(one) == 4
    search, heldout = split(None, pipe)
    assert len(search) == len(heldout) == 8
    assert not set(search) & set(heldout)
    with pytest.raises(ValueError, match="prompts is empty"):
        split([], pipe)


def test_the_default_prompts_are_known_to_the_bundled_model() -> None:
    known = (Path(ditkit.__file__).parent / "assets/emoji/captions.json").read_text(encoding="utf-8")
    assert all(f'"caption": "{caption}"' in known for caption in module.HELDOUT)


def test_a_long_front_keeps_its_ends() -> None:
    trials = [Trial(i, Recipe(), Outcome(0.1 + i * i / 1000, (1.0 / (i + 1),))) for i in range(30)]
    kept = thinned(trials, list(range(30)), 10)
    assert len(kept) == 10
    assert (kept[0], kept[-1]) == (0, 29)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"max_error": 0.0}, "max_error=0"), ({"trials": 0}, "trials=0"), ({"prompts": []}, "prompts is empty")],
)
def test_wrong_calls_before_any_work(pipe, tmp_path: Path, change, message) -> None:
    given = {"max_error": 0.1, "trials": 2, "prompts": PROMPTS, **change}
    with pytest.raises(ValueError, match=message):
        tune(pipe, given.pop("max_error"), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
