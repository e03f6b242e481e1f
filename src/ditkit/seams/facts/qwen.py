"""Qwen"""

from __future__ import annotations

from ditkit.seams.anatomy import Anatomy, Attention, Stack, Unit
from ditkit.seams.facts.grids import controlled, listed_grid
from ditkit.seams.facts.rows import first_of_pair, modulation
from ditkit.seams.facts.stacks import TEXT_FIRST

_QWEN = Anatomy(
    name="QwenImageTransformer2DModel",
    text="prefix",
    grid=listed_grid,
    text_mask=("encoder_hidden_states_mask",),
    no_tokens=controlled,
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(
                Unit("attn", bypass=("img_norm1", "txt_norm1")),
                Unit("img_mlp", bypass=("img_norm2",)),
                Unit("txt_mlp", bypass=("txt_norm2",)),
            ),
            attention=(Attention("attn", "joint"),),
            returns=TEXT_FIRST,
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "encoder_hidden_states_mask",
                "temb",
                "image_rotary_emb",
                "joint_attention_kwargs",
                "modulate_index",
            ),
            token_rows={"image_rotary_emb": first_of_pair, "modulate_index": modulation(1, ndim=2)},
            # QwenImage-Edit 2511 modulates reference tokens apart.
            per_token={"modulate_index": lambda index: index is not None},
        ),
    ),
)

ANATOMIES = (_QWEN,)
