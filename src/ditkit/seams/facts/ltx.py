"""LTX-Video, LTX-2 (a stream of sound beside the video) and SANA-WM's refiner built on it."""

from __future__ import annotations

from typing import Any

from ditkit.seams.anatomy import Anatomy, Attention, Stack, Unit
from ditkit.seams.facts.grids import named_grid
from ditkit.seams.facts.rows import modulation, pair


def _per_token(temb: Any) -> bool:
    return temb.shape[1] > 1


_LTX = Anatomy(
    name="LTXVideoTransformer3DModel",
    text="cross",
    grid=named_grid,
    text_mask=("encoder_attention_mask",),
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            units=(Unit("attn1", bypass=("norm1",)), Unit("attn2"), Unit("ff", bypass=("norm2",))),
            attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
            token_rows={"image_rotary_emb": pair(1), "temb": modulation(1, ndim=3)},
            per_token={"temb": _per_token},
        ),
    ),
)

_TWO_STREAMS = "a stream of sound runs through the same blocks and reads all tokens of the video"
_BOTH_NORMS = ("audio_to_video_norm", "video_to_audio_norm")
_LTX2 = Anatomy(
    name="LTX2VideoTransformer3DModel",
    text="cross",
    grid=named_grid,
    text_mask=("encoder_attention_mask",),
    unfit={
        "stack": _TWO_STREAMS,
        "tokens": _TWO_STREAMS,
        "answer": _TWO_STREAMS,
        "output": _TWO_STREAMS,
    },
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=(
                "hidden_states",
                "audio_hidden_states",
                "encoder_hidden_states",
                "audio_encoder_hidden_states",
                "temb",
                "temb_audio",
                "temb_ca_scale_shift",
                "temb_ca_audio_scale_shift",
            ),
            units=(
                Unit("attn1", bypass=("norm1",)),
                Unit("audio_attn1", bypass=("audio_norm1",)),
                Unit("attn2", bypass=("norm2",)),
                Unit("audio_attn2", bypass=("audio_norm2",)),
                Unit("audio_to_video_attn", bypass=_BOTH_NORMS),
                Unit("video_to_audio_attn", bypass=_BOTH_NORMS),
                Unit("ff", bypass=("norm3",)),
                Unit("audio_ff", bypass=("audio_norm3",)),
            ),
            attention=(
                Attention("attn1", "self"),
                Attention("attn2", "cross"),
                Attention("audio_attn2", "cross"),
                Attention("audio_to_video_attn", "cross"),
                Attention("video_to_audio_attn", "cross"),
            ),
            returns=("hidden_states", "audio_hidden_states"),
            per_token={
                "temb": _per_token,
                "temb_audio": _per_token,
                "temb_ca_scale_shift": _per_token,
                "temb_ca_audio_scale_shift": _per_token,
            },
        ),
    ),
)

_CACHED = "its forward is not told the grid, and a cache adds keys of other frames"
_REFINER = Anatomy(
    name="SanaWMLTX2RefinerTransformer3DModel",
    text="cross",
    grid=named_grid,
    text_mask=("encoder_attention_mask",),
    unfit={"tokens": _CACHED, "attention": _CACHED},
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "video_rotary_emb"),
            units=(
                Unit("attn1", bypass=("norm1",)),
                Unit("attn2", bypass=("norm2",)),
                Unit("ff", bypass=("norm3",)),
            ),
            attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
            per_token={"temb": _per_token},
        ),
    ),
)

ANATOMIES = (_LTX, _LTX2, _REFINER)
