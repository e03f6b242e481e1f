"""QwenImage and JoyImage: double-stream blocks whose parts are named after image and text."""

from __future__ import annotations

from typing import Any

from torch import nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit
from ditkit.seams.errors import SeamError
from ditkit.seams.facts.grids import Grid, controlled, listed_grid, patched_3d
from ditkit.seams.facts.rows import first, modulation, pair, table
from ditkit.seams.facts.stacks import TEXT_FIRST, TEXT_LAST

_UNITS = (
    Unit("attn", bypass=("img_norm1", "txt_norm1")),
    Unit("img_mlp", bypass=("img_norm2",)),
    Unit("txt_mlp", bypass=("txt_norm2",)),
)
_JOINT = (Attention("attn", "joint"),)

_QWEN = Anatomy(
    name="QwenImageTransformer2DModel",
    text="prefix",
    grid=listed_grid,
    packed=2,
    text_mask=("encoder_hidden_states_mask",),
    no_tokens=controlled,
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "encoder_hidden_states_mask",
                "temb",
                "image_rotary_emb",
                "joint_attention_kwargs",
                "modulate_index",
            ),
            units=_UNITS,
            attention=_JOINT,
            returns=TEXT_FIRST,
            token_rows={"image_rotary_emb": first(table(0)), "modulate_index": modulation(1, ndim=2)},
            # QwenImage-Edit 2511 modulates reference tokens apart.
            per_token={"modulate_index": lambda index: index is not None},
        ),
    ),
)

_PACKED = "text and pictures take turns in one sequence, under a block-causal mask that is run part by part"
_QWEN21 = Anatomy(
    name="QwenImage21Transformer2DModel",
    text="prefix",
    grid=listed_grid,
    unfit={"tokens": _PACKED, "attention": _PACKED},
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=("hidden_states", "modulation", "rotary_emb", "attention_mask", "target_token_mask"),
            units=(Unit("attn", bypass=("img_norm1",)), Unit("img_mlp", bypass=("img_norm2",))),
            attention=_JOINT,
            per_token={"target_token_mask": lambda mask: mask is not None},
        ),
    ),
)


def _one_item(model: nn.Module, arguments: Arguments) -> Grid:
    if arguments["hidden_states"].ndim == 6:
        raise SeamError(
            "hidden_states (B, N, C, F, H, W) hold several pictures in one sequence; one grid is needed"
        )
    return patched_3d(model, arguments)


_JOY = Anatomy(
    name="JoyImageEditTransformer3DModel",
    text="suffix",
    grid=_one_item,
    stacks=(
        Stack(
            path="double_blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            units=_UNITS,
            attention=_JOINT,
            returns=TEXT_LAST,
            token_rows={"image_rotary_emb": first(pair(0))},
        ),
    ),
)


def _one_shape(model: nn.Module, arguments: Arguments) -> Grid:
    shapes: Any = arguments["shape_list"]
    if any(len(shape) != 1 or tuple(shape[0]) != tuple(shapes[0][0]) for shape in shapes):
        raise SeamError("shape_list has several pictures, or other ones in each sample; one grid is needed")
    frames, height, width = shapes[0][0]
    if arguments["hidden_states"].shape[1] != frames * height * width:
        raise SeamError(
            "the pictures are padded to a common number of patches; a grid without padding is needed"
        )
    return int(frames), int(height), int(width)


_JOY_PLUS = Anatomy(
    name="JoyImageEditPlusTransformer3DModel",
    text="suffix",
    grid=_one_shape,
    unfit={"output": "its output is a list of patches without their places"},
    text_mask=("encoder_hidden_states_mask",),
    stacks=(
        Stack(
            path="double_blocks",
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "temb",
                "image_rotary_emb",
                "attention_mask",
            ),
            units=_UNITS,
            attention=_JOINT,
            returns=TEXT_LAST,
            token_rows={"image_rotary_emb": pair(1), "attention_mask": table(-1, "suffix")},
        ),
    ),
)

ANATOMIES = (_QWEN, _QWEN21, _JOY, _JOY_PLUS)
