"""What differs between transformer classes, written down once: the vocabulary and the look-up.

The facts themselves, one entry per class, are in `facts/`. Nothing here imports a model class; an entry is
found by the name of the class or of one of its bases, so subclasses of a known class are covered.

B batch, L image tokens, T text tokens, C width.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditkit.seams.errors import SeamError, UnsupportedModelError
from ditkit.seams.layout import TextPlace, TokenLayout

AttentionKind = Literal["self", "joint", "cross"]
View = Literal["all", "frame", "time"]
Seam = Literal["stack", "units", "tokens", "attention", "answer", "output"]
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Unit:
    """A module inside a block whose output a cache may replace, before the block gates and adds it.

    Args:
        module: path inside the block, e.g. `"attn"`.
        bypass: paths of modules that need not run when this unit is replaced, because only replaced units
            read them. A path listed by several units is bypassed when all of them are replaced.
        calls: how often the block calls it in one forward, e.g. 2 for a feed-forward for text and image.
        shared_without: path of a module; `calls` counts in blocks that lack it, elsewhere there is one call.
    """

    module: str
    bypass: tuple[str, ...] = ()
    calls: int = 1
    shared_without: str | None = None

    def calls_in(self, block: nn.Module) -> int:
        """How often this block calls it in one forward."""
        own = self.shared_without is not None and child(block, self.shared_without) is not None
        return 1 if own else self.calls


@dataclass(frozen=True)
class Attention:
    """An attention module inside a block.

    Args:
        module: path inside the block.
        kind: `"joint"`: image and text in one sequence; `"self"`: image tokens only; `"cross"`: image reads
            text, left alone by attention strategies.
    """

    module: str
    kind: AttentionKind


Rows = Callable[[Any, Tensor, int], Any]
"""(argument, token indices (K,), text length) -> the argument with the rows of those image tokens only."""


@dataclass(frozen=True)
class Stack:
    """A ModuleList of blocks of one kind.

    Args:
        path: of the ModuleList inside the model.
        arguments: names of the block's leading positional arguments, in order; first the hidden states.
        units: what a cache may replace inside each block; units that a block lacks are passed over.
        attention: the attention modules of each block.
        returns: what a block returns, in order.
        joint: text and image are one sequence when they enter the block; otherwise the hidden states are
            image tokens only and text, where there is any, is an argument of its own.
        whole: all tokens always run here: methods may leave some out in the stacks behind only.
        view: which tokens see each other: `"all"`; those of a `"frame"`, with the frames in the batch
            dimension; or one place through `"time"`, with the places in the batch dimension.
        token_rows: block arguments with a row for each image token (rotary tables, masks, per-token
            modulation), and how to select rows from them.
        per_token: argument -> is it modulation for each token apart? Then norms can't be bypassed by
            an empty tensor, because its length would not match.
        raster: (model, what a block returned, grid) -> image tokens (B, L, C) in raster order, where blocks
            return them in another form.
    """

    path: str
    arguments: tuple[str, ...]
    units: tuple[Unit, ...] = ()
    attention: tuple[Attention, ...] = ()
    returns: tuple[str, ...] = ("hidden_states",)
    joint: bool = False
    whole: bool = False
    view: View = "all"
    token_rows: Mapping[str, Rows] = field(default_factory=dict)
    per_token: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    raster: Callable[[nn.Module, Any, tuple[int, int, int]], Tensor] | None = None


def text_tokens(anatomy: Anatomy, model: nn.Module, arguments: Arguments) -> int:
    """All text states that were passed, padding included."""
    states = [arguments[name] for name in anatomy.encoder if arguments.get(name) is not None]
    return sum(int(state.shape[1]) for state in states)


@dataclass(frozen=True)
class Anatomy:
    """The facts on one class.

    Args:
        name: the class these facts were written for.
        stacks: the block lists in the order in which they run.
        text: where text stands in the attention sequence.
        grid: arguments of the model's forward, by name -> (F, H, W) in tokens.
        interleaved: the stacks run in turns, a block of each, instead of one after the other.
        sample: name of the forward's noisy input.
        encoder: names of the forward's text states, each (B, T, C), joined along T in the model.
        text_mask: names of the forward's (B, T) masks of valid text tokens, joined the same way.
        channels: axis of the channels in clips of five dimensions.
        packed: the pipeline packs packed x packed pixels into a token of (B, L, C), channel by channel.
        text_tokens: (these facts, model, arguments) -> T of the joint sequence, where it is not the length of
            the text states.
        timestep: name of the forward's timestep argument.
        falling_time: timesteps fall during a generation (diffusers), so that a rise tells a new one.
        varies: forwards of equal inputs' shapes differ in their work, since the model chooses what it runs.
        unfit: seam -> why no method can use it on this class: `"stack"`, to skip the blocks and supply the
            last one's output; `"units"`, to replace outputs inside them; `"tokens"`; `"attention"`;
            `"answer"`, to answer in place of the model; `"output"`, to change the grid that it gives.
        no_stack: why the stack of this model can't be skipped, by a check of it; None: it can.
        no_tokens: why the blocks can't run on a subset of tokens, by a check of the model and of a call;
            None: they can.
    """

    name: str
    stacks: tuple[Stack, ...]
    text: TextPlace
    grid: Callable[[nn.Module, Arguments], tuple[int, int, int]]
    interleaved: bool = False
    sample: str = "hidden_states"
    encoder: tuple[str, ...] = ("encoder_hidden_states",)
    text_mask: tuple[str, ...] = ()
    channels: int = 1
    packed: int = 1
    text_tokens: Callable[[Anatomy, nn.Module, Arguments], int] = text_tokens
    timestep: str = "timestep"
    falling_time: bool = True
    varies: bool = False
    unfit: Mapping[Seam, str] = field(default_factory=dict)
    no_stack: Callable[[nn.Module], str | None] = lambda model: None
    no_tokens: Callable[[nn.Module, Arguments], str | None] = lambda model, arguments: None

    def refuses(self, *seams: Seam) -> str | None:
        """Why a method can't use these seams of this class; None when it can."""
        return next((self.unfit[seam] for seam in seams if seam in self.unfit), None)

    def layout(self, model: nn.Module, arguments: Arguments) -> TokenLayout:
        """Where text and picture lie in the attention sequence of a forward with these arguments.

        Raises:
            SeamError: the tokens are not one raster grid (e.g. a reference image was appended).
        """
        states = [arguments[name] for name in self.encoder if arguments.get(name) is not None]
        masks = [arguments[name] for name in self.text_mask if arguments.get(name) is not None]
        length = self.text_tokens(self, model, arguments)
        complete = bool(masks) and len(masks) == len(states) and all(mask.ndim == 2 for mask in masks)
        complete = complete and sum(mask.shape[1] for mask in masks) == length
        layout = TokenLayout(
            grid=self.grid(model, arguments),
            text_length=length,
            text=self.text,
            text_mask=torch.cat([mask.bool() for mask in masks], dim=1) if complete else None,
        )
        sample = arguments[self.sample]
        packed = isinstance(sample, Tensor) and sample.ndim == 3
        if packed and sample.shape[1] not in (layout.image_length, layout.length):
            frames, height, width = layout.grid
            raise SeamError(
                f"{self.name}: {sample.shape[1]} image tokens are not one {frames} x {height} x {width} "
                "grid; methods that need the grid can't be applied to this call"
            )
        return layout

    def blocks(self, model: nn.Module) -> list[tuple[Stack, int, nn.Module]]:
        """Every block in running order: its stack, its index in the stack and the module."""
        stacks = [
            [(stack, index, block) for index, block in enumerate(model.get_submodule(stack.path).children())]
            for stack in self.stacks
        ]
        if self.interleaved:
            return [block for turn in itertools.zip_longest(*stacks) for block in turn if block is not None]
        return [block for stack in stacks for block in stack]


