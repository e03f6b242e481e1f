"""Kandinsky's kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiny_models import Tiny
from zoo.common import TEXT, clip, text

_SIZES: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "time_dim": 8,
    "model_dim": 32,
    "ff_dim": 48,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 8),
}


def _video(batch: int, size: int) -> Tensor:
    return clip(batch, size).movedim(1, -1)


def _kandinsky5() -> nn.Module:
    from diffusers import Kandinsky5Transformer3DModel

    return Kandinsky5Transformer3DModel(**_SIZES, in_text_dim=24, in_text_dim2=16, num_text_blocks=1)


def _kandinsky5_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    sample = _video(batch, size)
    frames, height, width = sample.shape[1:4]
    return {
        "hidden_states": sample,
        "encoder_hidden_states": text(batch),
        "pooled_projections": torch.randn(batch, 16),
        "visual_rope_pos": [torch.arange(frames), torch.arange(height // 2), torch.arange(width // 2)],
        "text_rope_pos": torch.arange(TEXT),
    }


def _kandinsky6() -> nn.Module:
    from diffusers import Kandinsky6Transformer3DModel

    return Kandinsky6Transformer3DModel(
        **_SIZES,
        in_text_dim=24,
        in_text_dim2=16,
        num_text_blocks=1,
        visual_cond=False,
        in_audio_dim=6,
        out_audio_dim=6,
    )


def _kandinsky6_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch, size),
        "encoder_hidden_states": text(batch),
        "pooled_projections": torch.randn(batch, 16),
        "audio_hidden_states": torch.randn(batch, 7, 6),
    }


ANIMALS = (
    Tiny("Kandinsky5Transformer3DModel", _kandinsky5, _kandinsky5_inputs, axes="bfhwc"),
    Tiny("Kandinsky6Transformer3DModel", _kandinsky6, _kandinsky6_inputs, axes="bfhwc"),
)
