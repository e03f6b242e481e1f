"""Run the block stack on some of the image tokens: gather before the first block, scatter after the last.

B batch, L image tokens, K selected tokens, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditkit.seams.anatomy import Stack
from ditkit.seams.errors import ConflictError, SeamError
from ditkit.seams.hooking import Forward
from ditkit.seams.layout import splice
from ditkit.seams.steps import Step

if TYPE_CHECKING:
    from ditkit.seams.host import Host


class TokenChoice:
    """What a method supplies to run the blocks on some tokens: subclass it."""

    def start(self, step: Step, arguments: dict[str, Any]) -> None:
        """A forward of the model starts, with these arguments by name."""

    def select(self, step: Step, hidden_states: Tensor) -> Tensor | None:
        """Indices (K,) of the image tokens to keep, each at most once, in any order; None for all. (B, K)
        when the samples keep different ones: those that keep the same run together, the others one after the
        other. `hidden_states` (B, L, C) enters the first block."""
        raise NotImplementedError

    def fill(self, step: Step, hidden_states: Tensor) -> Tensor:
        """Output (B, L, C) of the stack for the tokens that were left out; the rows of the others are
        overwritten. By default what entered the first block. `hidden_states` (B, L, C) is just that."""
        return hidden_states


@dataclass(frozen=True)
class Active:
    """The image tokens that a block runs on.

    Args:
        indices: (K,).
        rows: (Bg,) samples of the batch that run on them together; None for all.
    """

    indices: Tensor
    rows: Tensor | None = None


class TokenSeam:
    """The sequence of image tokens of one model. At most one choice owns it.

    Text tokens stay as they are. Rotary rows, masks and per-token modulation follow the tokens.

    Attributes:
        owner: the method that chooses, in words; None without one.
        active: the tokens that run in the block that is running; None for all.
        partial: did the last forward compute the output of some tokens only?
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._blocks = host.anatomy.blocks(host.model)
        self._first = next((at for at, (stack, *_) in enumerate(self._blocks) if not stack.whole), 0)
        self._choice: TokenChoice | None = None
        self.owner: str | None = None
        self.active: Active | None = None
        self.partial = False
        self._groups: list[Active] = []
        self._entered: Tensor | None = None
        self._rows: dict[tuple[str, int, int, int], tuple[Any, Any]] = {}

    def choose(self, choice: TokenChoice) -> None:
        """Let a method choose the tokens of each forward.

        Raises:
            ConflictError: another method owns the tokens.
            SeamError: the blocks of this model can't run on a subset, with the reason.
        """
        if self._choice is not None:
            raise ConflictError("the tokens of this model already belong to a method; only one can own them")
        self._host.require("tokens")
        self._refuse({})
        self._choice, self.owner = choice, self._host.attaching or repr(choice)
        for place, (stack, _, block) in enumerate(self._blocks):

            def around(
                forward: Forward,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                at: int = place,
                of: Stack = stack,
            ) -> Any:
                return self._run_block(at, of, forward, args, kwargs)

            self._host.hooks.around(block, "tokens", around)

    def begin(self, arguments: dict[str, Any]) -> None:
        """A forward of the model starts."""
        self.end()
        self.partial = False
        if self._choice is not None:
            self._refuse(arguments)
            self._choice.start(self._host.clock.step, arguments)

    def end(self) -> None:
        self.active, self._entered, self._groups = None, None, []
        self._rows.clear()

    def _refuse(self, arguments: dict[str, Any]) -> None:
        reason = self._host.anatomy.no_tokens(self._host.model, arguments)
        if reason is not None:
            name = type(self._host.model).__name__
            raise SeamError(f"{name} can't run its blocks on a subset of tokens here: {reason}")

    def _run_block(
        self, place: int, stack: Stack, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        choice = self._choice
        if choice is None or not self._host.running or place < self._first:
            return forward(*args, **kwargs)
        named = {**dict(zip(stack.arguments, args, strict=False)), **kwargs}
        rest = args[len(stack.arguments) :]
        first, last = stack.arguments[0], place == len(self._blocks) - 1
        image = self._host.image_rows() if stack.joint else slice(None)
        if place == self._first:
            self._enter(choice, named[first][:, image])
            if self._groups:
                named[first] = splice(named[first], image, self._gather(named[first][:, image]))
        if not self._groups:
            return forward(*args, **kwargs)
        text = named.get("encoder_hidden_states")
        length = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0
        if stack.joint:
            length = self._host.text_length()
        outputs = []
        for group in self._groups:
            mine = self._arguments_of(group, stack, named, length)
            leading = tuple(mine.pop(name) for name in stack.arguments[: len(args)])
            self.active = group
            outputs.append(
                forward(*leading, *(_samples(one, group.rows, self._batch) for one in rest), **mine)
            )
        output = self._join(outputs)
        return self._leave(stack, image, output) if last else output

    def _enter(self, choice: TokenChoice, hidden: Tensor) -> None:
        indices = choice.select(self._host.clock.step, hidden)
        if indices is None:
            return
        batch, length = hidden.shape[:2]
        shape = tuple(indices.shape)
        if not 0 < indices.shape[-1] <= length or (indices.ndim != 1 and shape[:-1] != (batch,)):
            raise SeamError(f"select must give indices (K,) or ({batch}, K), 1 <= K <= {length}; got {shape}")
        self._groups, self._entered = _grouped(indices.to(hidden.device)), hidden
        self.active = self._groups[0]

    def _gather(self, hidden: Tensor) -> Tensor:
        """(B, L, C) -> (B, K, C), each sample's own tokens."""
        if self._groups[0].rows is None:
            return hidden.index_select(1, self._groups[0].indices)
        kept = hidden.new_empty(hidden.shape[0], len(self._groups[0].indices), hidden.shape[2])
        for group in self._groups:
            assert group.rows is not None
            kept[group.rows] = hidden[group.rows[:, None], group.indices[None]]
        return kept

    def _arguments_of(self, group: Active, stack: Stack, named: dict[str, Any], text: int) -> dict[str, Any]:
        """A block's arguments for the samples and tokens of one group."""
        mine = {}
        for name, value in named.items():
            rows = stack.token_rows.get(name)
            if rows is None or value is None:
                mine[name] = _samples(value, group.rows, self._batch)
                continue
            # All blocks get the same object, so the selection is made once for each group.
            key = (name, id(rows), id(value), id(group))
            if key not in self._rows:
                chosen = rows(value, group.indices, text)
                self._rows[key] = (value, _samples_of_rows(value, chosen, group.rows, self._batch))
            mine[name] = self._rows[key][1]
        return mine

    @property
    def _batch(self) -> int:
        assert self._entered is not None
        return self._entered.shape[0]

    def _join(self, outputs: list[Any]) -> Any:
        """The outputs of the groups as those of one batch."""
        if self._groups[0].rows is None or outputs[0] is None:
            return outputs[0]
        if isinstance(outputs[0], Tensor):
            whole = outputs[0].new_empty(self._batch, *outputs[0].shape[1:])
            for group, output in zip(self._groups, outputs, strict=True):
                whole[group.rows] = output
            return whole
        return tuple(self._join(list(parts)) for parts in zip(*outputs, strict=True))

    def _leave(self, stack: Stack, image: slice, output: Any) -> Any:
        assert self._choice is not None and self._entered is not None
        sequence = _hidden(stack, output)
        kept = sequence[:, image]
        if len(self._groups[0].indices) == self._entered.shape[1]:
            full = torch.empty_like(kept)
        else:
            self.partial = True
            step = self._host.clock.step
            full = self._choice.fill(step, self._entered).clone()
        for group in self._groups:
            if group.rows is None:
                full.index_copy_(1, group.indices, kept)
            else:
                full[group.rows[:, None], group.indices[None]] = kept[group.rows]
        full = splice(sequence, image, full)
        if isinstance(output, Tensor):
            return full
        return tuple(
            full if name == "hidden_states" else part
            for name, part in zip(stack.returns, output, strict=True)
        )


def _hidden(stack: Stack, output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[stack.returns.index("hidden_states")]


def _grouped(indices: Tensor) -> list[Active]:
    """The groups of samples that keep the same tokens, of (K,) or (B, K)."""
    if indices.ndim == 1:
        return [Active(indices)]
    if bool((indices == indices[:1]).all()):
        return [Active(indices[0])]
    same: dict[tuple[int, ...], list[int]] = {}
    for row, chosen in enumerate(indices.tolist()):
        same.setdefault(tuple(chosen), []).append(row)
    return [Active(indices[rows[0]], torch.tensor(rows, device=indices.device)) for rows in same.values()]


def _samples(value: Any, rows: Tensor | None, batch: int) -> Any:
    """The rows of some samples, of an argument that has one for each."""
    if rows is None:
        return value
    if isinstance(value, Tensor):
        return value.index_select(0, rows) if value.ndim and value.shape[0] == batch else value
    if isinstance(value, (tuple, list)):
        return type(value)(_samples(part, rows, batch) for part in value)
    if isinstance(value, dict):
        return {name: _samples(part, rows, batch) for name, part in value.items()}
    return value


def _samples_of_rows(value: Any, chosen: Any, rows: Tensor | None, batch: int) -> Any:
    """The same of an argument with a row for each token: a table whose first axis are the tokens is shared by
    all samples, even where there happen to be as many tokens as samples."""
    if rows is None:
        return chosen
    if isinstance(chosen, (tuple, list)):
        return type(chosen)(
            part if part is whole else _samples_of_rows(whole, part, rows, batch)
            for whole, part in zip(value, chosen, strict=True)
        )
    shared = chosen.shape[0] != value.shape[0]
    return chosen if shared else _samples(chosen, rows, batch)
