"""Ways to run sparse attention, and the rule that chooses between them.

| executor | for | gradients | needs |
|---|---|---|---|
| `dense` | short sequences, dense masks, masks without structure | yes | memory for L x L |
| `gather` | everything else | yes | - |
| `flex` | long float32 inference on CPU, and CUDA | not on CPU | a compiler, whole tiles |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ditkit.seams.executors import flex
from ditkit.seams.executors.blocks import BlockLists, Tiling, dense_mask, density, tile_grid
from ditkit.seams.executors.dense import combine, key_mask, masked_dense
from ditkit.seams.executors.flex import FlexPlan, FlexTable, flex_blocks, flex_table, plan_blocks, plan_table
from ditkit.seams.executors.gather import gather_blocks
from ditkit.seams.executors.scores import attention_with_lse, pooled_scores, pooled_tiles
from ditkit.seams.executors.windows import Windows, gather_windows

__all__ = [
    "BlockLists",
    "Choice",
    "Executor",
    "FlexPlan",
    "FlexTable",
    "Tiling",
    "Windows",
    "attention_with_lse",
    "choose",
    "combine",
    "dense_mask",
    "density",
    "flex_blocks",
    "flex_table",
    "gather_blocks",
    "gather_windows",
    "key_mask",
    "masked_dense",
    "plan_blocks",
    "plan_table",
    "pooled_scores",
    "pooled_tiles",
    "tile_grid",
]

Executor = Literal["auto", "dense", "gather", "flex"]

# Measured on CPU (benchmarks/attention_executors.py): above this share of pairs, or below this many tokens, a masked
# dense pass is no slower than gathering.
DENSE_ABOVE = 0.6
DENSE_BELOW = 1024
# A compiled kernel takes 5 to 15 s to build; below this length it does not earn them back in a generation.
FLEX_FROM = 4096


@dataclass(frozen=True)
class Choice:
    """An executor and, in plain words, why."""

    name: Literal["dense", "gather", "flex"]
    reason: str


def choose(
    length: int,
    share: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
    gradients: bool,
    whole: bool = True,
) -> Choice:
    """The executor for a sparse attention.

    Args:
        length: tokens L.
        share: of the L x L pairs that are read, 0..1.
        gradients: whether the inputs need them.
        whole: whether the tiles divide the grid and the mask has no rows of its own for each sample.
    """
    if length < DENSE_BELOW:
        return Choice("dense", f"{length} tokens are too few for sparse attention to pay: masked dense, no gain")
    if share > DENSE_ABOVE:
        return Choice("dense", f"{share:.0%} of the pairs are read, too many to pay: masked dense, no gain")
    if not whole:
        return Choice("gather", "tiles that do not divide the grid, or masked keys")
    if device.type == "cpu" and gradients:
        return Choice("gather", "flex attention has no backward on CPU")
    if device.type == "cpu" and dtype != torch.float32:
        return Choice("gather", f"gathering is faster than flex attention in {dtype} on CPU")
    if length < FLEX_FROM:
        return Choice("gather", f"{length} tokens do not earn back the compilation of flex attention")
    reason = flex.available(device.type)
    if reason is not None:
        return Choice("gather", reason)
    return Choice("flex", f"{length} tokens in {dtype}, {share:.0%} of the pairs")
