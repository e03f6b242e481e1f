"""Keys and values kept from step to step, so that some tokens can read all of them.

On a step whose blocks run on all tokens they are kept; on a step whose blocks run on some, the rows of these
are overwritten and everything kept is read. They are taken at the attention call, after normalisation and
rotary embedding: a token keeps its place, so its kept rows stay valid.

B batch, Bg samples that run together, h heads, L tokens of the sequence, K tokens that run, P = K and the
text, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ditkit.seams.errors import SeamError
from ditkit.seams.layout import TokenLayout
from ditkit.seams.tokens import Active

if TYPE_CHECKING:
    from ditkit.seams.attention import AttentionCall

Branch = str


class KeyPolicy:
    """What a method supplies to have keys and values kept: subclass it."""

    def keys(self) -> Literal["pass", "keep"]:
        """What to do with those of a forward over all tokens: nothing, or keep them. In a forward over some
        tokens their rows are overwritten and all kept ones are read."""
        raise NotImplementedError


@dataclass
class _Kept:
    """Of one attention module and guidance branch; mask and scale as the dense call had them."""

    k: Tensor  # (B, h, L, d), the text's rows too
    v: Tensor
    q: Tensor | None  # for strategies, which need the whole grid of queries
    mask: Tensor | None
    scale: float | None


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
        return sum(
            part.nbytes
            for kept in self._kept.values()
            for part in (kept.k, kept.v, kept.q, kept.mask)
            if part is not None
        )

    def drop(self, branch: Branch | None = None) -> None:
        """Forget what was kept for one guidance branch, or for all."""
        for key in [key for key in self._kept if branch in (None, key[0])]:
            del self._kept[key]

    @torch.compiler.disable
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
        if self.policy.keys() == "keep":
            self._kept[call.step.branch, call.name] = _Kept(
                _copy(k), _copy(v), _copy(q) if queries else None, None if mask is None else _copy(mask), scale
            )

    @torch.compiler.disable
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
        full_k, full_v = _put(kept.k, rows, positions, k), _put(kept.v, rows, positions, v)
        if kept.q is not None:
            return Merged(_put(kept.q, rows, positions, q), full_k, full_v, mask, kept.scale, positions)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask.index_select(-2, positions)
        return Merged(q, full_k, full_v, mask, kept.scale, None)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _positions(layout: TokenLayout, indices: Tensor) -> Tensor:
    """Places (P,) in the sequence of the image tokens (K,) and of all text, in the order they run in."""
    image = indices + layout.image_span.start
    text = torch.arange(layout.text_span.start, layout.text_span.stop, device=indices.device)
    return torch.cat([text, image] if layout.text == "prefix" else [image, text])


def _put(kept: Tensor, rows: Tensor | None, positions: Tensor, new: Tensor) -> Tensor:
    """Overwrite places (P,) of the samples (Bg,) by (Bg, h, P, d) -> these samples, (Bg, h, L, d)."""
    new = new.detach().to(kept.dtype)
    if rows is None:
        return kept.index_copy_(2, positions, new)
    kept[rows[:, None], :, positions[None]] = new.transpose(1, 2)
    return kept.index_select(0, rows)
