"""Keys and values kept from step to step, so that some tokens can read all of them.

On a step whose blocks run on all tokens they are kept; on a step whose blocks run on some, the rows of these
are overwritten and everything kept is read. They are taken at the attention call, after normalisation and
rotary embedding: a token keeps its place, so its kept rows stay valid. Or they are continued: two values of
each token are kept, and what is read lies on the line through them.

B batch, Bg samples that run together, h heads, L tokens of the sequence, K tokens that run, P = K and the
text, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ditkit.seams.errors import SeamError
from ditkit.seams.extrapolate import ahead
from ditkit.seams.layout import TokenLayout
from ditkit.seams.tokens import Active

if TYPE_CHECKING:
    from ditkit.seams.attention import AttentionCall

Branch = str


class KeyPolicy:
    """What a method supplies to have keys and values kept: subclass it.

    Args:
        reach: continue those of tokens that do not run, at most so many times the distance of their last two
            values ahead; None: read the last ones.
    """

    reach: float | None = None

    def level(self) -> float:
        """The noise level of the forward that runs, over which keys and values are continued."""
        raise NotImplementedError

    def keys(self) -> Literal["pass", "keep"]:
        """What to do with those of a forward over all tokens: nothing, or keep them. In a forward over some
        tokens their rows are overwritten and all kept ones are read."""
        raise NotImplementedError


@dataclass
class _Line:
    """The values before the last ones, and the noise levels (B, 1, L, 1) of both."""

    k: Tensor
    v: Tensor
    levels: Tensor
    recent: Tensor


@dataclass
class _Kept:
    """Of one attention module and guidance branch; mask and scale as the dense call had them."""

    k: Tensor  # (B, h, L, d), the text's rows too
    v: Tensor
    q: Tensor | None  # for strategies, which need the whole grid of queries
    mask: Tensor | None
    scale: float | None
    line: _Line | None = None

    def tensors(self) -> list[Tensor]:
        line = [] if self.line is None else list(vars(self.line).values())
        return [part for part in (self.k, self.v, self.q, self.mask, *line) if part is not None]


@dataclass
class Merged:
    """An attention call of some tokens, completed by what was kept.

    Args:
        q: (Bg, h, P, d), or (Bg, h, L, d) where `positions` tells which rows of the result are wanted.
        k, v: (Bg, h, L, d).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    positions: Tensor | None


class KeptKeys:
    """Keys and values of the attention modules of one model, apart for each guidance branch.

    They carry no gradient: rows are overwritten in place.
    """

    def __init__(self, policy: KeyPolicy) -> None:
        self.policy = policy
        self._kept: dict[tuple[Branch, str], _Kept] = {}

    def holds(self, branch: Branch, modules: int) -> bool:
        """Are the keys of so many modules kept for this branch?"""
        return sum(key[0] == branch for key in self._kept) == modules

    def nbytes(self) -> int:
        return sum(part.nbytes for kept in self._kept.values() for part in kept.tensors())

    def drop(self, branch: Branch | None = None) -> None:
        """Forget what was kept for one guidance branch, or for all."""
        for key in [key for key in self._kept if branch in (None, key[0])]:
            del self._kept[key]

    @torch.compiler.disable(recursive=True)
    def keep(
        self,
        call: AttentionCall,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        *,
        queries: bool,
    ) -> None:
        """Take those of a call over all tokens, (B, h, L, d) each, when the policy says so.

        Args:
            queries: keep q as well.
        """
        if self.policy.keys() != "keep":
            return
        key = (call.step.branch, call.name)
        before, kept = self._kept.get(key), _Kept(_copy(k), _copy(v), None, None, scale)
        kept.q = _copy(q) if queries else None
        kept.mask = None if mask is None else _copy(mask)
        if self.policy.reach is not None:
            levels = torch.full((k.shape[0], 1, k.shape[2], 1), self.policy.level(), dtype=torch.float64)
            recent = levels.to(k.device)
            if before is None or before.line is None:
                kept.line = _Line(_copy(k), _copy(v), recent.clone(), recent)
            else:
                kept.line = _Line(before.k, before.v, before.line.recent, recent)
        self._kept[key] = kept

    @torch.compiler.disable(recursive=True)
    def merge(
        self, call: AttentionCall, layout: TokenLayout, active: Active, q: Tensor, k: Tensor, v: Tensor
    ) -> Merged:
        """Overwrite the rows of the tokens that run and read all.

        Args:
            layout: of this module's whole sequence.
            active: which image tokens run, of which samples.
            q, k, v: (Bg, h, P, d), in the order of the sequence.

        Raises:
            SeamError: nothing was kept for this module and branch.
        """
        kept = self._kept.get((call.step.branch, call.name))
        if kept is None:
            raise SeamError(f"{call.name}: no keys were kept for guidance branch {call.step.branch!r}")
        positions, rows = _positions(layout, active.indices), active.rows
        mask = kept.mask
        if mask is not None and rows is not None and mask.shape[0] > 1:
            mask = mask.index_select(0, rows)
        if kept.line is not None:
            level = torch.full_like(kept.line.recent, self.policy.level())
            for past, last in (
                (kept.line.k, kept.k),
                (kept.line.v, kept.v),
                (kept.line.levels, kept.line.recent),
            ):
                _put(past, rows, positions, _of(last, rows).index_select(2, positions))
            _put(kept.line.recent, rows, positions, _of(level, rows).index_select(2, positions))
        _put(kept.k, rows, positions, k)
        _put(kept.v, rows, positions, v)
        full_k, full_v = self._read(kept, rows)
        if kept.q is not None:
            _put(kept.q, rows, positions, q)
            return Merged(_of(kept.q, rows), full_k, full_v, mask, kept.scale, positions)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask.index_select(-2, positions)
        return Merged(q, full_k, full_v, mask, kept.scale, None)

    def _read(self, kept: _Kept, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, (Bg, h, L, d)."""
        line, reach = kept.line, self.policy.reach
        if line is None or reach is None:
            return _of(kept.k, rows), _of(kept.v, rows)
        weight = 1 + ahead(self.policy.level(), _of(line.recent, rows), _of(line.levels, rows), reach)
        weight = weight.to(kept.k.dtype)
        return (
            torch.lerp(_of(line.k, rows), _of(kept.k, rows), weight),
            torch.lerp(_of(line.v, rows), _of(kept.v, rows), weight),
        )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _positions(layout: TokenLayout, indices: Tensor) -> Tensor:
    """Places (P,) in the sequence of the image tokens (K,) and of all text, in the order they run in."""
    image = indices + layout.image_span.start
    text = torch.arange(layout.text_span.start, layout.text_span.stop, device=indices.device)
    return torch.cat([text, image] if layout.text == "prefix" else [image, text])


def _of(kept: Tensor, rows: Tensor | None) -> Tensor:
    """The samples (Bg,)."""
    return kept if rows is None else kept.index_select(0, rows)


def _put(kept: Tensor, rows: Tensor | None, positions: Tensor, new: Tensor) -> None:
    """Overwrite places (P,) of the samples (Bg,) by (Bg, h, P, d)."""
    new = new.detach().to(kept.dtype)
    if rows is None:
        kept.index_copy_(2, positions, new)
    else:
        kept[rows[:, None], :, positions[None]] = new.transpose(1, 2)
