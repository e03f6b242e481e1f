"""Put methods on a pipeline or a transformer, and take them off again without a trace."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from ditkit import registry
from ditkit.seams.anatomy import describe
from ditkit.seams.cost import ceiling, words
from ditkit.seams.errors import ConflictError, UnsupportedModelError
from ditkit.seams.host import Host, Method, describe_method, inside
from ditkit.seams.stats import Report, combine

if TYPE_CHECKING:
    from ditkit.recipes import Recipe

__all__ = ["Host", "Method", "Run", "apply", "describe_method"]

_applied: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()


class Run:
    """Methods that are applied: a context manager, and a handle.

    Methods stay until `remove` is called or the `with` block ends; what was counted can be read afterwards.
    """

    def __init__(self, hosts: list[Host], methods: tuple[Method, ...]) -> None:
        self.hosts = hosts
        self.methods = methods
        self._last: Report | None = None

    @property
    def active(self) -> bool:
        """Are the methods still applied?"""
        return self._last is None

    def report(self) -> Report:
        """What happened since the methods were applied."""
        if self._last is not None:
            return self._last
        notes = list(dict.fromkeys(note for host in self.hosts for note in host.notes()))
        report = combine(
            [host.stats for host in self.hosts], [describe_method(m) for m in self.methods], notes
        )
        self._add_ceilings(report)
        return report

    def _add_ceilings(self, report: Report) -> None:
        """What each method can save at most on the model that took most."""
        costs = [found for found in (host.cost() for host in self.hosts) if found is not None]
        if not costs:
            return
        cost = max(costs, key=lambda found: found.whole)
        for method in self.methods:
            most = ceiling(method, cost)
            if most is not None:
                report.ceilings[describe_method(method)] = most
        little = words(cost)
        if little is not None and any("attention" in method.claims for method in self.methods):
            report.notes.append(little[0].upper() + little[1:] + ".")

    def restart(self) -> None:
        """The next forward starts a new generation. Only a loop of one's own over a bare transformer ever
        needs it, see `StepClock`."""
        for host in self.hosts:
            host.clock.restart()

    def remove(self) -> None:
        """Restore the models. Does nothing the second time."""
        if self._last is not None:
            return
        self._last = self.report()
        with contextlib.ExitStack() as undo:
            for host in self.hosts:
                _applied.pop(host.model, None)
                undo.callback(host.remove)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def apply(
    target: Any,
    *methods: Method,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    count_flops: bool = True,
) -> Run:
    """Put methods on a diffusers pipeline or a transformer.

    The order in which they are named does not matter. A cache decides first whether a step is computed; of a
    computed step a token method chooses the tokens that run; their attention runs sparse; weights may be
    quantized underneath. Each seam has one owner.

    Args:
        target: a `DiffusionPipeline` (each of its transformers is hooked) or a transformer of a class that
            `ditkit.seams.anatomy` knows.
        methods: e.g. `TaylorSeer(interval=4)`.
        recipe: a recipe or its file, see `ditkit.recipes`; its methods come before `methods`. When it sets a
            number of steps, that is left to the caller and a warning says so.
        count_flops: run the first forward of each kind under torch's FLOP counter, which slows it down.

    Returns:
        A handle that is a context manager too.

    Raises:
        UnsupportedModelError: no transformer of a known class.
        ConflictError: two methods claim one seam or can't work together, or the model carries methods
            already. Nothing stays hooked then.
        RecipeError: the recipe is for another class of model.
    """
    if recipe is not None:
        methods = (*_from_recipe(recipe, target), *methods)
    _check(methods)
    models = _models(target)
    for name, model in models:
        if inside(model) in _applied:
            carried = ", ".join(map(describe_method, _applied[inside(model)].methods)) or "an empty run"
            raise ConflictError(
                f"{name} already carries methods ({carried}). Call remove() on that run first, or pass all "
                "methods to one apply()"
            )
    pipeline = None if isinstance(target, nn.Module) else target
    hosts = [Host(model, pipeline, name, flops=count_flops) for name, model in models]
    run = Run(hosts, methods)
    try:
        for host in hosts:
            host.attach(methods)
    except BaseException:
        for host in hosts:
            host.remove()
        raise
    for host in hosts:
        _applied[host.model] = run
    return run


def _from_recipe(recipe: Recipe | str | os.PathLike[str], target: Any) -> tuple[Method, ...]:
    from ditkit.recipes import opened

    opened_recipe = opened(recipe)
    opened_recipe.check(target)
    if opened_recipe.steps is not None:
        warnings.warn(
            f"the recipe was measured with {opened_recipe.steps} denoising steps, which apply() can't set: "
            f"call the pipeline with num_inference_steps={opened_recipe.steps}",
            stacklevel=3,
        )
    return opened_recipe.build()


def _check(methods: tuple[Method, ...]) -> None:
    owner: dict[str, Method] = {}
    for method in methods:
        if isinstance(method, type) or not isinstance(method, Method):
            raise TypeError(
                f"{method!r} is not a method: it needs `claims` and `attach(host)`; pass an instance"
            )
        for seam in sorted(method.claims):
            if seam in owner:
                raise ConflictError(
                    f"{describe_method(owner[seam])} and {describe_method(method)} both claim the {seam} "
                    "seam; apply only one of them"
                )
            owner[seam] = method
    for one, other in itertools.permutations(methods, 2):
        first, second = registry.entry_of(one), registry.entry_of(other)
        if first is not None and second is not None and second.name in first.conflicts:
            raise ConflictError(
                f"{describe_method(one)} can't be combined with {describe_method(other)}; "
                "apply only one of them"
            )


def _models(target: Any) -> list[tuple[str, nn.Module]]:
    """Names and modules of the transformers in a target."""
    if isinstance(target, nn.Module):
        describe(inside(target))
        return [("transformer", target)]
    parts = getattr(target, "components", None)
    if not isinstance(parts, dict):
        raise UnsupportedModelError(
            f"target must be a DiffusionPipeline or a transformer module; got {type(target).__name__}"
        )
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    denoisers = [
        (name, module)
        for name, module in modules.items()
        if name.startswith("transformer") or name.endswith("_transformer")
    ]
    if not denoisers:
        raise UnsupportedModelError(
            f"{type(target).__name__} has no transformer; its parts are {', '.join(modules) or 'none'}. "
            "U-Nets and other denoisers are not supported"
        )
    for _, module in denoisers:
        describe(inside(module))
    return denoisers
