"""Wan and the classes built from its blocks: self-attention, cross-attention, feed-forward; video."""

from __future__ import annotations

import dataclasses

from torch import nn

from ditkit.seams.anatomy import Anatomy, Attention, Stack, Unit
from ditkit.seams.facts.grids import frames_first, patched_3d
from ditkit.seams.facts.rows import modulation, named, pair, square, table

_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb")
_BLOCKS = Stack(
    path="blocks",
    arguments=_ARGUMENTS,
    units=(
        Unit("attn1", bypass=("norm1",)),
        Unit("attn2", bypass=("norm2",)),
        Unit("ffn", bypass=("norm3",)),
    ),
    attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
    token_rows={"rotary_emb": pair(1), "temb": modulation(1, ndim=4)},
    # Wan 2.2 TI2V gives every token its own timestep.
    per_token={"temb": lambda temb: temb.ndim == 4},
)

_WAN = Anatomy(
    name="WanTransformer3DModel",
    text="cross",
    grid=patched_3d,
    encoder=("encoder_hidden_states_image", "encoder_hidden_states"),
    stacks=(_BLOCKS,),
)

_SKYREELS = dataclasses.replace(
    _WAN,
    name="SkyReelsV2Transformer3DModel",
    stacks=(
        dataclasses.replace(
            _BLOCKS,
            arguments=(*_ARGUMENTS, "attention_mask"),
            # Diffusion forcing: frames have timesteps of their own, and may not look ahead.
            token_rows={"rotary_emb": pair(1), "temb": modulation(2, ndim=4), "attention_mask": square()},
        ),
    ),
)


def _hint_at_the_end(model: nn.Module) -> str | None:
    if len(model.get_submodule("blocks")._modules) - 1 in model.config.vace_layers:  # type: ignore[union-attr]
        return "vace_layers adds a hint of the control branch behind the last block"
    return None


_VACE = dataclasses.replace(
    _WAN,
    name="WanVACETransformer3DModel",
    unfit={"tokens": "the control branch reads all tokens of the video beside its own"},
    no_stack=_hint_at_the_end,
    stacks=(
        dataclasses.replace(
            _BLOCKS,
            path="vace_blocks",
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "control_hidden_states",
                "temb",
                "rotary_emb",
            ),
            # What a skipped block hands on as hint is of no account: no block reads it.
            returns=("control_hidden_states", "control_hidden_states"),
            token_rows={},
        ),
        _BLOCKS,
    ),
)

_ANIMATE = dataclasses.replace(
    _WAN,
    name="WanAnimateTransformer3DModel",
    # The face adapters between the blocks run at every step; they are cross-attention to the face.
    unfit={"tokens": "the face adapters between the blocks group the tokens by frame"},
)

_ANYFLOW = dataclasses.replace(
    _WAN,
    name="AnyFlowTransformer3DModel",
    grid=frames_first,
    channels=2,
    stacks=(
        dataclasses.replace(
            _BLOCKS, token_rows={"rotary_emb": named(table(2), "query", "key"), "temb": modulation(1, ndim=4)}
        ),
    ),
)

_HISTORY = "frames of the past at several resolutions stand before the new ones in one sequence"
_HELIOS = dataclasses.replace(
    _WAN, name="HeliosTransformer3DModel", unfit={"tokens": _HISTORY, "attention": _HISTORY}
)

ANATOMIES = (
    _WAN,
    dataclasses.replace(_WAN, name="ChronoEditTransformer3DModel"),
    _SKYREELS,
    _VACE,
    _ANIMATE,
    _ANYFLOW,
    _HELIOS,
)
