"""Transformers of sound, and one of video and sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny_models import Tiny
from zoo.common import TEXT, angles, mask, text


def _length(size: int) -> int:
    return (8, 12)[size]


def _stable_audio() -> nn.Module:
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=12,
        cross_attention_input_dim=24,
    )


def _stable_audio_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, _length(size)),
        "encoder_hidden_states": text(batch),
        "global_hidden_states": text(batch, 12, 1),
        "rotary_embedding": angles(_length(size) + 1, 4),
    }


def _stable_audio3() -> nn.Module:
    from diffusers import StableAudio3DiTModel

    return StableAudio3DiTModel(
        io_channels=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=24,
        global_cond_dim=12,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2.0,
        num_memory_tokens=2,
    )


def _stable_audio3_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, _length(size)),
        "encoder_hidden_states": text(batch),
        "global_hidden_states": torch.randn(batch, 12),
    }


def _ace_step() -> nn.Module:
    from diffusers import AceStepTransformer1DModel

    return AceStepTransformer1DModel(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=2,
    )


def _ace_step_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, _length(size), 4),
        "context_latents": torch.randn(batch, _length(size), 8),
        "encoder_hidden_states": text(batch, 32),
        "timestep_r": torch.full((batch,), 0.1),
    }


def _longcat_audio() -> nn.Module:
    from diffusers import LongCatAudioDiTTransformer

    return LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=24, latent_dim=4, ff_mult=2.0
    )


def _longcat_audio_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, _length(size), 4),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": mask(batch, valid=4, dtype=torch.bool),
    }


def _music3() -> nn.Module:
    from diffusers import MiniMaxMusic3Transformer1DModel

    return MiniMaxMusic3Transformer1DModel(
        in_channels=4,
        condition_dim=6,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=48,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )


def _music3_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, _length(size)),
        "encoder_hidden_states": torch.randn(batch, _length(size), 6),
    }


def _h3() -> nn.Module:
    from diffusers import MiniMaxH3Transformer3DModel

    return MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=48,
        in_channels=4,
        audio_in_channels=6,
        text_dim=24,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def _h3_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    video, sound = _length(size), 3
    length = TEXT + video + sound
    # One sample: text, then video, then sound.
    return {
        "hidden_states": torch.randn(1, video, 16),
        "audio_hidden_states": torch.randn(1, sound, 6),
        "encoder_hidden_states": text(1),
        "timestep_indices": torch.zeros(length, dtype=torch.long),
        "token_tags": torch.tensor([0] * TEXT + [1] * video + [2] * sound),
        "position_ids": torch.arange(length)[:, None].expand(-1, 3),
        "text_indices": torch.arange(TEXT),
        "video_indices": torch.arange(TEXT, TEXT + video),
        "audio_indices": torch.arange(TEXT + video, length),
    }


ANIMALS = (
    Tiny("StableAudioDiTModel", _stable_audio, _stable_audio_inputs),
    Tiny("StableAudio3DiTModel", _stable_audio3, _stable_audio3_inputs, scale=1.0),
    Tiny("AceStepTransformer1DModel", _ace_step, _ace_step_inputs, scale=1.0),
    Tiny("LongCatAudioDiTTransformer", _longcat_audio, _longcat_audio_inputs, scale=1.0),
    Tiny("MiniMaxMusic3Transformer1DModel", _music3, _music3_inputs, scale=1.0),
    Tiny("MiniMaxH3Transformer3DModel", _h3, _h3_inputs),
)
