"""Hunyuan's classes: text last in the joint sequence; HunyuanDiT with cross-attention and long skips."""

from __future__ import annotations

import dataclasses

from torch import nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit
from ditkit.seams.errors import SeamError
from ditkit.seams.facts.grids import Grid, controlled, patched_2d, patched_3d, patched_nd, replaced_frame
from ditkit.seams.facts.rows import pair, table
from ditkit.seams.facts.stacks import (
    ADA_NORMS,
    FEED_FORWARDS,
    SINGLE,
    TEXT_LAST,
    double_stream,
    single_stream,
)

_START = ("hidden_states", "encoder_hidden_states", "temb", "attention_mask")
_MASK = {"attention_mask": table(-1, "suffix")}

_HUNYUAN_VIDEO = Anatomy(
    name="HunyuanVideoTransformer3DModel",
    text="suffix",
    grid=patched_3d,
    text_mask=("encoder_attention_mask",),
    no_tokens=replaced_frame,
    stacks=(
        double_stream(
            "transformer_blocks", (*_START, "freqs_cis"), TEXT_LAST, {**_MASK, "freqs_cis": pair(0)}
        ),
        single_stream(
            "single_transformer_blocks",
            (*_START, "image_rotary_emb"),
            {**_MASK, "image_rotary_emb": pair(0)},
            TEXT_LAST,
        ),
    ),
)

_HISTORY = "frames of the past at several resolutions stand before the new ones in one sequence"
_FRAMEPACK = dataclasses.replace(
    _HUNYUAN_VIDEO,
    name="HunyuanVideoFramepackTransformer3DModel",
    encoder=("image_embeds", "encoder_hidden_states"),
    text_mask=(),
    unfit={"tokens": _HISTORY, "attention": _HISTORY},
)

_HUNYUAN_VIDEO15 = Anatomy(
    name="HunyuanVideo15Transformer3DModel",
    text="suffix",
    grid=patched_3d,
    encoder=("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states"),
    stacks=(
        # Its mask has columns for text only.
        double_stream("transformer_blocks", (*_START, "freqs_cis"), TEXT_LAST, {"freqs_cis": pair(0)}),
    ),
)

_IMAGE_ROWS = {**_MASK, "image_rotary_emb": pair(0)}
_HUNYUAN_IMAGE = Anatomy(
    name="HunyuanImageTransformer2DModel",
    text="suffix",
    grid=patched_nd,
    encoder=("encoder_hidden_states_2", "encoder_hidden_states"),
    stacks=(
        double_stream("transformer_blocks", (*_START, "image_rotary_emb"), TEXT_LAST, _IMAGE_ROWS),
        single_stream("single_transformer_blocks", (*_START, "image_rotary_emb"), _IMAGE_ROWS, TEXT_LAST),
    ),
)

_MOTIF_REASON = "num_decoder_layers runs the last blocks on the picture's tokens twice in one sequence"


def _motif_decodes(model: nn.Module, arguments: Arguments) -> str | None:
    return _MOTIF_REASON if model.config.num_decoder_layers > 0 else None  # type: ignore[union-attr]


def _motif_grid(model: nn.Module, arguments: Arguments) -> Grid:
    if _motif_decodes(model, arguments) is not None:
        raise SeamError(f"{_MOTIF_REASON}; methods that need the grid can't be applied")
    return patched_3d(model, arguments)


_MOTIF_DOUBLE = double_stream("transformer_blocks", (*_START, "image_rotary_emb"), TEXT_LAST, _IMAGE_ROWS)
_MOTIF_SINGLE = single_stream("single_transformer_blocks", _MOTIF_DOUBLE.arguments, _IMAGE_ROWS, TEXT_LAST)
_MOTIF_SITES = (Attention("attn", "joint"), Attention("cross_attn", "cross"))
_MOTIF = Anatomy(
    name="MotifVideoTransformer3DModel",
    text="suffix",
    grid=_motif_grid,
    encoder=("image_embeds", "encoder_hidden_states"),
    no_tokens=_motif_decodes,
    stacks=(
        # A cross-attention reads what the joint attention gives and the normed text.
        dataclasses.replace(
            _MOTIF_DOUBLE,
            units=(
                Unit("attn", bypass=ADA_NORMS),
                Unit("cross_attn", bypass=("norm1_context.norm",)),
                *FEED_FORWARDS,
            ),
            attention=_MOTIF_SITES,
        ),
        dataclasses.replace(
            _MOTIF_SINGLE,
            units=(Unit("proj_out", bypass=(*SINGLE.bypass, "cross_attn")),),
            attention=_MOTIF_SITES,
        ),
    ),
)

_HUNYUAN_DIT = Anatomy(
    name="HunyuanDiT2DModel",
    text="cross",
    grid=patched_2d,
    encoder=("encoder_hidden_states", "encoder_hidden_states_t5"),
    text_mask=("text_embedding_mask", "text_embedding_mask_t5"),
    no_tokens=controlled,
    stacks=(
        Stack(
            path="blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            # The long skips (skip_norm, skip_linear) run at every step: they stand outside the units.
            units=(
                Unit("attn1", bypass=("norm1",)),
                Unit("attn2", bypass=("norm2",)),
                Unit("ff", bypass=("norm3",)),
            ),
            attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
            token_rows={"image_rotary_emb": pair(0)},
        ),
    ),
)

ANATOMIES = (_HUNYUAN_VIDEO, _FRAMEPACK, _HUNYUAN_VIDEO15, _HUNYUAN_IMAGE, _MOTIF, _HUNYUAN_DIT)
