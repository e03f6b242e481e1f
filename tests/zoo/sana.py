"""Sana's kin."""

from __future__ import annotations

from typing import Any

from torch import nn

from tiny_models import Tiny
from zoo.common import clip, mask, picture, text


def _sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        patch_size=2,
    )


def _sana_video() -> nn.Module:
    from diffusers import SanaVideoTransformer3DModel

    return SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=24,
        rope_max_seq_len=32,
    )


def _inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": picture(batch, size),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": mask(batch, valid=4),
    }


def _video_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {**_inputs(batch, seed, size), "hidden_states": clip(batch, size)}


ANIMALS = (
    Tiny("SanaTransformer2DModel", _sana, _inputs),
    Tiny("SanaVideoTransformer3DModel", _sana_video, _video_inputs),
)
