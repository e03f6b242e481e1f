"""DiT, PixArt"""

from __future__ import annotations

from ditkit.seams.anatomy import Anatomy, Attention, Stack, Unit
from ditkit.seams.facts.grids import own_grid, patched_2d
from ditkit.seams.facts.rows import modulation

_DIT = Anatomy(
    name="DiTTransformer2DModel",
    text="none",
    grid=patched_2d,
    encoder=(),
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(Unit("attn1", bypass=("norm1.norm",)), Unit("ff", bypass=("norm3",))),
            attention=(Attention("attn1", "self"),),
            arguments=("hidden_states",),
        ),
    ),
)

_PIXART = Anatomy(
    name="PixArtTransformer2DModel",
    text="cross",
    grid=patched_2d,
    text_mask=("encoder_attention_mask",),
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(Unit("attn1", bypass=("norm1",)), Unit("attn2"), Unit("ff", bypass=("norm2",))),
            attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
            arguments=("hidden_states", "attention_mask", "encoder_hidden_states"),
        ),
    ),
)

_OWN_DIT = Anatomy(
    name="DiT",
    text="none",
    grid=own_grid,
    encoder=(),
    # The same network runs DiT's times, which fall, and SiT's, which rise.
    falling_time=False,
    stacks=(
        Stack(
            path="blocks",
            units=(Unit("attn", bypass=("norm1",)), Unit("mlp", bypass=("norm2",))),
            attention=(Attention("attn", "self"),),
            arguments=("hidden_states", "conditioning"),
            token_rows={"conditioning": modulation(1, ndim=3)},
            per_token={"conditioning": lambda conditioning: conditioning.shape[1] > 1},
        ),
    ),
)

ANATOMIES = (
    _DIT,
    _PIXART,
    _OWN_DIT,
)
