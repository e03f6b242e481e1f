"""What `tune` searches: which methods together, with which options, over how many steps.

The space comes from the registry: each method's class variable `search` names its options worth trying. What
can't be applied together, what the model refuses and what can't pay by its ceiling is left out beforehand, so
that no trial is spent on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ditkit import registry
from ditkit.recipes import Recipe
from ditkit.registry import Choice, Entry, Range, Search
from ditkit.seams.apply import apply
from ditkit.seams.cost import LITTLE, ModelCost, ceiling, words
from ditkit.seams.errors import ConflictError, SeamError, UnsupportedModelError

NONE, PLAIN = "none", "plain steps"


class Suggests(Protocol):
    """The part of an optuna trial that is used."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


@dataclass(frozen=True)
class Space:
    """Everything that may be tried on one pipeline.

    Args:
        steps: of dense sampling; fewer are tried too.
        methods: by name, with the options to be given always (a folder of weights).
        groups: the methods that stand for one another, of which at most one is applied.
        apart: pairs of methods of different groups that can't be applied together.
        barred: (method, option) -> other method -> values that can't be applied beside it.
        left_out: method -> why it is not tried.
        fewest_steps: the least number of steps tried.
    """

    steps: int
    methods: Mapping[str, Mapping[str, Any]]
    groups: tuple[tuple[str, ...], ...]
    apart: frozenset[frozenset[str]] = frozenset()
    barred: Mapping[tuple[str, str], Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    fewest_steps: int = 2

    def suggest(self, trial: Suggests) -> Recipe:
        """A recipe by a trial's choices; what does not matter for it is not asked."""
        chosen: list[str] = []
        for group in self.groups:
            open_ = [name for name in group if all({name, other} not in self.apart for other in chosen)]
            if not open_:
                continue
            # The same question has the same answers; with fewer left it is another question.
            where = (
                "+".join(group)
                if len(open_) == len(group)
                else f"{'+'.join(group)} beside {'+'.join(chosen)}"
            )
            picked = trial.suggest_categorical(where, [NONE, *open_])
            if picked != NONE:
                chosen.append(picked)
        methods = tuple({name: self._options(trial, name, chosen)} for name in chosen)
        steps = None
        if not chosen or trial.suggest_categorical("fewer steps", [False, True]):
            steps = trial.suggest_int("steps" if chosen else PLAIN, self.fewest_steps, self.steps)
        return Recipe(methods=methods, steps=None if steps == self.steps else steps)

    def _options(self, trial: Suggests, name: str, chosen: Sequence[str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for option, way in search_of(registry.get("method", name)).items():
            if any(values.get(other) not in allowed for other, allowed in way.when.items()):
                continue
            question = f"{name}: {option}"
            beside = [other for other in self.barred.get((name, option), {}) if other in chosen]
            if beside and isinstance(way, Choice):
                barred = [value for other in beside for value in self.barred[name, option][other]]
                way = Choice(tuple(value for value in way.values if value not in barred), way.when)
                question += f" beside {'+'.join(beside)}"
            values[option] = _ask(trial, question, way)
        return {**values, **self.methods[name]}

    def starts(self) -> list[dict[str, Any]]:
        """Choices to begin with: a third of the steps, and each method alone with moderate options."""
        recorders = [_Recorder(plain_steps=max(self.fewest_steps, self.steps // 3))]
        recorders += [_Recorder([name]) for name in self.methods]
        for recorder in recorders:
            self.suggest(recorder)
        return [recorder.answers for recorder in recorders]


def space_for(
    pipe: Any,
    cost: ModelCost,
    names: Sequence[str] | None = None,
    weights: Mapping[str, str | Path] | None = None,
    steps: int | None = None,
) -> Space:
    """The space of a pipeline.

    Args:
        pipe: a pipeline or a transformer.
        cost: of a dense forward, for the ceilings.
        names: methods to consider; None for all of the registry.
        weights: method -> folder of its learned parts; methods that need one and have none are left out.
        steps: of dense sampling; None for those of `cost`.

    Raises:
        UnknownNameError: a name that is not in the registry.
    """
    entries = [registry.get("method", name) for name in names or registry.entries("method")]
    fixed = {registry.get("method", name).name: str(folder) for name, folder in (weights or {}).items()}
    methods: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for entry in entries:
        options = {"weights": fixed[entry.name]} if entry.name in fixed else {}
        reason = _why_not(pipe, entry, options, cost)
        if reason is None:
            methods[entry.name] = options
        else:
            left_out[entry.name] = reason
    apart = {
        frozenset((one, other))
        for one, other in itertools.combinations(methods, 2)
        if _conflict(pipe, default(one, methods[one]), default(other, methods[other]))
    }
    groups = _groups(list(methods), apart)
    crossing = frozenset(pair for pair in apart if not any(pair <= set(group) for group in groups))
    barred = _barred(pipe, methods, apart)
    return Space(steps or cost.steps, methods, groups, crossing, barred, left_out)


def search_of(entry: Entry) -> Search:
    """The options of a method that are worth trying."""
    return getattr(entry.target, "search", {})


def default(name: str, options: Mapping[str, Any], **told: Any) -> Any:
    """A method at the first of its tried values, to see whether it takes a model.

    Args:
        name: of the method.
        options: to be given always.
        told: other values of tried options.
    """
    values: dict[str, Any] = {}
    for option, way in search_of(registry.get("method", name)).items():
        if all(values.get(other) in allowed for other, allowed in way.when.items()):
            first = way.values[0] if isinstance(way, Choice) else way.low
            values[option] = told.get(option, first)
    return registry.construct("method", name, {**values, **options})


def _why_not(pipe: Any, entry: Entry, options: Mapping[str, Any], cost: ModelCost) -> str | None:
    if not search_of(entry) and not options:
        return "it names no options to search"
    takes_weights = "weights" in registry.options(entry)
    if takes_weights and {"training", "fitting"} & set(entry.needs) and not options:
        return "it needs weights that were fitted to this model: give their folder"
    try:
        method = default(entry.name, options)
        with apply(pipe, method, count_flops=False):
            pass
    except (SeamError, UnsupportedModelError, ConflictError, registry.OptionError, OSError) as refusal:
        return " ".join(str(refusal).split())
    if "attention" in entry.seam and "tokens" not in entry.seam:
        return words(cost)
    most = ceiling(method, cost)
    if most is not None and most < LITTLE:
        return f"it can make this model at most {most:.2f} times faster"
    return None


def _conflict(pipe: Any, one: Any, other: Any) -> bool:
    try:
        with apply(pipe, one, other, count_flops=False):
            return False
    except (ConflictError, SeamError):
        return True


def _barred(
    pipe: Any, methods: Mapping[str, Mapping[str, Any]], apart: set[frozenset[str]]
) -> dict[tuple[str, str], dict[str, tuple[Any, ...]]]:
    """Values of an option at which two methods can't be combined that otherwise can."""
    found: dict[tuple[str, str], dict[str, tuple[Any, ...]]] = {}
    for name, other in itertools.permutations(methods, 2):
        if frozenset((name, other)) in apart:
            continue
        beside = default(other, methods[other])
        for option, way in search_of(registry.get("method", name)).items():
            if not isinstance(way, Choice):
                continue
            bad = tuple(
                value
                for value in way.values[1:]
                if _conflict(pipe, default(name, methods[name], **{option: value}), beside)
            )
            if bad:
                found.setdefault((name, option), {})[other] = bad
    return found


def _groups(names: Sequence[str], apart: set[frozenset[str]]) -> tuple[tuple[str, ...], ...]:
    """Methods that pairwise exclude one another, together; greedy, in the order of the names."""
    groups: list[list[str]] = []
    for name in names:
        home = next((g for g in groups if all(frozenset((name, other)) in apart for other in g)), None)
        if home is None:
            groups.append([name])
        else:
            home.append(name)
    return tuple(tuple(group) for group in groups)


def _ask(trial: Suggests, name: str, way: Choice | Range) -> Any:
    if isinstance(way, Choice):
        return trial.suggest_categorical(name, list(way.values))
    if isinstance(way.low, int) and isinstance(way.high, int):
        return trial.suggest_int(name, way.low, way.high, log=way.log)
    return trial.suggest_float(name, way.low, way.high, log=way.log)


@dataclass
class _Recorder:
    """Answers a space's questions with the wanted methods and the middle of their options, and keeps that."""

    methods: Sequence[str] = ()
    plain_steps: int | None = None
    answers: dict[str, Any] = field(default_factory=dict)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        answer = next((choice for choice in choices if choice in self.methods), choices[0])
        self.answers[name] = answer
        return answer

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        wanted = self.plain_steps if name == PLAIN and self.plain_steps else round(_between(low, high, log))
        self.answers[name] = wanted
        return wanted

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.answers[name] = _between(low, high, log)
        return self.answers[name]


def _between(low: float, high: float, log: bool) -> float:
    """A third of the way from the low end, where methods change the least."""
    return low * (high / low) ** (1 / 3) if log else low + (high - low) / 3
