"""Put methods on a pipeline or a transformer, and take them off again without a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import time
import weakref
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from ditkit.seams.anatomy import Anatomy, describe
from ditkit.seams.blocks import BlockSeam
from ditkit.seams.errors import ConflictError, UnsupportedModelError
from ditkit.seams.hooking import Around, Forward, Hooks
from ditkit.seams.layout import TokenLayout
from ditkit.seams.stats import Report, Stats, combine, counting
from ditkit.seams.steps import StepClock
from ditkit.seams.tokens import TokenSeam

_applied: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()


@runtime_checkable
class Method(Protocol):
    """A method for inference: a dataclass of its options. All its state lives in what `attach` makes, since
    a pipeline with two transformers attaches it twice.

    Args:
        claims: seams that no other method may own beside it, e.g. `{"blocks"}`.
    """

    claims: ClassVar[frozenset[str]]

    def attach(self, host: Host) -> None:
        """Hook into the seams of one model. Raises before anything runs when it can't work on this model."""


class _Root(Around):
    """The hook on the transformer itself. It is stateful so that diffusers tells it the cache context."""

    _is_stateful = True

    def __init__(self, around: Callable[..., Any]) -> None:
        super().__init__(around)
        self._contexts = StateManager(BaseState)  # type: ignore[arg-type]

    @property
    def context(self) -> str | None:
        try:
            return self._contexts.context.name
        except ValueError:
            return None

    def reset_state(self, module: nn.Module) -> None:
        self._contexts.set_context(None)


