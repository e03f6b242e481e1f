"""Sana: linear self-attention and a feed-forward that convolves over the grid."""

from __future__ import annotations

from ditkit.seams.anatomy import Anatomy, Attention, Seam, Stack, Unit
from ditkit.seams.facts.grids import patched_2d, patched_3d

_UNFIT: dict[Seam, str] = {
    "attention": "its self-attention is linear: there are no pairs of tokens to leave out",
    "tokens": "its feed-forward convolves over the whole grid of tokens",
}
_BLOCKS = Stack(
    path="transformer_blocks",
    arguments=(
        "hidden_states",
        "attention_mask",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "timestep",
    ),
    # The norm before the feed-forward runs at every step: what follows folds the tokens into the grid.
    units=(Unit("attn1", bypass=("norm1",)), Unit("attn2"), Unit("ff")),
    attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
    # Image to video gives every token its own timestep.
    per_token={"timestep": lambda timestep: timestep.ndim == 3 and timestep.shape[1] > 1},
)

_SANA = Anatomy(
    name="SanaTransformer2DModel",
    text="cross",
    grid=patched_2d,
    text_mask=("encoder_attention_mask",),
    unfit=_UNFIT,
    stacks=(_BLOCKS,),
)

_SANA_VIDEO = Anatomy(
    name="SanaVideoTransformer3DModel",
    text="cross",
    grid=patched_3d,
    text_mask=("encoder_attention_mask",),
    unfit=_UNFIT,
    stacks=(_BLOCKS,),
)

_SANA_WM = Anatomy(
    name="SanaWMTransformer3DModel",
    text="cross",
    grid=patched_3d,
    unfit=_UNFIT,
    stacks=(
        Stack(
            path="blocks",
            arguments=("x", "y", "t"),
            # Between norms and units the tokens are taken apart by frame: norms run at every step.
            units=(Unit("attn"), Unit("cross_attn"), Unit("mlp")),
            attention=(Attention("attn", "self"), Attention("cross_attn", "cross")),
        ),
    ),
)

ANATOMIES = (_SANA, _SANA_VIDEO, _SANA_WM)
