"""Stable Diffusion 3 (text last) and AuraFlow (text first, behind register tokens)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit, text_tokens
from ditkit.seams.facts.grids import controlled, patched_2d
from ditkit.seams.facts.stacks import ADA_NORMS, FEED_FORWARDS, TEXT_FIRST, double_stream

_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "temb")

_SD3 = Anatomy(
    name="SD3Transformer2DModel",
    text="suffix",
    grid=patched_2d,
    no_tokens=controlled,
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=_ARGUMENTS,
            # The dual-attention blocks of SD 3.5 medium norm once for attn and attn2; the last block has no
            # feed-forward for text.
            units=(Unit("attn", bypass=ADA_NORMS), Unit("attn2", bypass=("norm1.norm",)), *FEED_FORWARDS),
            attention=(Attention("attn", "joint"), Attention("attn2", "self")),
            returns=TEXT_FIRST,
        ),
    ),
)


def _with_registers(anatomy: Anatomy, model: nn.Module, arguments: Arguments) -> int:
    registers: Any = model.register_tokens
    return text_tokens(anatomy, model, arguments) + int(registers.shape[1])


_AURA = Anatomy(
    name="AuraFlowTransformer2DModel",
    text="prefix",
    grid=patched_2d,
    text_tokens=_with_registers,
    stacks=(
        double_stream("joint_transformer_blocks", _ARGUMENTS, TEXT_FIRST, {}),
        Stack(
            path="single_transformer_blocks",
            arguments=("hidden_states", "temb"),
            units=(Unit("attn", bypass=("norm1.norm",)), Unit("ff", bypass=("norm2",))),
            attention=(Attention("attn", "joint"),),
            joint=True,
        ),
    ),
)

ANATOMIES = (_SD3, _AURA)
