"""Recipes: what is written is read back, what does not fit is refused before any work."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import ditkit
import tiny_pipelines
from ditkit import registry
from ditkit.analysis.sampling import Sampling, sample
from ditkit.analysis.space import search_of
from ditkit.recipes import Measured, ModelName, Recipe, RecipeError, Settings
from ditkit.registry import OptionError, UnknownNameError

METHODS = (ditkit.TaylorSeer(interval=3, order=2, granularity="last-block"), ditkit.LocalWindow(radius=2.0))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.flux()


def recipe(pipe) -> Recipe:
    return Recipe.of(
        METHODS,
        steps=6,
        model=pipe.transformer,
        name="tiny",
        measured=Measured(error=0.01, time_ratio=0.5, error_bound=0.02, prompts=4, device="cpu"),
        settings=Settings(steps=8, guidance=2.0, size=(16, 16)),
    )


def test_a_recipe_reads_back(pipe, tmp_path: Path) -> None:
    written = recipe(pipe)
    read = Recipe.load(written.save(tmp_path / "recipe.yaml"))
    assert read == written
    assert read.build() == METHODS
    assert read.describe() == (
        "taylorseer:interval=3,order=2,granularity=last-block + local-window:radius=2, 6 steps"
    )
    text = (tmp_path / "recipe.yaml").read_text()
    assert "class: FluxTransformer2DModel" in text
    assert "interval: 3" in text


def test_only_changed_options_are_written(pipe) -> None:
    assert Recipe.of([ditkit.TaylorSeer()]).methods == ({"taylorseer": {}},)


def test_an_infinite_option_reads_back(tmp_path: Path) -> None:
    method = ditkit.LocalWindow(radius=float("inf"))
    path = Recipe.of([method]).save(tmp_path / "recipe.yaml")
    assert Recipe.load(path).build() == (method,)


@pytest.mark.parametrize("name", registry.entries("method"))
def test_every_method_reads_back_with_what_tune_tries(name: str) -> None:
    for way in range(3):
        values = {
            option: tried.values[way % len(tried.values)] if isinstance(tried, registry.Choice) else tried.low
            for option, tried in search_of(registry.get("method", name)).items()
        }
        method = registry.construct("method", name, values)
        recipe = Recipe.of([method])
        assert recipe.build() == (method,)
        assert registry.parse_method(recipe.describe()) == method


def test_apply_with_a_recipe_is_apply_with_its_methods(pipe, tmp_path: Path) -> None:
    path = recipe(pipe).model_copy(update={"steps": None}).save(tmp_path / "recipe.yaml")
    drawn = []
    for given in ({"recipe": path}, {"recipe": str(path)}, {"recipe": Recipe.load(path)}):
        with warnings.catch_warnings(), ditkit.apply(pipe, **given) as run:
            warnings.simplefilter("error")
            assert run.methods == METHODS
            drawn.append(sample(pipe, ["red apple"], Sampling(steps=6)).latents)
    with ditkit.apply(pipe, *METHODS):
        expected = sample(pipe, ["red apple"], Sampling(steps=6)).latents
    assert all(torch.equal(one, expected) for one in drawn)


def test_steps_are_left_to_the_caller_in_words(pipe) -> None:
    with pytest.warns(UserWarning, match="num_inference_steps=6"), ditkit.apply(pipe, recipe=recipe(pipe)):
        pass


def test_another_class_is_refused_before_any_work(pipe) -> None:
    other = recipe(pipe).model_copy(update={"model": ModelName(model_class="WanTransformer3DModel")})
    for target in (pipe, pipe.transformer):
        with pytest.raises(RecipeError, match=r"WanTransformer3DModel.*FluxTransformer2DModel"):
            ditkit.apply(target, recipe=other)
    assert not any("_diffusers_hook" in vars(module) for module in pipe.transformer.modules())


def test_a_recipe_without_methods_is_dense(pipe) -> None:
    empty = Recipe.of([], model=pipe.transformer)
    assert empty.describe() == "dense"
    assert Recipe.of([], steps=5).describe() == "plain, 5 steps"
    with ditkit.apply(pipe, recipe=empty) as run:
        assert run.methods == ()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[1, 2]", RecipeError, "expected keys and values, got list"),
        ("a: [", RecipeError, "not valid YAML"),
        ("methods: [!!python/object/apply:os.getcwd []]", RecipeError, "not valid YAML"),
        ("version: 2", RecipeError, "version"),
        ("methds: []", RecipeError, "methds: no such key"),
        ("methods: [{taylorseer: {}, local-window: {}}]", RecipeError, "method 1 must be one name"),
        ("methods: [{taylorser: {}}]", UnknownNameError, "taylorseer"),
        ("methods: [{taylorseer: {intervall: 3}}]", OptionError, "no option 'intervall'"),
        ("methods: [{taylorseer: {interval: 0}}]", OptionError, "interval"),
        ("methods: [{taylorseer: {interval: [1]}}]", RecipeError, "interval"),
        ("steps: 0", RecipeError, "steps"),
        ("measured: {error: -1}", RecipeError, "measured.error"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        Recipe.load(path)


def test_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Recipe.load("nowhere/recipe.yaml")


def test_text_is_read_by_the_type_of_the_option(tmp_path: Path) -> None:
    """YAML takes 1e1 for text."""
    path = tmp_path / "recipe.yaml"
    path.write_text("methods: [{local-window: {radius: 1e1}}]")
    assert Recipe.load(path).build() == (ditkit.LocalWindow(radius=10.0),)


def test_what_a_file_cannot_hold() -> None:
    weights = {"a": torch.ones(2, 2)}
    with pytest.raises(RecipeError, match="spatial_weight"):
        Recipe.of([ditkit.LocalWindow(down_factor=2, spatial_weight=weights)])
    with pytest.raises(RecipeError, match="not in the registry"):
        Recipe.of([object()])
