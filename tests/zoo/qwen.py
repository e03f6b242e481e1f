"""QwenImage's kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny_models import Tiny
from zoo.common import TEXT, clip, mask, text


def _qwen21() -> nn.Module:
    from diffusers import QwenImage21Transformer2DModel

    return QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=24,
        mlp_ratio=2,
        axes_dims_rope=(4, 4, 8),
    )


def _qwen21_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    height, width = ((4, 4), (6, 4))[size]
    # A picture's place among the text is marked by one slot for each four of its tokens.
    slots = torch.zeros(batch, TEXT + height * width // 4, dtype=torch.bool)
    slots[:, TEXT:] = True
    return {
        "hidden_states": torch.randn(batch, height * width, 4),
        "encoder_hidden_states": text(batch),
        "img_shapes": [[(1, height, width)]] * batch,
        "img_mask": slots,
    }


_JOY: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 24,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 4, 8],
}


def _joy() -> nn.Module:
    from diffusers import JoyImageEditTransformer3DModel

    return JoyImageEditTransformer3DModel(**_JOY)


def _joy_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {"hidden_states": clip(batch, size), "encoder_hidden_states": text(batch)}


def _joy_plus() -> nn.Module:
    from diffusers import JoyImageEditPlusTransformer3DModel

    return JoyImageEditPlusTransformer3DModel(**_JOY)


def _joy_plus_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    height, width = ((4, 4), (6, 4))[size]
    return {
        "hidden_states": torch.randn(batch, height * width, 4, 1, 2, 2),
        "encoder_hidden_states": text(batch),
        "encoder_hidden_states_mask": mask(batch, valid=4),
        "shape_list": [[(1, height, width)]] * batch,
    }


ANIMALS = (
    Tiny("QwenImage21Transformer2DModel", _qwen21, _qwen21_inputs, scale=1.0),
    Tiny("JoyImageEditTransformer3DModel", _joy, _joy_inputs),
    Tiny("JoyImageEditPlusTransformer3DModel", _joy_plus, _joy_plus_inputs, axes="blcfhw"),
)