def child(block: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path inside a block, None where this block lacks it."""
    module: Any = block
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the model's forward, by name, without defaults."""
    return dict(inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments)


def known() -> dict[str, Anatomy]:
    """The facts by class name."""
    from ditkit.seams.facts import FACTS
    from ditkit.seams.facts.ours import OURS

    return {**FACTS, **OURS}


def unsupported() -> dict[str, str]:
    """Class name -> why no method runs on it, for the transformer classes of diffusers without facts."""
    from ditkit.seams.facts import UNSUPPORTED
    from ditkit.seams.facts.ours import REFUSED

    return {**UNSUPPORTED, **REFUSED}


def describe(model: nn.Module) -> Anatomy:
    """The facts on a model's class.

    Raises:
        UnsupportedModelError: with the class name and the reason; for a class that nobody has looked at, the
            nearest known ones and what to do.
    """
    facts, refused = known(), unsupported()
    name = type(model).__name__
    for cls in type(model).__mro__:
        if cls.__name__ in facts:
            return facts[cls.__name__]
        if cls.__name__ in refused:
            raise UnsupportedModelError(f"{name} is not supported: {refused[cls.__name__]}")
    near = difflib.get_close_matches(name, facts, n=3, cutoff=0.5) or sorted(facts)
    raise UnsupportedModelError(
        f"no anatomy is known for {name}. Nearest known: {', '.join(near)}. "
        "To add a class, write its entry in ditkit/seams/facts/; a subclass of a known class needs none."
    )


def readable(model: nn.Module) -> Anatomy:
    """The facts on a model's class, of classes too whose blocks can be read but not changed.

    Raises:
        UnsupportedModelError: see `describe`.
    """
    from ditkit.seams.facts.ours import READ_ONLY

    for cls in type(model).__mro__:
        if cls.__name__ in READ_ONLY:
            return READ_ONLY[cls.__name__]
    return describe(model)
