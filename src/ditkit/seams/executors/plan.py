"""Which executor runs a sparse attention, and block lists made ready to run on a layout.

B batch, h heads, L tokens of the joint sequence, d head dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ditkit.seams.executors import flex
from ditkit.seams.executors.blocks import BlockLists, Tiling, dense_mask, density
from ditkit.seams.executors.dense import combine, is_key_mask, key_mask, masked_dense
from ditkit.seams.executors.gather import gather_blocks, gather_blocks_with_lse
from ditkit.seams.executors.scores import attention_with_lse
from ditkit.seams.executors.windows import Windows, gather_windows, gather_windows_with_lse
from ditkit.seams.layout import TokenLayout

Executor = Literal["auto", "dense", "gather", "flex"]

# Measured on CPU (benchmarks/seams/attention_executors.py): above this share of pairs, or below this many
# tokens, a masked dense pass is no slower than gathering.
DENSE_ABOVE = 0.6
DENSE_BELOW = 1024


@dataclass(frozen=True)
class Choice:
    """An executor and, in plain words, why."""

    name: Literal["dense", "gather", "flex"]
    reason: str


def choose(length: int, share: float, *, device: torch.device, whole: bool = True) -> Choice:
    """The executor for a sparse attention.

    On CPU compiled flex attention is never chosen, only run when asked for: in float32 it takes 1.1 to 1.6
    times the ideal time, depending on the processor, where gathering takes 1.2 to 1.4; it has no backward, is
    slower in bfloat16, and compiles for 5 to 25 seconds at each new shape.

    Args:
        length: tokens L.
        share: of the L x L pairs that are read, 0..1.
        whole: whether the tiles divide the grid and no single keys are masked.
    """
    if length < DENSE_BELOW:
        return Choice(
            "dense", f"{length} tokens are too few for sparse attention to pay: masked dense, no gain"
        )
    if share > DENSE_ABOVE:
        return Choice("dense", f"{share:.0%} of the pairs are read, too many to pay: masked dense, no gain")
    if device.type != "cuda":
        return Choice("gather", f"fastest on {device.type}")
    if not whole:
        return Choice("gather", "flex attention needs tiles that divide the grid and no masked keys")
    return Choice("flex", "compiled kernel on CUDA")


def needs_gradients_on_cpu(*tensors: Tensor) -> bool:
    """Is this what compiled flex attention can't do?"""
    return torch.is_grad_enabled() and any(x.requires_grad and x.device.type == "cpu" for x in tensors)


