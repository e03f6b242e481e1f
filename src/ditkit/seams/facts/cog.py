"""CogView, CogVideoX and the classes after their plan: text first, norms and feed-forward shared."""

from __future__ import annotations

import dataclasses

from ditkit.seams.anatomy import Anatomy, Attention, Stack, Unit
from ditkit.seams.facts.grids import frames_first, patched_2d, patched_3d
from ditkit.seams.facts.rows import pair
from ditkit.seams.facts.stacks import TEXT_LAST

_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
_JOINT = (Attention("attn1", "joint"),)

_COGVIDEOX = Anatomy(
    name="CogVideoXTransformer3DModel",
    channels=2,
    text="prefix",
    grid=frames_first,
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=_ARGUMENTS,
            units=(Unit("attn1", bypass=("norm1.norm",)), Unit("ff", bypass=("norm2.norm",))),
            attention=_JOINT,
            returns=TEXT_LAST,
            token_rows={"image_rotary_emb": pair(0)},
        ),
    ),
)

_COGVIEW3 = Anatomy(
    name="CogView3PlusTransformer2DModel",
    text="prefix",
    grid=patched_2d,
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states", "emb"),
            units=(
                Unit("attn1", bypass=("norm1.norm_x", "norm1.norm_c")),
                Unit("ff", bypass=("norm2", "norm2_context")),
            ),
            attention=_JOINT,
            returns=TEXT_LAST,
        ),
    ),
)

# Image and text pass through one feed-forward, one after the other.
_SHARED = Stack(
    path="transformer_blocks",
    arguments=_ARGUMENTS,
    units=(
        Unit("attn1", bypass=("norm1.norm", "norm1.norm_context")),
        Unit("ff", bypass=("norm2", "norm2_context"), calls=2),
    ),
    attention=_JOINT,
    returns=TEXT_LAST,
    token_rows={"image_rotary_emb": pair(0)},
)

_COGVIEW4 = Anatomy(
    name="CogView4Transformer2DModel",
    text="prefix",
    grid=patched_2d,
    text_mask=("attention_mask",),
    stacks=(_SHARED,),
)

_GLM = Anatomy(
    name="GlmImageTransformer2DModel",
    text="prefix",
    grid=patched_2d,
    no_tokens=lambda model, arguments: (
        "kv_caches keep the keys of reference pictures" if arguments.get("kv_caches") is not None else None
    ),
    stacks=(_SHARED,),
)

_EASYANIMATE = Anatomy(
    name="EasyAnimateTransformer3DModel",
    text="prefix",
    grid=patched_3d,
    encoder=("encoder_hidden_states", "encoder_hidden_states_t5"),
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=_ARGUMENTS,
            # Blocks behind the first `mmdit_layers` have no `txt_ff`: their `ff` serves the text, too.
            units=(
                Unit("attn1", bypass=("norm1.norm",)),
                Unit("ff", bypass=("norm2.norm",), calls=2, shared_without="txt_ff"),
                Unit("txt_ff", bypass=("norm2.norm",)),
            ),
            attention=_JOINT,
            returns=TEXT_LAST,
            token_rows={"image_rotary_emb": pair(0)},
        ),
    ),
)

_MOCHI = Anatomy(
    name="MochiTransformer3DModel",
    text="suffix",
    grid=patched_3d,
    text_mask=("encoder_attention_mask",),
    falling_time=False,
    unfit={"attention": "each sample attends apart, over its valid text only: lengths differ by prompt"},
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "temb",
                "encoder_attention_mask",
                "image_rotary_emb",
            ),
            units=(
                Unit("attn1", bypass=("norm1.norm", "norm1_context.norm")),
                Unit("ff", bypass=("norm3",)),
                Unit("ff_context", bypass=("norm3_context",)),
            ),
            attention=_JOINT,
            returns=TEXT_LAST,
            token_rows={"image_rotary_emb": pair(0)},
        ),
    ),
)

ANATOMIES = (
    _COGVIDEOX,
    dataclasses.replace(_COGVIDEOX, name="ConsisIDTransformer3DModel"),
    _COGVIEW3,
    _COGVIEW4,
    _GLM,
    _EASYANIMATE,
    _MOCHI,
)