class Host:
    """One model that carries methods: its facts, its clock, its seams and its counters.

    Attributes:
        name: of the model inside the pipeline, `"transformer"` for a bare one.
        entry: what is called from outside: the model, or the compiled module around it.
        running: True inside a forward of the model.
        arguments: of the forward that runs, by name.
    """

    def __init__(
        self, model: nn.Module, pipeline: Any = None, name: str = "transformer", *, flops: bool = True
    ):
        self.entry = model
        self.model = model = _inside(model)
        self.pipeline = pipeline
        self.name = name
        self.anatomy: Anatomy = describe(model)
        self.stats = Stats(count_flops=flops)
        self.hooks = Hooks(model)
        self.clock = StepClock(model, self.anatomy, pipeline)
        self.running = False
        self.arguments: dict[str, Any] = {}
        self._signature = inspect.signature(type(model).forward)
        self._removers: list[Callable[[], None]] = []
        self._notes: list[Callable[[], list[str]]] = []
        self._layout: tuple[Hashable, TokenLayout] | None = None
        self._root = _Root(self.around)
        self.blocks = BlockSeam(self)
        self.tokens = TokenSeam(self)

    @functools.cached_property
    def attention(self) -> Any:
        """The attention seam of this model."""
        from ditkit.seams.attention import AttentionSeam

        return AttentionSeam(self)

    def on_remove(self, callback: Callable[[], None]) -> None:
        """Call back when the methods are taken off, after the last forward."""
        self._removers.append(callback)

    def note(self, notes: Callable[[], list[str]]) -> None:
        """Let a method add plain words to the report when it is asked for."""
        self._notes.append(notes)

    def notes(self) -> list[str]:
        return [line for notes in self._notes for line in notes()]

    def layout(self) -> TokenLayout:
        """Where text and picture lie in the sequence of the forward that runs.

        Raises:
            SeamError: the tokens are not one grid.
        """
        key = (self.clock.step.generation, self.clock.step.branch, _shapes(self.arguments))
        if self._layout is None or self._layout[0] != key:
            self._layout = (key, self.anatomy.layout(self.model, self.arguments))
        return self._layout[1]

    def attach(self, methods: tuple[Method, ...]) -> None:
        # Around the compiled module, so that the clock reads timesteps outside the graph.
        self.hooks.put(self.entry, "root", self._root)
        self.clock.attach()
        self.clock.on_schedule(self._stay)
        # A module whose output is replaced makes no attention call: what watches for one has to lie inside,
        # and hooks put on first lie inside. The order in which methods are named must not matter.
        for method in sorted(methods, key=lambda method: "attention" not in method.claims):
            method.attach(self)

    def remove(self) -> None:
        """Undo everything; every part is tried even when one fails."""
        failures: list[BaseException] = []
        for undo in [*reversed(self._removers), self.clock.restart, self.clock.detach, self.hooks.remove]:
            try:
                undo()
            except Exception as failure:
                failures.append(failure)
        self._removers.clear()
        self._notes.clear()
        self.arguments = {}
        self._layout = None
        if failures:
            raise failures[0]

    def _stay(self) -> None:
        """accelerate's offloading puts back the forward of before when a generation ends: hook it again."""
        if self.hooks.lost(self.entry):
            self.hooks.put_back(self.entry)

    @torch.compiler.disable(
        recursive=False, reason="compile first, then apply: ditkit.apply(torch.compile(model), ...)"
    )
    def around(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one forward of the model: tell the seams that it starts and ends, and count it."""
        if self.running:
            return forward(*args, **kwargs)
        arguments = dict(self._signature.bind_partial(self.model, *args, **kwargs).arguments)
        arguments.pop("self", None)
        self.arguments = arguments
        step = self.clock.begin(arguments, self._root.context)
        start = time.perf_counter()
        self.running = True
        try:
            self.tokens.begin(arguments)
            self.blocks.begin(step)
            if "attention" in vars(self):
                self.attention.begin()
            shapes = _shapes(arguments)
            output = self._counted(forward, args, kwargs, shapes)
        except BaseException:
            self.clock.restart()
            raise
        finally:
            self.running = False
            computed = self.blocks.end()
            self.tokens.end()
            if "attention" in vars(self):
                self.attention.end()
            self.arguments = {}
        self.stats.seconds += time.perf_counter() - start
        self.stats.generations = self.clock.generation + 1
        self.stats.forward((step.generation, step.index), step.branch, computed, shapes, self._kind())
        if computed:
            self.stats.measure()
        return output

    def _kind(self) -> Hashable:
        return tuple(mode() for mode in self.stats.modes)

    def _counted(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Hashable
    ) -> Any:
        """Run a forward; count its FLOPs when none of its kind has been counted."""
        if not self.stats.count_flops or (shapes, self._kind()) in self.stats.kinds:
            return forward(*args, **kwargs)
        # Compiled code does not run under the counter: this one forward is eager.
        with torch.compiler.set_stance("force_eager"), counting() as count:
            output = forward(*args, **kwargs)
        self.stats.kinds[shapes, self._kind()] = count
        return output


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
        return combine([host.stats for host in self.hosts], [describe_method(m) for m in self.methods], notes)

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


def apply(target: Any, *methods: Method, count_flops: bool = True) -> Run:
    """Put methods on a diffusers pipeline or a transformer.

    Args:
        target: a `DiffusionPipeline` (each of its transformers is hooked) or a transformer of a class that
            `ditkit.seams.anatomy` knows.
        methods: e.g. `TaylorSeer(interval=4)`.
        count_flops: run the first forward of each kind under torch's FLOP counter, which slows it down.

    Returns:
        A handle that is a context manager too.

    Raises:
        UnsupportedModelError: no transformer of a known class.
        ConflictError: two methods claim one seam, or the model carries methods already. Nothing is hooked
            then.
    """
    _check(methods)
    models = _models(target)
    for name, model in models:
        if _inside(model) in _applied:
            carried = ", ".join(map(describe_method, _applied[_inside(model)].methods)) or "an empty run"
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


def describe_method(method: Method) -> str:
    """The method's class with the options that are not the default, e.g. `TaylorSeer(interval=3)`."""
    if not dataclasses.is_dataclass(method):
        return repr(method)
    changed = [
        f"{option.name}={getattr(method, option.name)!r}"
        for option in dataclasses.fields(method)
        if option.repr and getattr(method, option.name) != option.default
    ]
    return f"{type(method).__name__}({', '.join(changed)})"


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


def _models(target: Any) -> list[tuple[str, nn.Module]]:
    """Names and modules of the transformers in a target."""
    if isinstance(target, nn.Module):
        describe(_inside(target))
        return [("transformer", target)]
    parts = getattr(target, "components", None)
    if not isinstance(parts, dict):
        raise UnsupportedModelError(
            f"target must be a DiffusionPipeline or a transformer module; got {type(target).__name__}"
        )
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    denoisers = [(name, module) for name, module in modules.items() if name.startswith("transformer")]
    if not denoisers:
        raise UnsupportedModelError(
            f"{type(target).__name__} has no transformer; its parts are {', '.join(modules) or 'none'}. "
            "U-Nets and other denoisers are not supported"
        )
    for _, module in denoisers:
        describe(_inside(module))
    return denoisers


def _inside(module: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` returns."""
    return getattr(module, "_orig_mod", module)


def _shapes(arguments: dict[str, Any]) -> Hashable:
    return tuple(
        (name, tuple(value.shape) if isinstance(value, Tensor) else None) for name, value in arguments.items()
    )