@dataclass(frozen=True)
class BlockPlan:
    """Block lists on a layout: what a block-sparse strategy makes, once for a static mask or at each call.

    Args:
        lists: which key tiles each query tile reads.
        tiling: the tiles.
        layout: where the text stands.
        executor: how to run; `"auto"` chooses.
    """

    lists: BlockLists
    tiling: Tiling
    layout: TokenLayout
    executor: Executor = "auto"

    @functools.cached_property
    def share(self) -> float:
        """Of the L x L pairs that are read, 0..1."""
        return density(self.lists, self.tiling, self.layout)

    @functools.cached_property
    def mask(self) -> Tensor:
        """(B or 1, h or 1, L, L) bool."""
        return dense_mask(self.lists, self.tiling, self.layout)

    @functools.cached_property
    def _flex(self) -> flex.FlexPlan:
        return flex.plan_blocks(self.lists, self.tiling, self.layout)

    def choose(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Choice:
        """The executor for these inputs, and why."""
        if mask is not None and not is_key_mask(mask, q.shape[0], self.layout.length):
            return Choice("dense", "the model's mask has a row for each query: masked dense, no gain")
        if self.executor == "flex" and needs_gradients_on_cpu(q, k, v):
            return Choice("gather", "flex attention has no backward on CPU")
        if self.executor != "auto":
            return Choice(self.executor, "as asked for")
        whole = self.tiling.valid is None and mask is None
        return choose(self.layout.length, self.share, device=q.device, whole=whole)

    def prepare(self, device: torch.device) -> Choice:
        """Make what the executor needs, before the first call; tells which it will be when the model passes
        no mask."""
        whole = self.tiling.valid is None
        if self.executor == "auto":
            choice = choose(self.layout.length, self.share, device=device, whole=whole)
        else:
            choice = Choice(self.executor, "as asked for")
        _ = {"dense": lambda: self.mask, "gather": lambda: self.lists, "flex": lambda: self._flex}[
            choice.name
        ]()
        return choice

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attention under the lists, (B, h, L, d) -> (B, h, L, d).

        Args:
            mask: what the model passed, bool (True: may be read) or additive, broadcastable to (B, h, L, L).
        """
        name = self.choose(q, k, v, mask).name
        if name == "dense":
            return masked_dense(q, k, v, combine(self.mask, mask), scale)
        if name == "flex":
            return flex.flex_blocks(q, k, v, self._flex, self.layout, scale=scale)
        keys = None if mask is None else key_mask(mask, q.shape[0], self.layout.length)
        return gather_blocks(q, k, v, self.lists, self.tiling, self.layout, keys=keys, scale=scale)

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """`attend` and the log of each query's softmax denominator, (B, h, L) in float32."""
        if self.choose(q, k, v, mask).name == "dense":
            return attention_with_lse(q, k, v, combine(self.mask, mask), scale)
        keys = None if mask is None else key_mask(mask, q.shape[0], self.layout.length)
        return gather_blocks_with_lse(q, k, v, self.lists, self.tiling, self.layout, keys=keys, scale=scale)


@dataclass(frozen=True)
class WindowPlan:
    """An element mask made of windows, on a layout; runs gathered or as masked dense attention.

    Args:
        windows: the keys and masks of the query tiles.
        layout: where the text stands.
        executor: how to run; `"auto"` chooses, `"flex"` is taken as that.
    """

    windows: Windows
    layout: TokenLayout
    executor: Executor = "auto"

    @functools.cached_property
    def share(self) -> float:
        """Of the L x L pairs that are read, 0..1."""
        windows, length = self.windows, self.layout.length
        reads = windows.masks.sum(-1)[windows.kind]  # (n, t)
        if windows.tiling.valid is not None:
            reads = reads * windows.tiling.valid
        text = self.layout.joint_text_length
        return (int(reads.sum()) + text * (self.layout.image_length + length)) / length**2

    @functools.cached_property
    def mask(self) -> Tensor:
        """(1, 1, L, L) bool."""
        windows, layout = self.windows, self.layout
        order = windows.tiling.order
        image = torch.zeros(layout.image_length, layout.image_length, dtype=torch.bool, device=order.device)
        image[order[:, :, None], windows.keys[:, None]] = windows.masks[windows.kind]
        mask = torch.ones(layout.length, layout.length, dtype=torch.bool, device=order.device)
        mask[layout.image_span, layout.image_span] = image
        return mask[None, None]

    def choose(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Choice:
        """The executor for these inputs, and why."""
        if mask is not None and not is_key_mask(mask, q.shape[0], self.layout.length):
            return Choice("dense", "the model's mask has a row for each query: masked dense, no gain")
        return self._choice

    @functools.cached_property
    def _choice(self) -> Choice:
        if self.executor in ("dense", "gather"):
            return Choice(self.executor, "as asked for")
        length = self.layout.length
        gathered = self.windows.keys.shape[1] + self.layout.joint_text_length
        words = f"a tile gathers {gathered} of {length} keys"
        if length < DENSE_BELOW or gathered / length > DENSE_ABOVE:
            return Choice("dense", f"{words}, no gain")
        return Choice("gather", words)

    def prepare(self, device: torch.device) -> Choice:
        """Make what the executor needs, before the first call; tells which it will be."""
        if self._choice.name == "dense":
            _ = self.mask
        return self._choice

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attention under the windows, (B, h, L, d) -> (B, h, L, d)."""
        if self.choose(q, k, v, mask).name == "dense":
            return masked_dense(q, k, v, combine(self.mask, mask), scale)
        keys = None if mask is None else key_mask(mask, q.shape[0], self.layout.length)
        return gather_windows(q, k, v, self.windows, self.layout, keys=keys, scale=scale)

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """`attend` and the log of each query's softmax denominator, (B, h, L) in float32."""
        if self.choose(q, k, v, mask).name == "dense":
            return attention_with_lse(q, k, v, combine(self.mask, mask), scale)
        keys = None if mask is None else key_mask(mask, q.shape[0], self.layout.length)
        return gather_windows_with_lse(q, k, v, self.windows, self.layout, keys=keys, scale=scale)


# A mask that does not depend on the data, ready to run.
StaticMask = BlockPlan | WindowPlan


def in_words(what: str, layout: TokenLayout, share: float, choice: Choice) -> str:
    """A line of the report: how a method runs on a layout."""
    frames, *side = layout.grid
    grid = " x ".join(map(str, side if frames == 1 else layout.grid))
    if share >= 1:
        return f"{what} on {grid} tokens: everything is read: dense, nothing is saved"
    text = f"{what} on {grid} tokens: {share:.1%} of the pairs are read; runs {choice.name} ({choice.reason})"
    return f"{text}; slower than plain attention" if choice.name == "dense" else text
