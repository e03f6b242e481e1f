"""Cosmos: self-attention, cross-attention and feed-forward behind adaptive norms; video."""

from __future__ import annotations

from torch import nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit
from ditkit.seams.facts.grids import controlled, patched_3d
from ditkit.seams.facts.rows import modulation, pair, table


def _text(anatomy: Anatomy, model: nn.Module, arguments: Arguments) -> int:
    """Cosmos 2.5 passes text and picture states as a tuple."""
    states = arguments["encoder_hidden_states"]
    return int((states[0] if isinstance(states, tuple) else states).shape[1])


_PER_FRAME = modulation(1, ndim=3)
_COSMOS = Anatomy(
    name="CosmosTransformer3DModel",
    text="cross",
    grid=patched_3d,
    text_tokens=_text,
    no_tokens=controlled,
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "embedded_timestep",
                "temb",
                "image_rotary_emb",
                "extra_pos_emb",
                "attention_mask",
                "controlnet_residual",
            ),
            units=(
                Unit("attn1", bypass=("norm1.norm",)),
                Unit("attn2", bypass=("norm2.norm",)),
                Unit("ff", bypass=("norm3.norm",)),
            ),
            attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
            token_rows={
                "image_rotary_emb": pair(0),
                "extra_pos_emb": table(1),
                "embedded_timestep": _PER_FRAME,
                "temb": _PER_FRAME,
            },
            # Video to world gives frames timesteps of their own.
            per_token={"embedded_timestep": lambda embedded: embedded.ndim == 3},
        ),
    ),
)

ANATOMIES = (_COSMOS,)
