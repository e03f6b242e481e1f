"""Ways to run sparse attention, and the rule that chooses between them.

| executor | for | gradients | needs |
|---|---|---|---|
| `dense` | short sequences, dense masks, masks without structure | yes | memory for L x L |
| `gather` | everything else, on CPU always | yes | - |
| `flex` | CUDA; on CPU when asked for | not on CPU | a compiler, whole tiles |
"""

from __future__ import annotations

from ditkit.seams.executors.blocks import (
    BlockLists,
    Tiling,
    dense_mask,
    density,
    sides,
    sides_option,
    tile_grid,
)
from ditkit.seams.executors.dense import combine, is_key_mask, key_mask, masked_dense
from ditkit.seams.executors.flex import FlexPlan, FlexTable, flex_blocks, flex_table, plan_blocks, plan_table
from ditkit.seams.executors.gather import gather_blocks, gather_blocks_with_lse
from ditkit.seams.executors.opaque import attend_map
from ditkit.seams.executors.plan import (
    DENSE_ABOVE,
    DENSE_BELOW,
    BlockPlan,
    Choice,
    Executor,
    StaticMask,
    WindowPlan,
    choose,
    in_words,
    needs_gradients_on_cpu,
)
from ditkit.seams.executors.scores import attention_with_lse, pooled_scores, pooled_tiles
from ditkit.seams.executors.windows import (
    Windows,
    gather_windows,
    gather_windows_with_lse,
    neighbourhoods,
    places,
)

__all__ = [
    "DENSE_ABOVE",
    "DENSE_BELOW",
    "BlockLists",
    "BlockPlan",
    "Choice",
    "Executor",
    "FlexPlan",
    "FlexTable",
    "StaticMask",
    "Tiling",
    "WindowPlan",
    "Windows",
    "attend_map",
    "attention_with_lse",
    "choose",
    "combine",
    "dense_mask",
    "density",
    "flex_blocks",
    "flex_table",
    "gather_blocks",
    "gather_blocks_with_lse",
    "gather_windows",
    "gather_windows_with_lse",
    "in_words",
    "is_key_mask",
    "key_mask",
    "masked_dense",
    "needs_gradients_on_cpu",
    "neighbourhoods",
    "places",
    "plan_blocks",
    "plan_table",
    "pooled_scores",
    "pooled_tiles",
    "sides",
    "sides_option",
    "tile_grid",
]
