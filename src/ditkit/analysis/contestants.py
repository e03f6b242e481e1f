"""Who takes part in a comparison: dense sampling, our methods, other libraries' methods, fewer steps."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ditkit import registry

if TYPE_CHECKING:
    from ditkit.recipes import Recipe

Kind = Literal["dense", "whole", "method", "peer", "plain"]
Attach = Callable[[Any, bool], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contestant:
    """One way to draw the pictures.

    Args:
        label: its name in tables.
        kind: dense, one of ours, another library's, plain sampling with fewer steps, or, of a model that
            chooses what it runs, all of it.
        attach: `attach(pipe, counting)` is a context manager in which the pipeline runs this way; `counting`
            tells whether its FLOPs are wanted. It yields a `Run` for our methods, None for the others.
        steps: denoising steps; None for those of the comparison.
    """

    label: str
    kind: Kind
    attach: Attach = field(repr=False)
    steps: int | None = None


def dense() -> Contestant:
    """The unchanged pipeline, against which all others are measured."""
    return Contestant("dense", "dense", _unchanged)


def plain(steps: int) -> Contestant:
    """The unchanged pipeline with fewer steps: what anyone can have without a method."""
    return Contestant(f"plain, {steps} steps", "plain", _unchanged, steps)


def whole() -> Contestant:
    """A model that chooses what it runs, with nothing left out: what its choices save shows beside it."""
    from ditkit.models.dynamic import choosing

    @contextlib.contextmanager
    def attach(pipe: Any, _: bool) -> Iterator[None]:
        with choosing(pipe.transformer, complete=True):
            yield

    return Contestant("nothing left out", "whole", attach)


def enter(given: Any) -> Contestant:
    """Whatever a comparison may be given: a contestant, a recipe, or what `ours` takes."""
    from ditkit.recipes import Recipe

    if isinstance(given, Contestant):
        return given
    return from_recipe(given) if isinstance(given, Recipe) else ours(given)


def ours(methods: Any) -> Contestant:
    """One of ditkit's methods, or several together.

    Args:
        methods: a method, a sequence of methods to apply together, or text as `parse` takes it.

    Raises:
        UnknownNameError, OptionError: from the text; with the nearest names, the valid options.
    """
    if isinstance(methods, str):
        methods = parse(methods)
    together = tuple(methods) if isinstance(methods, Sequence) else (methods,)
    if not together:
        raise ValueError("an empty sequence of methods was given; leave it out, dense takes part anyway")

    def attach(pipe: Any, counting: bool) -> contextlib.AbstractContextManager[Any]:
        from ditkit.seams.apply import apply

        return apply(pipe, *together, count_flops=counting)

    return Contestant(" + ".join(name_of(method) for method in together), "method", attach)


def parse(text: str) -> tuple[Any, ...]:
    """Methods from `"name:option=value,..."`; several to be applied together are joined by `+`."""
    return tuple(registry.parse_method(part) for part in re.split(r"\+(?=\s*[a-z])", text))


def from_recipe(recipe: Recipe) -> Contestant:
    """A recipe's methods, with its number of steps when it sets one.

    Raises:
        UnknownNameError, OptionError: a method or an option that is not there.
    """
    methods = recipe.build()

    def attach(pipe: Any, counting: bool) -> contextlib.AbstractContextManager[Any]:
        from ditkit.seams.apply import apply

        recipe.check(pipe)
        return apply(pipe, *methods, count_flops=counting) if methods else _unchanged(pipe, counting)

    label = recipe.describe() if methods or recipe.steps else "empty recipe"
    return Contestant(label, "method" if methods else "plain", attach, recipe.steps)


def name_of(method: Any) -> str:
    """A method as text that `parse` reads: its registered name and the options that are not defaults."""
    from ditkit.recipes import Recipe, RecipeError

    try:
        return Recipe.of([method]).describe()
    except RecipeError:  # one of the user's own, or with an option that text can't name
        return type(method).__name__


@contextlib.contextmanager
def _unchanged(_: Any, __: bool) -> Iterator[None]:
    yield
