"""Wan's kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny_models import Tiny
from zoo.common import clip, text

_SIZES: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {"hidden_states": clip(batch, size), "encoder_hidden_states": text(batch)}


def _chronoedit() -> nn.Module:
    from diffusers import ChronoEditTransformer3DModel

    return ChronoEditTransformer3DModel(**_SIZES, rope_temporal_skip_len=2)


def _skyreels() -> nn.Module:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**_SIZES)


def _vace() -> nn.Module:
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(**_SIZES, vace_layers=[0], vace_in_channels=6)


def _vace_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {**_inputs(batch, seed, size), "control_hidden_states": clip(batch, size, 6)}


def _animate() -> nn.Module:
    from diffusers import WanAnimateTransformer3DModel

    return WanAnimateTransformer3DModel(
        **{**_SIZES, "in_channels": 12},
        latent_channels=4,
        image_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8},
        motion_encoder_size=8,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def _animate_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    sample = clip(batch, size, 12)
    frames = sample.shape[2]
    return {
        "hidden_states": sample,
        "encoder_hidden_states": text(batch),
        "encoder_hidden_states_image": text(batch, 8, 2),
        "pose_hidden_states": torch.randn(batch, 4, frames - 1, *sample.shape[-2:]),
        "face_pixel_values": torch.randn(batch, 3, 4 * (frames - 1), 8, 8),
    }


def _anyflow() -> nn.Module:
    from diffusers import AnyFlowTransformer3DModel

    return AnyFlowTransformer3DModel(**_SIZES)


def _anyflow_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": clip(batch, size, frames=(2, 2)).transpose(1, 2),
        "encoder_hidden_states": text(batch),
        "r_timestep": torch.full((batch, 2), 100.0),
    }


def _helios() -> nn.Module:
    from diffusers import HeliosTransformer3DModel

    return HeliosTransformer3DModel(
        **{name: value for name, value in _SIZES.items() if name != "rope_max_seq_len"}, rope_dim=(4, 4, 4)
    )


def _helios_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    sample = clip(batch, size)
    frames = sample.shape[2]
    return {
        "hidden_states": sample,
        "encoder_hidden_states": text(batch),
        "indices_hidden_states": torch.arange(2, 2 + frames).expand(batch, -1),
        "latents_history_short": torch.randn(batch, 4, 2, *sample.shape[-2:]),
        "indices_latents_history_short": torch.arange(2).expand(batch, -1),
    }


ANIMALS = (
    Tiny("ChronoEditTransformer3DModel", _chronoedit, _inputs),
    Tiny("SkyReelsV2Transformer3DModel", _skyreels, _inputs),
    Tiny("WanVACETransformer3DModel", _vace, _vace_inputs),
    Tiny("WanAnimateTransformer3DModel", _animate, _animate_inputs),
    Tiny("AnyFlowTransformer3DModel", _anyflow, _anyflow_inputs, axes="bfchw", clocks=(2,)),
    Tiny("HeliosTransformer3DModel", _helios, _helios_inputs),
)
