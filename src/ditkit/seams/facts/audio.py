"""Transformers of sound: caches fit their blocks; there is no picture whose tokens could be placed."""

from __future__ import annotations

from torch import nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit
from ditkit.seams.errors import SeamError
from ditkit.seams.facts.grids import Grid

_LINE = "sound is a line of tokens, not a picture or a video with a grid of them"


def _no_grid(model: nn.Module, arguments: Arguments) -> Grid:
    raise SeamError(_LINE)


def _sound(name: str, *stacks: Stack) -> Anatomy:
    return Anatomy(
        name=name, text="cross", grid=_no_grid, unfit={"tokens": _LINE, "attention": _LINE}, stacks=stacks
    )


_STABLE_AUDIO = _sound(
    "StableAudioDiTModel",
    Stack(
        path="transformer_blocks",
        arguments=("hidden_states", "attention_mask", "encoder_hidden_states"),
        units=(
            Unit("attn1", bypass=("norm1",)),
            Unit("attn2", bypass=("norm2",)),
            Unit("ff", bypass=("norm3",)),
        ),
        attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
    ),
)

_STABLE_AUDIO3 = _sound(
    "StableAudio3DiTModel",
    Stack(
        path="transformer_blocks",
        arguments=("hidden_states", "context", "global_modulation"),
        units=(
            Unit("self_attn", bypass=("pre_norm",)),
            Unit("cross_attn", bypass=("cross_attend_norm",)),
            Unit("ff", bypass=("ff_norm",)),
        ),
        attention=(Attention("self_attn", "self"), Attention("cross_attn", "cross")),
    ),
)

_ACE_STEP = _sound(
    "AceStepTransformer1DModel",
    Stack(
        path="layers",
        arguments=("hidden_states", "position_embeddings", "temb"),
        units=(
            Unit("self_attn", bypass=("self_attn_norm",)),
            Unit("cross_attn", bypass=("cross_attn_norm",)),
            Unit("mlp", bypass=("mlp_norm",)),
        ),
        attention=(Attention("self_attn", "self"), Attention("cross_attn", "cross")),
    ),
)

_LONGCAT_AUDIO = _sound(
    "LongCatAudioDiTTransformer",
    Stack(
        path="blocks",
        arguments=("hidden_states", "timestep_embed", "cond"),
        # Its norms are functions, not modules.
        units=(Unit("self_attn"), Unit("cross_attn"), Unit("ffn")),
        attention=(Attention("self_attn", "self"), Attention("cross_attn", "cross")),
    ),
)

_MUSIC3 = _sound(
    "MiniMaxMusic3Transformer1DModel",
    Stack(
        path="transformer_blocks",
        arguments=("hidden_states", "rotary_emb"),
        units=(Unit("attn", bypass=("norm1",)), Unit("ff_out", bypass=("norm2", "ff_in"))),
        attention=(Attention("attn", "self"),),
    ),
)

_PACKED = "video, sound and text are packed in one sequence by lists of places"
_H3 = Anatomy(
    name="MiniMaxH3Transformer3DModel",
    text="cross",
    grid=_no_grid,
    unfit={"tokens": _PACKED, "attention": _PACKED},
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=("hidden_states", "temb", "adaln_indices", "rotary_emb"),
            units=(Unit("attn", bypass=("norm1",)), Unit("ff", bypass=("norm2",))),
            attention=(Attention("attn", "joint"),),
            # Each token has its own modulation, always.
            per_token={"adaln_indices": lambda indices: True},
        ),
    ),
)

ANATOMIES = (_STABLE_AUDIO, _STABLE_AUDIO3, _ACE_STEP, _LONGCAT_AUDIO, _MUSIC3, _H3)
