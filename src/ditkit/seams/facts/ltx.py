"""LTX"""

from __future__ import annotations

from ditkit.seams.anatomy import Anatomy, Attention, Stack, Unit
from ditkit.seams.facts.grids import named_grid
from ditkit.seams.facts.rows import modulation, pair

_LTX = Anatomy(
    name="LTXVideoTransformer3DModel",
    text="cross",
    grid=named_grid,
    text_mask=("encoder_attention_mask",),
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(Unit("attn1", bypass=("norm1",)), Unit("attn2"), Unit("ff", bypass=("norm2",))),
            attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            token_rows={"image_rotary_emb": pair(1), "temb": modulation(1, ndim=3)},
            per_token={"temb": lambda temb: temb.shape[1] > 1},
        ),
    ),
)

ANATOMIES = (_LTX,)
