"""One model that carries methods: its facts, its clock, its seams and its counters."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from ditkit.seams.anatomy import Anatomy, Seam, describe
from ditkit.seams.blocks import BlockSeam
from ditkit.seams.cost import ModelCost
from ditkit.seams.errors import SeamError
from ditkit.seams.hooking import Around, Forward, Hooks
from ditkit.seams.layout import TokenLayout
from ditkit.seams.outputs import prediction_of, with_prediction
from ditkit.seams.stats import Stats, counting
from ditkit.seams.steps import Step, StepClock, shape_of
from ditkit.seams.tokens import TokenSeam

_OUTWARDS = ("attention", "tokens", "blocks")


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
        attaching: the method that is being attached, in words.
    """

    def __init__(
        self, model: nn.Module, pipeline: Any = None, name: str = "transformer", *, flops: bool = True
    ):
        self.entry = model
        self.model = model = inside(model)
        self.pipeline = pipeline
        self.name = name
        self.anatomy: Anatomy = describe(model)
        self.stats = Stats(count_flops=flops, varies=self.anatomy.varies)
        self.hooks = Hooks(model)
        self.clock = StepClock(model, self.anatomy, pipeline)
        self.running = False
        self.attaching = ""
        self.arguments: dict[str, Any] = {}
        self._text: int | None = None
        self._signature = inspect.signature(type(model).forward)
        self._removers: list[Callable[[], None]] = []
        self._notes: list[Callable[[], list[str]]] = []
        self._layouts: dict[Hashable, TokenLayout] = {}
        self._finishers: list[Callable[[Step, Tensor], Tensor]] = []
        self._seen: TokenLayout | None = None
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

    def finish(self, finisher: Callable[[Step, Tensor], Tensor]) -> None:
        """Let a method put another tensor of the same shape in place of the model's output.

        Raises:
            SeamError: the output of this class is not a grid of the picture's tokens alone.
        """
        self.require("output")
        self._finishers.append(finisher)

    def note(self, notes: Callable[[], list[str]]) -> None:
        """Let a method add plain words to the report when it is asked for."""
        self._notes.append(notes)

    def notes(self) -> list[str]:
        return [line for notes in self._notes for line in notes()]

    def require(self, *seams: Seam) -> None:
        """Refuse a method that needs a seam which this class does not have.

        Raises:
            SeamError: with the class and the reason.
        """
        reason = self.anatomy.refuses(*seams)
        if reason is not None:
            raise SeamError(
                f"{type(self.model).__name__} has no {seams[-1]} for a method to work on: {reason}"
            )

    def text_length(self) -> int:
        """Text tokens in the joint sequence of the forward that runs; of what cross-attention reads, where
        the text has attention modules of its own."""
        if self._text is None:
            # Once for each forward: some classes have to read a mask to know.
            self._text = self.anatomy.text_tokens(self.anatomy, self.model, self.arguments)
        return self._text

    def device(self) -> torch.device:
        """Where the sample of the forward that runs is."""
        sample = self.arguments[self.anatomy.sample]
        while not isinstance(sample, Tensor):
            sample = sample[0]
        return sample.device

    def image_rows(self) -> slice:
        """The image tokens in the joint sequence of the forward that runs, computed or not."""
        text = self.text_length()
        return slice(text, None) if self.anatomy.text == "prefix" else slice(0, -text if text else None)

    def layout(self) -> TokenLayout:
        """Where text and picture lie in the sequence of the forward that runs.

        Raises:
            SeamError: the tokens are not one grid.
        """
        # Equal shapes can mean another grid in the next generation: FLUX packs 32 x 64 and 64 x 32 alike.
        key = (self.clock.step.generation, self.clock.step.branch, _shapes(self.arguments))
        if key not in self._layouts:
            self._layouts[key] = self._seen = self.anatomy.layout(self.model, self.arguments)
        return self._layouts[key]

    def cost(self) -> ModelCost | None:
        """What a dense forward of this model takes, by what ran; None before the first one."""
        generations = max(self.stats.generations, 1)
        return self.stats.cost(max(round(self.stats.steps / generations), 1), self._seen)

    def attach(self, methods: tuple[Method, ...]) -> None:
        # Around the compiled module, so that the clock reads timesteps outside the graph.
        self.hooks.put(self.entry, "root", self._root)
        self.clock.attach()
        self.clock.on_schedule(self._stay)
        self.clock.on_reset(self._layouts.clear)
        for method in sorted(methods, key=_depth):
            self.attaching = describe_method(method)
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
        self._finishers.clear()
        self.arguments = {}
        self._layouts.clear()
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
        self.arguments, self._text = arguments, None
        step = self.clock.begin(arguments, self._root.context)
        start = time.perf_counter()
        self.running = True
        try:
            self.tokens.begin(arguments)
            self.blocks.begin(step)
            if "attention" in vars(self):
                self.attention.begin()
            shapes = _shapes(arguments)
            output = self._counted(self.blocks.around_model(forward), args, kwargs, shapes)
            for finisher in self._finishers:
                output = with_prediction(output, finisher(step, prediction_of(output)))
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
        modes = tuple(mode() for mode in self.stats.modes)
        return (modes, self.stats.forwards.total()) if self.stats.varies else modes

    def _counted(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Hashable
    ) -> Any:
        """Run a forward; count its FLOPs when none of its kind has been counted."""
        known = (shapes, self._kind()) in self.stats.kinds and not self.stats.misses(shapes)
        if known or not self.stats.count_flops:
            return forward(*args, **kwargs)
        # Compiled code does not run under the counter: this one forward is eager.
        with torch.compiler.set_stance("force_eager"), counting() as count:
            output = forward(*args, **kwargs)
        self.stats.kinds[shapes, self._kind()] = count
        return output


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


def _depth(method: Method) -> int:
    """How far outside its hooks lie. Those put on first lie inside: attention, around it the choice of
    tokens, around that the caches, which decide whether any of it runs."""
    return max((_OUTWARDS.index(seam) for seam in method.claims if seam in _OUTWARDS), default=-1)


def inside(module: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` returns."""
    return getattr(module, "_orig_mod", module)


def _shapes(arguments: dict[str, Any]) -> Hashable:
    return tuple((name, shape_of(value)) for name, value in arguments.items())
