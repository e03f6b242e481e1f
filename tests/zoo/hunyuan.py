"""Hunyuan's kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny_models import Tiny
from zoo.common import clip, mask, picture, text


def _framepack() -> nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    return HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=24,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    )


def _framepack_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    def past(frames: int) -> dict[str, Any]:
        return {"latents": torch.randn(batch, 4, frames, 8, 8), "indices": torch.arange(frames)}

    frames = (2, 3)[size]
    clean, twice, four = past(2), past(2), past(4)
    return {
        "hidden_states": torch.randn(batch, 4, frames, 8, 8),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": mask(batch, dtype=torch.long),
        "pooled_projections": torch.randn(batch, 16),
        "image_embeds": text(batch, 12, 3),
        "indices_latents": torch.arange(8, 8 + frames),
        "guidance": torch.full((batch,), 1000.0),
        "latents_clean": clean["latents"],
        "indices_latents_clean": clean["indices"],
        "latents_history_2x": twice["latents"],
        "indices_latents_history_2x": twice["indices"],
        "latents_history_4x": four["latents"],
        "indices_latents_history_4x": four["indices"],
    }


def _hunyuan_video15() -> nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        text_embed_dim=24,
        text_embed_2_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(4, 4, 8),
    )


def _hunyuan_video15_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": clip(batch, size),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": mask(batch, valid=3),
        "encoder_hidden_states_2": text(batch, 12, 3),
        "encoder_attention_mask_2": mask(batch, 3),
        "image_embeds": torch.zeros(batch, 2, 8),
    }


def _hunyuan_image() -> nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=(2, 2),
        text_embed_dim=24,
        text_embed_2_dim=12,
        rope_axes_dim=(8, 8),
    )


def _hunyuan_image_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": picture(batch, size),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": mask(batch, valid=3),
        "encoder_hidden_states_2": text(batch, 12, 3),
        "encoder_attention_mask_2": mask(batch, 3, valid=2),
    }


def _motif() -> nn.Module:
    from diffusers import MotifVideoTransformer3DModel

    return MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=24,
        image_embed_dim=12,
        rope_axes_dim=(4, 4, 8),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


def _motif_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": clip(batch, size),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": mask(batch, valid=4),
        "image_embeds": text(batch, 12, 2),
    }


ANIMALS = (
    Tiny("HunyuanVideoFramepackTransformer3DModel", _framepack, _framepack_inputs),
    Tiny("HunyuanVideo15Transformer3DModel", _hunyuan_video15, _hunyuan_video15_inputs),
    Tiny("HunyuanImageTransformer2DModel", _hunyuan_image, _hunyuan_image_inputs),
    Tiny("MotifVideoTransformer3DModel", _motif, _motif_inputs),
)
