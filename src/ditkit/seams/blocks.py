"""Run, skip or replace the block stack's output, or that of any unit inside.

B batch, L image tokens, C width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditkit.seams.anatomy import Stack, child
from ditkit.seams.errors import ConflictError, SeamError
from ditkit.seams.hooking import Forward
from ditkit.seams.layout import splice
from ditkit.seams.outputs import prediction_of, with_prediction
from ditkit.seams.steps import Step

if TYPE_CHECKING:
    from ditkit.seams.host import Host

Outputs = tuple[Tensor, ...]


class StackCache:
    """What a method supplies to skip the blocks from `after` on: subclass it.

    Args:
        after: how many blocks always run; 0 skips the whole stack.
    """

    after: int = 0

    def skips(self, step: Step, hidden_states: Tensor | None) -> bool:
        """May the remaining blocks be skipped in this forward? `hidden_states` (B, L, C) is the output of
        block `after - 1`; None when `after` is 0, since the answer is then needed before the embedding."""
        raise NotImplementedError

    def store(self, step: Step, hidden_states: Tensor) -> Tensor | None:
        """Take the output (B, L, C) of the last block, image tokens only, that a full forward computed. A
        tensor given back goes on in its place."""
        raise NotImplementedError

    def recall(self, step: Step, hidden_states: Tensor) -> Tensor:
        """The output (B, L, C) of the last block in a skipped forward. `hidden_states` (B, L, C) entered the
        first skipped block."""
        raise NotImplementedError


class OutputCache:
    """What a method supplies to skip the whole model and answer in its place: subclass it."""

    def skips(self, step: Step) -> bool:
        """May the model be skipped in this forward?"""
        raise NotImplementedError

    def store(self, step: Step, output: Tensor) -> Tensor | None:
        """Take the prediction that the model made, in its own shape. A tensor given back goes out in its
        place."""
        raise NotImplementedError

    def recall(self, step: Step) -> Tensor:
        """The prediction in a skipped forward."""
        raise NotImplementedError


class UnitCache:
    """What a method supplies to replace the outputs of units: subclass it."""

    def replaced(self, step: Step, units: Sequence[UnitRef]) -> Sequence[bool]:
        """Which units not to run in this forward. Asked once, before the embedding."""
        raise NotImplementedError

    def store(self, step: Step, unit: UnitRef, outputs: Outputs) -> Outputs | None:
        """Take the outputs of a unit that ran, as the block gets them: before its gate. As many given back
        go on in their place."""
        raise NotImplementedError

    def recall(self, step: Step, unit: UnitRef) -> Outputs:
        """The outputs of a unit that does not run, as many as it gave last."""
        raise NotImplementedError


@dataclass(frozen=True)
class UnitRef:
    """One unit of one block.

    Args:
        index: its place among all units of the model, in running order.
        name: full path inside the model, e.g. `"transformer_blocks.3.attn"`.
        block: place of its block among all blocks.
        module: path inside the block.
        calls: how often the block calls it in one forward; the outputs of all calls are stored together.
    """

    index: int
    name: str
    block: int
    module: str
    calls: int = 1


class BlockSeam:
    """The block stack of one model. At most one cache owns it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._blocks = host.anatomy.blocks(host.model)
        if not self._blocks:
            raise SeamError(f"{type(host.model).__name__} has no blocks")
        self.units = tuple(self._list_units())
        self._stack: StackCache | None = None
        self._unit_cache: UnitCache | None = None
        self._output: OutputCache | None = None
        self._pattern: Any = None
        self._skips: Any = None
        self._store: Any = None
        self._recall: Any = None
        self._open = False
        self._skipping = False
        self._replaced: Sequence[bool] = ()
        self._parts: dict[int, list[Tensor]] = {}
        self._per_token = [False] * len(self._blocks)
        host.stats.modes.append(self._mode)

    @property
    def depth(self) -> int:
        """Number of blocks, all stacks together."""
        return len(self._blocks)

    def cache_stack(self, cache: StackCache) -> None:
        """Let a cache skip the blocks from `cache.after` on and supply the last one's output.

        Raises:
            ConflictError: another cache owns the blocks, or a method chooses tokens.
            SeamError: `cache.after` is not in 0 .. depth - 1, or this class does not allow it.
        """
        self._host.require("stack")
        reason = self._host.anatomy.no_stack(self._host.model)
        if reason is not None:
            raise SeamError(
                f"the blocks of {type(self._host.model).__name__} can't be skipped here: {reason}"
            )
        self._claim()
        if not 0 <= cache.after < self.depth:
            raise SeamError(f"after must be 0 to {self.depth - 1} for this model; got {cache.after}")
        self._stack = cache
        self._skips = torch.compiler.disable(cache.skips)
        self._store, self._recall = torch.compiler.disable(cache.store), torch.compiler.disable(cache.recall)
        for place, (stack, _, block) in enumerate(self._blocks):
            self._host.hooks.around(block, "block", _bound(self._run_block, place, stack))

    def cache_output(self, cache: OutputCache) -> None:
        """Let a cache answer in place of the model.

        Raises:
            ConflictError: another cache owns the blocks, or a method chooses tokens.
        """
        self._host.require("answer")
        self._claim()
        self._output = cache

    def cache_units(self, cache: UnitCache) -> None:
        """Let a cache replace the outputs of units before their gates.

        Raises:
            ConflictError: another cache owns the blocks, or a method chooses tokens.
            SeamError: feed-forward chunking is on, which calls a unit several times in a forward, or this
                class does not allow it.
        """
        self._host.require("units")
        self._claim()
        self._refuse_chunks()
        self._unit_cache = cache
        self._store, self._recall = torch.compiler.disable(cache.store), torch.compiler.disable(cache.recall)
        for place, (stack, _, block) in enumerate(self._blocks):
            if stack.per_token:
                self._host.hooks.around(block, "block", _bound(self._look_at_block, place, stack))
        for unit in self.units:
            module = self._module(unit.block, unit.module)
            self._host.hooks.around(module, "unit", _bound(self._run_unit, unit))
        for (place, path), readers in self._bypasses().items():
            module = self._module(place, path)
            alone = path in {site.module for site in self._blocks[place][0].attention if site.kind == "cross"}
            around = _bound(self._run_bypass, place, tuple(readers), alone)
            self._host.hooks.around(module, "bypass", around)

    def begin(self, step: Step) -> None:
        """A forward of the model starts."""
        self._open, self._skipping = True, False
        self._parts.clear()
        if self._stack is not None and self._stack.after == 0:
            self._skipping = self._stack.skips(step, None)
        if self._output is not None:
            self._skipping = self._output.skips(step)
        if self._unit_cache is not None:
            self._replaced = tuple(self._unit_cache.replaced(step, self.units))

    def end(self) -> bool:
        """The forward has ended. Returns whether any unit or block that a cache could skip was computed."""
        self._open = False
        self._parts.clear()
        if self._stack is not None or self._output is not None:
            return not self._skipping
        return not self._replaced or not all(self._replaced)

    def around_model(self, forward: Forward) -> Forward:
        """The model's forward, or what answers in its place."""
        cache = self._output
        if cache is None:
            return forward

        def answer(*args: Any, **kwargs: Any) -> Any:
            step = self._host.clock.step
            if self._skipping:
                return with_prediction(self._pattern, cache.recall(step))
            output = forward(*args, **kwargs)
            instead = cache.store(step, prediction_of(output))
            self._pattern = with_prediction(output, None)
            return output if instead is None else with_prediction(output, instead)

        return answer

    def _mode(self) -> Hashable:
        return (self._skipping, self._replaced)

    def _claim(self) -> None:
        if any(cache is not None for cache in (self._stack, self._unit_cache, self._output)):
            raise ConflictError("the blocks of this model already belong to a cache; only one can own them")
        if self._host.tokens.owner is not None:
            # Even whole outputs mix tokens of this step with others' of earlier ones: no line to continue.
            raise ConflictError(
                f"{self._host.attaching} continues what every token gave from step to step, but "
                f"{self._host.tokens.owner} computes other tokens at each; use one of them"
            )

    # Skipping blocks.

    @torch.compiler.disable(recursive=False)
    def _run_block(
        self, place: int, stack: Stack, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        cache = self._stack
        if cache is None or not self._open:
            return forward(*args, **kwargs)
        step = self._host.clock.step
        if place == cache.after > 0:
            hidden = _argument(stack, "hidden_states", args, kwargs)
            self._skipping = self._skips(step, hidden[:, self._image(stack)])
        last = place == self.depth - 1
        if self._skipping and place >= cache.after:
            hidden = _argument(stack, "hidden_states", args, kwargs)
            if last:
                hidden = self._recalled(step, stack, hidden)
            return _returned(stack, hidden, args, kwargs)
        output = forward(*args, **kwargs)
        if not last:
            return output
        hidden, image = _hidden(stack, output), self._image(stack)
        instead = self._store(step, hidden[:, image])
        return output if instead is None else _exchanged(stack, output, splice(hidden, image, instead))

    def _image(self, stack: Stack) -> slice:
        """The image tokens in what a block of this stack works on; all tokens where text and image are joined
        at another place in each sample."""
        if not stack.joint:
            return slice(None)
        try:
            return self._host.image_rows()
        except SeamError:
            return slice(None)

    def _recalled(self, step: Step, stack: Stack, hidden: Tensor) -> Tensor:
        image = self._image(stack)
        return splice(hidden, image, self._recall(step, hidden[:, image]))

    # Replacing units.

    @torch.compiler.disable(recursive=False)
    def _look_at_block(
        self, place: int, stack: Stack, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note whether this call modulates every token apart."""
        self._per_token[place] = any(
            test(_argument(stack, name, args, kwargs)) for name, test in stack.per_token.items()
        )
        return forward(*args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _run_unit(
        self, unit: UnitRef, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._open:
            return forward(*args, **kwargs)
        step = self._host.clock.step
        if unit.calls > 1:
            return self._run_shared(step, unit, forward, args, kwargs)
        if self._replaced[unit.index]:
            outputs = self._recall(step, unit)
            return outputs[0] if len(outputs) == 1 else outputs
        output = forward(*args, **kwargs)
        instead = self._store(step, unit, (output,) if isinstance(output, Tensor) else tuple(output))
        if instead is None:
            return output
        return instead[0] if isinstance(output, Tensor) else instead

    def _run_shared(
        self, step: Step, unit: UnitRef, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """A unit that its block calls several times: each call gives or takes one tensor of its outputs."""
        parts = self._parts.setdefault(unit.index, [])
        if self._replaced[unit.index]:
            if not parts:
                parts += self._recall(step, unit)
            return parts.pop(0)
        output = forward(*args, **kwargs)
        parts.append(output)
        if len(parts) == unit.calls:
            instead = self._store(step, unit, tuple(self._parts.pop(unit.index)))
            if instead is not None:
                raise SeamError(
                    f"{unit.name} is called {unit.calls} times in a forward: its outputs can be replaced, "
                    "not mixed with others"
                )
        return output

    @torch.compiler.disable(recursive=False)
    def _run_bypass(
        self,
        place: int,
        readers: tuple[int, ...],
        alone: bool,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Hand on no tokens at all to what is not going to be read: (B, L, C) -> (B, 0, C); with the text's,
        unless the module reads text but gives image tokens `alone`."""
        if not self._open or not all(self._replaced[index] for index in readers):
            return forward(*args, **kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()))
        if self._per_token[place]:
            # Modulation with a row for each token can't be broadcast to no token: keep the length.
            return hidden
        text = kwargs.get("encoder_hidden_states")
        return hidden[:, :0] if text is None or alone else (hidden[:, :0], text[:, :0])

    def _list_units(self) -> list[UnitRef]:
        units: list[UnitRef] = []
        for place, (stack, index, block) in enumerate(self._blocks):
            for unit in stack.units:
                if child(block, unit.module) is not None:
                    name = f"{stack.path}.{index}.{unit.module}"
                    units.append(UnitRef(len(units), name, place, unit.module, unit.calls_in(block)))
        return units

    def _bypasses(self) -> dict[tuple[int, str], list[int]]:
        """(block, path) -> indices of the units that read this module's output."""
        readers: dict[tuple[int, str], list[int]] = defaultdict(list)
        for ref in self.units:
            stack, _, block = self._blocks[ref.block]
            facts = next(unit for unit in stack.units if unit.module == ref.module)
            for path in facts.bypass:
                if child(block, path) is not None:
                    readers[ref.block, path].append(ref.index)
        return readers

    def _module(self, place: int, path: str) -> nn.Module:
        module = child(self._blocks[place][2], path)
        assert module is not None
        return module

    def _refuse_chunks(self) -> None:
        for stack, index, block in self._blocks:
            if getattr(block, "_chunk_size", None) is not None:
                raise SeamError(
                    f"{stack.path}.{index} runs its feed-forward in chunks; call disable_forward_chunking() "
                    "first"
                )


def _bound(function: Any, *first: Any) -> Any:
    """A hook's function with its first arguments filled in.

    Not compiled, since it keeps tensors between forwards: under `torch.compile` each hooked module is a graph
    break, and the modules themselves are compiled.
    """

    @torch.compiler.disable(recursive=False)
    def around(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(*first, forward, args, kwargs)

    return around


def _argument(stack: Stack, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of a block's call; `"hidden_states"` is the first one under whatever name."""
    place = 0 if name == "hidden_states" else stack.arguments.index(name)
    return args[place] if place < len(args) else kwargs.get(stack.arguments[place])


def _hidden(stack: Stack, output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[stack.returns.index("hidden_states")]


def _exchanged(stack: Stack, output: Any, hidden: Tensor) -> Any:
    """A block's output with other image tokens."""
    if isinstance(output, Tensor):
        return hidden
    return tuple(
        hidden if name == "hidden_states" else value
        for name, value in zip(stack.returns, output, strict=True)
    )


def _returned(stack: Stack, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a block returns that leaves everything but `hidden` as it is."""
    if len(stack.returns) == 1:
        return hidden
    return tuple(
        hidden if name == "hidden_states" else _argument(stack, name, args, kwargs) for name in stack.returns
    )
