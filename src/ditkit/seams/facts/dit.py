"""DiT and the classes after its plan: self-attention of image tokens, text by cross-attention if at all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditkit.seams.anatomy import Anatomy, Attention, Stack, Unit
from ditkit.seams.facts.grids import own_grid, patched_2d, patched_3d
from ditkit.seams.facts.rows import modulation, table

_SELF_CROSS = (Attention("attn1", "self"), Attention("attn2", "cross"))

_DIT = Anatomy(
    name="DiTTransformer2DModel",
    text="none",
    grid=patched_2d,
    encoder=(),
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=("hidden_states",),
            units=(Unit("attn1", bypass=("norm1.norm",)), Unit("ff", bypass=("norm3",))),
            attention=(Attention("attn1", "self"),),
        ),
    ),
)

_PIXART_UNITS = (Unit("attn1", bypass=("norm1",)), Unit("attn2"), Unit("ff", bypass=("norm2",)))
PIXART = Anatomy(
    name="PixArtTransformer2DModel",
    text="cross",
    grid=patched_2d,
    text_mask=("encoder_attention_mask",),
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=("hidden_states", "attention_mask", "encoder_hidden_states"),
            units=_PIXART_UNITS,
            attention=_SELF_CROSS,
        ),
    ),
)

_LATTE_ARGUMENTS = ("hidden_states", "attention_mask", "encoder_hidden_states")
_LATTE = Anatomy(
    name="LatteTransformer3DModel",
    text="cross",
    grid=patched_3d,
    text_mask=("encoder_attention_mask",),
    interleaved=True,
    unfit={"tokens": "blocks within a frame and blocks through time take turns, and need whole frames"},
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=_LATTE_ARGUMENTS,
            units=_PIXART_UNITS,
            attention=_SELF_CROSS,
            view="frame",
        ),
        Stack(
            path="temporal_transformer_blocks",
            arguments=_LATTE_ARGUMENTS,
            units=_PIXART_UNITS,
            attention=_SELF_CROSS,
            view="time",
        ),
    ),
)


def _allegro_rotary(tables: Any, indices: Tensor, text: int) -> Any:
    """(frequencies, positions): three rows of positions, one for each axis, with a column for each token."""
    frequencies, positions = tables
    at = indices.to(positions[0].device)
    return frequencies, tuple(position.index_select(-1, at) for position in positions)


_ALLEGRO = Anatomy(
    name="AllegroTransformer3DModel",
    text="cross",
    grid=patched_3d,
    text_mask=("encoder_attention_mask",),
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "temb",
                "attention_mask",
                "encoder_attention_mask",
                "image_rotary_emb",
            ),
            units=_PIXART_UNITS,
            attention=_SELF_CROSS,
            token_rows={"attention_mask": table(-1), "image_rotary_emb": _allegro_rotary},
        ),
    ),
)

_LUMINA_NEXT = Anatomy(
    name="LuminaNextDiT2DModel",
    text="cross",
    grid=patched_2d,
    text_mask=("encoder_mask",),
    falling_time=False,
    stacks=(
        Stack(
            path="layers",
            arguments=(
                "hidden_states",
                "attention_mask",
                "image_rotary_emb",
                "encoder_hidden_states",
                "encoder_mask",
                "temb",
            ),
            # Both attentions share an output projection, a part of attn2, which runs at every step.
            units=(
                Unit("attn1", bypass=("norm1.norm",)),
                Unit("attn2", bypass=("norm1.norm", "norm1_context")),
                Unit("feed_forward", bypass=("ffn_norm1",)),
            ),
            attention=_SELF_CROSS,
            token_rows={"attention_mask": table(-1), "image_rotary_emb": table(-2)},
        ),
    ),
)

DIT = Anatomy(
    name="DiT",
    text="none",
    grid=own_grid,
    encoder=(),
    # The same network runs DiT's times, which fall, and SiT's, which rise.
    falling_time=False,
    stacks=(
        Stack(
            path="blocks",
            arguments=("hidden_states", "conditioning"),
            units=(Unit("attn", bypass=("norm1",)), Unit("mlp", bypass=("norm2",))),
            attention=(Attention("attn", "self"),),
            token_rows={"conditioning": modulation(1, ndim=3)},
            per_token={"conditioning": lambda conditioning: conditioning.shape[1] > 1},
        ),
    ),
)

ANATOMIES = (_DIT, PIXART, _LATTE, _ALLEGRO, _LUMINA_NEXT, DIT)
