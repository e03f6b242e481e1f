"""The plainest things that can be put at a seam, and a method that puts one of them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ditkit.seams.blocks import Outputs, StackCache, UnitCache, UnitRef
from ditkit.seams.host import Host
from ditkit.seams.steps import Step
from ditkit.seams.tokens import TokenChoice


class Using:
    """A method made of one thing to put at one seam."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    @property
    def claims(self) -> frozenset[str]:
        return frozenset()

    def attach(self, host: Host) -> None:
        if isinstance(self.thing, StackCache):
            host.blocks.cache_stack(self.thing)
        elif isinstance(self.thing, UnitCache):
            host.blocks.cache_units(self.thing)
        elif isinstance(self.thing, TokenChoice):
            host.tokens.choose(self.thing)
        else:
            host.attention.use(self.thing)


class Memory(UnitCache):
    """Keeps what each unit gave; then gives it back."""

    def __init__(self) -> None:
        self.kept: dict[int, Outputs] = {}
        self.chosen: Callable[[UnitRef], bool] = lambda unit: False

    def replaced(self, step: Step, units: Sequence[UnitRef]) -> Sequence[bool]:
        return [self.chosen(unit) for unit in units]

    def store(self, step: Step, unit: UnitRef, outputs: Outputs) -> None:
        self.kept[unit.index] = outputs

    def recall(self, step: Step, unit: UnitRef) -> Outputs:
        return self.kept[unit.index]


class StackMemory(StackCache):
    """Keeps the last output of the blocks; then gives it back."""

    def __init__(self, after: int = 0) -> None:
        self.after = after
        self.kept: Tensor | None = None
        self.skip = False

    def skips(self, step: Step, hidden_states: Tensor | None) -> bool:
        return self.skip

    def store(self, step: Step, hidden_states: Tensor) -> None:
        self.kept = hidden_states

    def recall(self, step: Step, hidden_states: Tensor) -> Tensor:
        assert self.kept is not None and hidden_states.shape == self.kept.shape
        return self.kept


class Chosen(TokenChoice):
    def __init__(self, indices: Tensor) -> None:
        self.indices = indices

    def select(self, step: Step, hidden_states: Tensor) -> Tensor:
        return self.indices
