"""LTX' kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny_models import Tiny
from zoo.common import angles, mask, text

_SIZES: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 24,
}


_SOUND: dict[str, Any] = {
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}


def _ltx2() -> nn.Module:
    from diffusers import LTX2VideoTransformer3DModel

    return LTX2VideoTransformer3DModel(**_SIZES, **_SOUND)


def _ltx2_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    frames, height, width = ((2, 4, 2), (3, 2, 4))[size]
    words = text(batch)
    return {
        "hidden_states": torch.randn(batch, frames * height * width, 4),
        "audio_hidden_states": torch.randn(batch, 7, 6),
        "encoder_hidden_states": words,
        "audio_encoder_hidden_states": words,
        "encoder_attention_mask": mask(batch, valid=4),
        "audio_encoder_attention_mask": mask(batch, valid=4),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": 7,
    }


def _refiner() -> nn.Module:
    from diffusers import SanaWMLTX2RefinerTransformer3DModel

    return SanaWMLTX2RefinerTransformer3DModel(**_SIZES, **_SOUND)


def _refiner_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    tokens = (16, 24)[size]
    cosine, sine = angles(tokens, 16)
    return {
        "hidden_states": torch.randn(batch, tokens, 4),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": mask(batch, valid=4),
        "video_rotary_emb": (cosine.expand(batch, -1, -1), sine.expand(batch, -1, -1)),
    }


ANIMALS = (
    Tiny("LTX2VideoTransformer3DModel", _ltx2, _ltx2_inputs),
    Tiny("SanaWMLTX2RefinerTransformer3DModel", _refiner, _refiner_inputs),
)
