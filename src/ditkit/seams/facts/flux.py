"""FLUX and the classes after its plan: double-stream blocks, then single-stream ones; text first."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit
from ditkit.seams.facts.grids import controlled, packed_grid
from ditkit.seams.facts.rows import modulation, pair, table
from ditkit.seams.facts.stacks import FEED_FORWARDS, TEXT_FIRST, double_stream, single_stream

_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
_ROTARY = {"image_rotary_emb": pair(0, "prefix")}
_DOUBLE = double_stream("transformer_blocks", _ARGUMENTS, TEXT_FIRST, _ROTARY)

FLUX = Anatomy(
    name="FluxTransformer2DModel",
    text="prefix",
    grid=packed_grid,
    packed=2,
    no_tokens=controlled,
    stacks=(_DOUBLE, single_stream("single_transformer_blocks", _ARGUMENTS, _ROTARY, TEXT_FIRST)),
)

_BRIA_FIBO = dataclasses.replace(
    FLUX,
    name="BriaFiboTransformer2DModel",
    packed=1,
    # Between the blocks, half of the text's channels are replaced by a layer of the text encoder.
    stacks=(
        _DOUBLE,
        single_stream("single_transformer_blocks", ("hidden_states", "temb", "image_rotary_emb"), _ROTARY),
    ),
)

_OVIS = dataclasses.replace(
    FLUX,
    name="OvisImageTransformer2DModel",
    stacks=(
        _DOUBLE,
        dataclasses.replace(
            FLUX.stacks[1],
            # Its gated feed-forward splits what proj_mlp gives by width: that has to run, on no token.
            units=(Unit("proj_out", bypass=("norm.norm", "attn")),),
        ),
    ),
)

_CHROMA_ROWS = {**_ROTARY, "attention_mask": table(-1, "prefix")}
_CHROMA = dataclasses.replace(
    FLUX,
    name="ChromaTransformer2DModel",
    stacks=(
        double_stream("transformer_blocks", (*_ARGUMENTS, "attention_mask"), TEXT_FIRST, _CHROMA_ROWS),
        single_stream(
            "single_transformer_blocks",
            ("hidden_states", "temb", "image_rotary_emb", "attention_mask"),
            _CHROMA_ROWS,
        ),
    ),
)


def _per_token(modulation: Any) -> bool:
    return modulation.ndim == 3 and modulation.shape[1] > 1


def _references(model: nn.Module, arguments: Arguments) -> str | None:
    if arguments.get("kv_cache_mode") is not None:
        return "with kv_cache_mode, reference tokens stand before the picture and their keys are kept apart"
    return None


_FLUX2 = Anatomy(
    name="Flux2Transformer2DModel",
    text="prefix",
    grid=packed_grid,
    packed=2,
    no_tokens=_references,
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "temb_mod_img",
                "temb_mod_txt",
                "image_rotary_emb",
            ),
            units=(Unit("attn", bypass=("norm1", "norm1_context")), *FEED_FORWARDS),
            attention=(Attention("attn", "joint"),),
            returns=TEXT_FIRST,
            token_rows=_ROTARY,
            per_token={"temb_mod_img": _per_token},
        ),
        Stack(
            path="single_transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb_mod", "image_rotary_emb"),
            # Attention and feed-forward are one module here.
            units=(Unit("attn", bypass=("norm",)),),
            attention=(Attention("attn", "joint"),),
            joint=True,
            token_rows=_ROTARY,
            per_token={"temb_mod": _per_token},
        ),
    ),
)


def _conditions(model: nn.Module, arguments: Arguments) -> str | None:
    if arguments.get("image_cond_hidden_states") is not None:
        return "image_cond_hidden_states stand behind the picture in its sequence"
    return None


_SIDE_BY_SIDE = (Unit("attn", bypass=("norm",)), Unit("ff", bypass=("norm",)))
_FLUX3 = Anatomy(
    name="Flux3Transformer2DModel",
    text="prefix",
    grid=packed_grid,
    packed=2,
    no_tokens=_conditions,
    stacks=(
        # `txt_mode_blocks` see text only and `mode_blocks.image_cond` the reference only: left alone.
        Stack(
            path="mode_blocks.image",
            arguments=("hidden_states", "temb_mod", "image_rotary_emb"),
            units=_SIDE_BY_SIDE,
            attention=(Attention("attn", "self"),),
            token_rows={"temb_mod": modulation(1, ndim=3), "image_rotary_emb": pair(0)},
            per_token={"temb_mod": _per_token},
        ),
        Stack(
            path="single_transformer_blocks",
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "temb_mod",
                "temb_mod_context",
                "image_rotary_emb",
            ),
            units=_SIDE_BY_SIDE,
            attention=(Attention("attn", "joint"),),
            returns=TEXT_FIRST,
            token_rows={"temb_mod": modulation(1, ndim=3), **_ROTARY},
            per_token={"temb_mod": _per_token},
        ),
    ),
)

ANATOMIES = (
    FLUX,
    dataclasses.replace(FLUX, name="BriaTransformer2DModel"),
    _OVIS,
    dataclasses.replace(FLUX, name="LongCatImageTransformer2DModel"),
    _BRIA_FIBO,
    _CHROMA,
    _FLUX2,
    _FLUX3,
)
