"""Read what lies inside a model during a forward: tokens behind blocks, queries and keys of attention.

Where blocks and attention are, and what a block returns, are facts on the class (`facts/`). Nothing of the
forward changes, and nothing stays on the model afterwards. Blocks and attention layers are counted from 1,
in running order, as papers count them.

B batch, L image tokens, C width, h heads, d head dim.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditkit.seams.anatomy import Stack, bind, readable
from ditkit.seams.apply import Host, apply
from ditkit.seams.attention import AttentionCall, Dense, attention_modules
from ditkit.seams.errors import SeamError
from ditkit.seams.layout import TokenLayout


@dataclass(frozen=True)
class Reading:
    """What to read.

    Args:
        hidden: blocks behind which the image tokens are read.
        attention: self- or joint attention layers whose queries and keys are read.
    """

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()

    def __or__(self, other: Reading) -> Reading:
        return Reading(self.hidden | other.hidden, self.attention | other.attention)


@dataclass(frozen=True)
class QueriesAndKeys:
    """Of the image tokens in one attention layer, as its softmax gets them.

    Args:
        query, key: (B, h, L, d).
        scale: of their products; None: 1 / sqrt(d).
    """

    query: Tensor
    key: Tensor
    scale: float | None = None

    def of_frames(self, frames: int) -> QueriesAndKeys:
        """Those of each of so many frames, which follow each other, by itself: (B F, h, L / F, d)."""
        query, key = (part.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)
                      for part in (self.query, self.key))  # fmt: skip
        return QueriesAndKeys(query, key, self.scale)

    def logits(self, heads: int | None = None) -> Tensor:
        """What the softmax over keys is taken of, for the first `heads` heads, (B, heads, L, L), float32."""
        query, key = self.query[:, :heads].float(), self.key[:, :heads].float()
        scale = 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale
        with torch.autocast(query.device.type, enabled=False):
            return (query * scale) @ key.transpose(-1, -2)


@dataclass
class Inside:
    """What was read in the last forward.

    Attributes:
        grid: (F, H, W) of the image tokens.
        hidden: block -> image tokens behind it in raster order, (B, L, C).
        attention: layer -> its queries and keys.
    """

    grid: tuple[int, int, int] = (0, 0, 0)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, QueriesAndKeys] = field(default_factory=dict)


def check(model: nn.Module, what: Reading) -> None:
    """Refuse to read what is not there.

    Raises:
        SeamError: a block or layer that the model does not have, or attention of another kind than a softmax
            over its tokens, with the reason.
    """
    anatomy, name = readable(model), type(model).__name__
    _known("block", what.hidden, len(anatomy.blocks(model)), name)
    if what.attention:
        if reason := anatomy.refuses("attention"):
            raise SeamError(f"{name} has no attention maps to read: {reason}")
        _known("attention layer", what.attention, _layers(model), name)


def _known(thing: str, asked: frozenset[int], there: int, name: str) -> None:
    if wrong := sorted(number for number in asked if not 1 <= number <= there):
        raise SeamError(f"{thing} {wrong[0]} of a {name}: it has {there}, counted from 1")


def _layers(model: nn.Module) -> int:
    return sum(kind != "cross" for _, kind, _ in attention_modules(model))


@contextlib.contextmanager
def reading(model: nn.Module, what: Reading) -> Iterator[Inside]:
    """Read the forwards of a model inside the block; what each gives replaces that of the one before.

    Args:
        model: a transformer of a class with facts.

    Raises:
        SeamError: see `check`.
    """
    inside = Inside()
    if what == Reading():
        yield inside
        return
    check(model, what)
    with contextlib.ExitStack() as stack:
        _listen(model, what.hidden, inside, stack)
        if what.attention:
            stack.enter_context(apply(model, _Keep(what.attention, inside.attention), count_flops=False))
        yield inside


def hidden_after(model: nn.Module, block: int, call: Callable[[], Any]) -> Tensor:
    """The image tokens (B, L, C) behind a block; what comes after it does not run.

    Args:
        call: runs the model's forward.

    Raises:
        SeamError: there is no such block, or the forward did not come to it.
    """
    check(model, Reading(frozenset({block})))
    inside = Inside()
    with contextlib.ExitStack() as stack:
        _listen(model, frozenset({block}), inside, stack, leave=True)
        try:
            call()
        except _Reached:
            return inside.hidden[block]
    raise SeamError(f"the forward of this {type(model).__name__} did not come to its block {block}")


class _Reached(Exception):
    """Raised to leave a forward once the block was seen."""


def _listen(
    model: nn.Module,
    blocks: frozenset[int],
    inside: Inside,
    stack: contextlib.ExitStack,
    leave: bool = False,
) -> None:
    """Hook the model and some of its blocks until the stack is closed; `leave` the forward behind a block."""
    anatomy = readable(model)
    layouts: list[TokenLayout] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside.hidden.clear()
        inside.attention.clear()
        layouts[:] = [anatomy.layout(model, bind(model, args, kwargs))]
        inside.grid = layouts[0].grid

    stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
    for number, (kind, _, block) in enumerate(anatomy.blocks(model), start=1):
        if number not in blocks:
            continue

        def after(
            module: nn.Module, args: Any, output: Any, number: int = number, kind: Stack = kind
        ) -> None:
            inside.hidden[number] = image_tokens(model, kind, layouts[0], output)
            if leave:
                raise _Reached

        stack.callback(block.register_forward_hook(after).remove)


def image_tokens(model: nn.Module, stack: Stack, layout: TokenLayout, output: Any) -> Tensor:
    """The image tokens (B, L, C), in raster order, in what a block of a stack returned.

    Raises:
        SeamError: it has no row for each of them.
    """
    (frames, height, width), name = layout.grid, type(model).__name__
    if stack.raster is None and "hidden_states" not in stack.returns:
        raise SeamError(f"{name}: the blocks in {stack.path} return no image tokens")
    if stack.raster is not None:
        tokens = stack.raster(model, output, layout.grid)
    else:
        tokens = output if isinstance(output, Tensor) else output[stack.returns.index("hidden_states")]
        if stack.view == "frame":
            tokens = tokens.unflatten(0, (-1, frames)).flatten(1, 2)
        elif stack.view == "time":
            tokens = tokens.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(1, 2)
        elif stack.joint:
            tokens = tokens[:, layout.image_span]
    if tokens.ndim != 3 or tokens.shape[1] != layout.image_length:
        raise SeamError(
            f"{name}: a block's output of shape {tuple(tokens.shape)} has not one row for each token of a "
            f"grid of {frames} x {height} x {width}, so its image tokens can't be read"
        )
    return tokens


@dataclass(frozen=True)
class _Keep:
    """Keeps queries and keys of some layers; the attention itself stays dense."""

    claims: ClassVar[frozenset[str]] = frozenset({"attention"})

    layers: frozenset[int]
    kept: dict[int, QueriesAndKeys]

    def attach(self, host: Host) -> None:
        host.attention.use(_Keeping(self.layers, self.kept))


class _Keeping(Dense):
    def __init__(self, layers: frozenset[int], kept: dict[int, QueriesAndKeys]) -> None:
        self.layers, self.kept = layers, kept

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall,
        plan: Any,
    ) -> Tensor:
        if call.layer + 1 in self.layers:
            image = call.layout.image_span
            self.kept[call.layer + 1] = QueriesAndKeys(q[:, :, image], k[:, :, image], scale)
        return super().attend(q, k, v, mask, scale, call, plan)
