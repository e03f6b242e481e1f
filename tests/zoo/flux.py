"""FLUX' kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny_models import Tiny
from zoo.common import TEXT, packed, text

_SIZES: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 8),
}


def _inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {**packed(batch, size), "encoder_hidden_states": text(batch)}


def _bria() -> nn.Module:
    from diffusers import BriaTransformer2DModel

    return BriaTransformer2DModel(**_SIZES)


def _ovis() -> nn.Module:
    from diffusers import OvisImageTransformer2DModel

    return OvisImageTransformer2DModel(**_SIZES, out_channels=4)


def _longcat() -> nn.Module:
    from diffusers import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel(**_SIZES, pooled_projection_dim=16)


def _bria_fibo() -> nn.Module:
    from diffusers import BriaFiboTransformer2DModel

    return BriaFiboTransformer2DModel(**_SIZES, text_encoder_dim=12)


def _bria_fibo_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {**_inputs(batch, seed, size), "text_encoder_layers": [text(batch, 12) for _ in range(4)]}


def _chroma() -> nn.Module:
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        **_SIZES, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
    )


def _chroma_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    inputs = _inputs(batch, seed, size)
    mask = torch.ones(batch, TEXT + inputs["hidden_states"].shape[1], dtype=torch.bool)
    mask[0, TEXT - 1] = False
    return {**inputs, "attention_mask": mask}


def _flux2() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        **{**_SIZES, "axes_dims_rope": (4, 4, 4, 4)}, timestep_guidance_channels=16, mlp_ratio=2.0
    )


def _flux2_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        **packed(batch, size, axes=4),
        "encoder_hidden_states": text(batch),
        "guidance": torch.full((batch,), 3.5),
    }


def _flux3() -> nn.Module:
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _flux3_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {**packed(batch, size, axes=4), "encoder_hidden_states": text(batch)}


ANIMALS = (
    Tiny("BriaTransformer2DModel", _bria, _inputs),
    Tiny("OvisImageTransformer2DModel", _ovis, _inputs, scale=1.0),
    Tiny("LongCatImageTransformer2DModel", _longcat, _inputs, scale=1.0),
    Tiny("BriaFiboTransformer2DModel", _bria_fibo, _bria_fibo_inputs),
    Tiny("ChromaTransformer2DModel", _chroma, _chroma_inputs, scale=1.0),
    Tiny("Flux2Transformer2DModel", _flux2, _flux2_inputs, scale=1.0),
    Tiny("Flux3Transformer2DModel", _flux3, _flux3_inputs, scale=1.0),
)
