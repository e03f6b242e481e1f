"""Run the block stack on some of the image tokens: gather before the first block, scatter after the last.

B batch, L image tokens, K selected tokens, C width.
"""

from __future__ import annotations

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

    def select(self, step: Step, hidden_states: Tensor) -> Tensor | None:
        """Indices (K,) of the image tokens to keep, each at most once, in any order; None for all. The same
        for the whole batch. `hidden_states` (B, L, C) enters the first block."""
        raise NotImplementedError

    def fill(self, step: Step, hidden_states: Tensor) -> Tensor:
        """Output (B, L, C) of the stack for the tokens that were left out; the rows of the others are
        overwritten. By default what entered the first block. `hidden_states` (B, L, C) is just that."""
        return hidden_states


class TokenSeam:
    """The sequence of image tokens of one model. At most one choice owns it.

    Text tokens stay as they are. Rotary rows, masks and per-token modulation follow the tokens.

    Attributes:
        owner: the method that chooses, in words; None without one.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._blocks = host.anatomy.blocks(host.model)
        self._choice: TokenChoice | None = None
        self.owner: str | None = None
        self._indices: Tensor | None = None
        self._entered: Tensor | None = None
        self._rows: dict[tuple[str, int, int], tuple[Any, Any]] = {}

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
        if self._choice is not None:
            self._refuse(arguments)

    def end(self) -> None:
        self._indices, self._entered = None, None
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
        if choice is None or not self._host.running:
            return forward(*args, **kwargs)
        named = {**dict(zip(stack.arguments, args, strict=False)), **kwargs}
        rest = args[len(stack.arguments) :]
        first = stack.arguments[0]
        image = self._host.image_rows() if stack.joint else slice(None)
        if place == 0:
            self._enter(choice, named[first][:, image])
            if self._indices is not None:
                kept = named[first][:, image].index_select(1, self._indices)
                named[first] = splice(named[first], image, kept)
        if self._indices is None:
            return forward(*args, **kwargs)
        text = named.get("encoder_hidden_states")
        length = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0
        if stack.joint:
            length = self._host.text_length()
        for name, rows in stack.token_rows.items():
            if named.get(name) is not None:
                named[name] = self._select(name, rows, named[name], length)
        leading = tuple(named.pop(name) for name in stack.arguments[: len(args)])
        output = forward(*leading, *rest, **named)
        return self._leave(stack, image, output) if place == len(self._blocks) - 1 else output

    def _enter(self, choice: TokenChoice, hidden: Tensor) -> None:
        indices = choice.select(self._host.clock.step, hidden)
        if indices is None:
            return
        if indices.ndim != 1 or not 0 < len(indices) <= hidden.shape[1]:
            raise SeamError(
                f"select must give indices (K,), 1 <= K <= {hidden.shape[1]}; got {tuple(indices.shape)}"
            )
        self._indices, self._entered = indices.to(hidden.device), hidden

    def _select(self, name: str, rows: Any, value: Any, text: int) -> Any:
        """Rows of an argument; all blocks get the same object, so the selection is made once for each."""
        assert self._indices is not None
        known = self._rows.get((name, id(rows), id(value)))
        if known is None:
            known = (value, rows(value, self._indices, text))
            self._rows[name, id(rows), id(value)] = known
        return known[1]

    def _leave(self, stack: Stack, image: slice, output: Any) -> Any:
        assert self._choice is not None and self._indices is not None and self._entered is not None
        place = 0 if isinstance(output, Tensor) else stack.returns.index("hidden_states")
        sequence = output if isinstance(output, Tensor) else output[place]
        kept = sequence[:, image]
        if len(self._indices) == self._entered.shape[1]:
            full = torch.empty_like(kept).index_copy_(1, self._indices, kept)
        else:
            full = self._choice.fill(self._host.clock.step, self._entered).index_copy(1, self._indices, kept)
        full = splice(sequence, image, full)
        if isinstance(output, Tensor):
            return full
        return tuple(full if at == place else other for at, other in enumerate(output))
