"""CogVideoX"""

from __future__ import annotations

from ditkit.seams.anatomy import Anatomy, Attention, Stack, Unit
from ditkit.seams.facts.grids import frames_first
from ditkit.seams.facts.rows import pair

_COGVIDEOX = Anatomy(
    name="CogVideoXTransformer3DModel",
    text="prefix",
    grid=frames_first,
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(Unit("attn1", bypass=("norm1.norm",)), Unit("ff", bypass=("norm2.norm",))),
            attention=(Attention("attn1", "joint"),),
            returns=("hidden_states", "encoder_hidden_states"),
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            token_rows={"image_rotary_emb": pair(0)},
        ),
    ),
)

ANATOMIES = (_COGVIDEOX,)
