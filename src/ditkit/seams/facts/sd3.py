"""SD3"""

from __future__ import annotations

from ditkit.seams.anatomy import Anatomy, Attention, Stack, Unit
from ditkit.seams.facts.grids import controlled, patched_2d
from ditkit.seams.facts.stacks import ADA_NORMS, TEXT_FIRST

_SD3 = Anatomy(
    name="SD3Transformer2DModel",
    text="suffix",
    grid=patched_2d,
    no_tokens=controlled,
    stacks=(
        Stack(
            path="transformer_blocks",
            # The dual-attention blocks of SD 3.5 medium norm once for attn and attn2; the last block has no
            # feed-forward for text.
            units=(
                Unit("attn", bypass=ADA_NORMS),
                Unit("attn2", bypass=("norm1.norm",)),
                Unit("ff", bypass=("norm2",)),
                Unit("ff_context", bypass=("norm2_context",)),
            ),
            attention=(Attention("attn", "joint"), Attention("attn2", "self")),
            returns=TEXT_FIRST,
            arguments=("hidden_states", "encoder_hidden_states", "temb"),
        ),
    ),
)

ANATOMIES = (_SD3,)
