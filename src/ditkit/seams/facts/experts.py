"""Feed-forward by a mixture of experts: HiDream, where tokens choose, and NucleusMoE, where experts do."""

from __future__ import annotations

from torch import nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit
from ditkit.seams.errors import SeamError
from ditkit.seams.facts.grids import Grid, listed_grid, patched_2d

_PADDED = "pictures that are not square are padded to a fixed number of tokens"


def _hidream_text(anatomy: Anatomy, model: nn.Module, arguments: Arguments) -> int:
    """T5's states, the last of Llama's, and those of Llama's layer that belongs to the block."""
    llama = arguments["encoder_hidden_states_llama3"]
    return int(arguments["encoder_hidden_states_t5"].shape[1]) + 2 * int(llama[0].shape[1])


def _hidream_grid(model: nn.Module, arguments: Arguments) -> Grid:
    if _padded(arguments):
        raise SeamError(f"{_PADDED}; a method that needs the grid takes square ones")
    return patched_2d(model, arguments)


def _padded(arguments: Arguments) -> bool:
    sample = arguments["hidden_states"]
    return arguments.get("hidden_states_masks") is not None or sample.shape[-2] != sample.shape[-1]


_ARGUMENTS = ("hidden_states", "hidden_states_masks", "encoder_hidden_states", "temb", "image_rotary_emb")
_UNITS = (
    Unit("block.attn1", bypass=("block.norm1_i", "block.norm1_t")),
    Unit("block.ff_i", bypass=("block.norm3_i",)),
    Unit("block.ff_t", bypass=("block.norm3_t",)),
)
_HIDREAM = Anatomy(
    name="HiDreamImageTransformer2DModel",
    text="suffix",
    grid=_hidream_grid,
    encoder=(),
    text_tokens=_hidream_text,
    timestep="timesteps",
    unfit={"tokens": "between the blocks it cuts the sequence by the number of the picture's tokens"},
    stacks=(
        Stack(
            path="double_stream_blocks",
            arguments=_ARGUMENTS,
            units=_UNITS,
            attention=(Attention("block.attn1", "joint"),),
            returns=("hidden_states", "encoder_hidden_states"),
        ),
        Stack(
            path="single_stream_blocks",
            arguments=_ARGUMENTS,
            units=_UNITS,
            attention=(Attention("block.attn1", "joint"),),
            joint=True,
        ),
    ),
)

_NUCLEUS = Anatomy(
    name="NucleusMoEImageTransformer2DModel",
    text="cross",
    grid=listed_grid,
    unfit={
        "tokens": "its experts choose their tokens among all of the picture's",
        "attention": "the text has keys but no queries in the image's attention, so that it is not square",
    },
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            units=(Unit("attn", bypass=("pre_attn_norm",)), Unit("img_mlp", bypass=("pre_mlp_norm",))),
            attention=(Attention("attn", "joint"),),
        ),
    ),
)

ANATOMIES = (_HIDREAM, _NUCLEUS)
