"""The space: from the registry, without what can't run together, does not fit or can't pay."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import ditkit
import tiny_pipelines
from ditkit import registry
from ditkit.analysis.space import PLAIN, Space, default, search_of, space_for
from ditkit.registry import Choice, Range
from ditkit.seams.cost import ModelCost

LARGE = ModelCost(steps=12, whole=100.0, attention=80.0, outside=1.0, grid=(1, 64, 64), text_length=8)
SMALL = ModelCost(steps=12, whole=100.0, attention=5.0, outside=1.0, grid=(1, 4, 4), text_length=8)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.flux()


@pytest.fixture(scope="module")
def space(pipe) -> Space:
    return space_for(pipe, LARGE)


class Random:
    """A trial that answers at random, and checks that equal questions have equal answers to choose from."""

    asked: dict[str, Any] = {}

    def __init__(self, seed: int) -> None:
        self.random = __import__("random").Random(seed)
        self.names: list[str] = []

    def _ask(self, name: str, way: Any) -> None:
        assert name not in self.names
        self.names.append(name)
        assert self.asked.setdefault(name, way) == way

    def suggest_categorical(self, name, choices):
        self._ask(name, tuple(choices))
        return self.random.choice(list(choices))

    def suggest_int(self, name, low, high, *, log=False):
        self._ask(name, (low, high, log))
        return self.random.randint(low, high)

    def suggest_float(self, name, low, high, *, log=False):
        self._ask(name, (low, high, log))
        return self.random.uniform(low, high)


def test_every_suggestion_can_be_applied(pipe, space) -> None:
    combined = set()
    for seed in range(60):
        recipe = space.suggest(Random(seed))
        assert recipe.steps is None or 2 <= recipe.steps < 12
        with ditkit.apply(pipe, *recipe.build(), count_flops=False):
            combined.add(tuple(name for method in recipe.methods for name in method))
    assert () in combined
    assert {len(names) for names in combined} >= {0, 1, 2}
    assert set(itertools.chain(*combined)) == set(space.methods)


def test_every_method_names_its_options() -> None:
    """Those whose options all come with their learned parts need none: the folder is what is tried."""
    for name, entry in registry.entries("method").items():
        search = search_of(entry)
        assert search or "weights" in registry.options(entry), f"{name} has no `search`"
        assert set(search) <= set(registry.options(entry)), name
        for way in search.values():
            assert set(way.when) <= set(search), name
            for value in way.values if isinstance(way, Choice) else (way.low, way.high):
                assert value is None or isinstance(value, (bool, int, float, str))
            if isinstance(way, Range):
                assert way.low < way.high
                assert not way.log or way.low > 0


def test_sparse_attention_is_left_out_where_it_cannot_pay(pipe) -> None:
    found = space_for(pipe, SMALL, ["local-window", "taylorseer"])
    assert set(found.methods) == {"taylorseer"}
    assert "too little for sparse attention to pay" in found.left_out["local-window"]


def test_what_the_model_refuses_is_left_out_with_its_reason() -> None:
    pipe = tiny_pipelines.flux(double=1, single=0)
    found = space_for(pipe, LARGE, ["cg-taylor", "taylorseer"])
    assert set(found.methods) == {"taylorseer"}
    assert "1 block" in found.left_out["cg-taylor"]


def test_methods_that_exclude_one_another_are_one_choice(pipe) -> None:
    found = space_for(pipe, LARGE, ["taylorseer", "cg-taylor", "local-window"])
    assert sorted(map(sorted, found.groups)) == [["cg-taylor", "taylorseer"], ["local-window"]]
    assert found.apart == frozenset()


def test_pairs_across_groups_are_asked_apart() -> None:
    space = Space(
        12,
        {"taylorseer": {}, "local-window": {}},
        (("taylorseer",), ("local-window",)),
        apart=frozenset({frozenset({"taylorseer", "local-window"})}),
    )
    for seed in range(30):
        assert len(space.suggest(Random(seed)).methods) <= 1


def test_an_option_that_another_method_forbids_is_not_offered() -> None:
    space = Space(
        12,
        {"taylorseer": {}, "local-window": {}},
        (("taylorseer",), ("local-window",)),
        barred={("taylorseer", "granularity"): {"local-window": ("module",)}},
    )
    both = alone = 0
    for seed in range(60):
        methods = {name: o for method in space.suggest(Random(seed)).methods for name, o in method.items()}
        if len(methods) == 2:
            assert methods["taylorseer"]["granularity"] == "last-block"
            both += 1
        elif "taylorseer" in methods:
            alone += methods["taylorseer"]["granularity"] == "module"
    assert both
    assert alone


def test_conditions_are_kept(space) -> None:
    for seed in range(60):
        for method in space.suggest(Random(seed)).methods:
            options = method.get("taylorseer")
            if options is not None:
                assert ("expansion" in options) == (options["order"] == 2)
                assert ("reach" in options) == (options["order"] > 0)


def test_the_search_begins_with_each_method_alone(space) -> None:
    starts = space.starts()
    assert starts[0][PLAIN] == 4
    assert len(starts) == 1 + len(space.methods)


def test_a_folder_of_weights_is_an_option_of_every_suggestion() -> None:
    space = Space(12, {"taylorseer": {"schedule": "dit"}}, (("taylorseer",),))
    for seed in range(20):
        for method in space.suggest(Random(seed)).methods:
            assert method["taylorseer"]["schedule"] == "dit"


@pytest.mark.parametrize("name", registry.entries("method"))
def test_the_first_tried_values_are_valid(name: str) -> None:
    if "weights" not in registry.options(registry.get("method", name)):
        assert default(name, {}) is not None
