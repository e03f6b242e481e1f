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


def _sana_wm() -> nn.Module:
    from diffusers import SanaWMTransformer3DModel

    return SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=24,
        num_attention_heads=2,
        patch_size=(1, 2, 2),
        softmax_every_n=2,
        linear_head_dim=12,
        caption_channels=24,
        use_chunk_plucker_post_attn=False,
        mixed_precision="no",
    )


def _sana_wm_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": clip(batch, size, frames=(2, 2)),
        "encoder_hidden_states": text(batch)[:, None],
        "encoder_attention_mask": mask(batch, valid=4)[:, None, None],
    }


ANIMALS = (
    Tiny("SanaTransformer2DModel", _sana, _inputs),
    Tiny("SanaVideoTransformer3DModel", _sana_video, _video_inputs),
    Tiny("SanaWMTransformer3DModel", _sana_wm, _sana_wm_inputs, clocks=(1, 2)),
)
