"""DiT's kin, AuraFlow and Cosmos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiny_models import Tiny
from zoo.common import angles, clip, mask, picture, text


def _latte() -> nn.Module:
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=24,
        video_length=2,
    )


def _latte_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {"hidden_states": clip(batch, size, frames=(2, 2)), "encoder_hidden_states": text(batch)}


def _allegro() -> nn.Module:
    from diffusers import AllegroTransformer3DModel

    return AllegroTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_height=8,
        sample_width=8,
        sample_frames=2,
        caption_channels=24,
    )


def _allegro_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    sample = clip(batch, size)
    frames, height, width = sample.shape[2], sample.shape[3] // 2, sample.shape[4] // 2
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
    return {
        "hidden_states": sample,
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": mask(batch, valid=4),
        "image_rotary_emb": ((angles(4, 2),) * 3, tuple(axis[None] for axis in places.unbind(1))),
    }


def _lumina_next() -> nn.Module:
    from diffusers import LuminaNextDiT2DModel

    return LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=24,
    )


def _complex(height: int, width: int, pairs: int) -> Tensor:
    turns = torch.arange(height)[:, None, None] + 0.3 * torch.arange(width)[None, :, None]
    turns = turns * 0.9 ** torch.arange(pairs)
    return torch.polar(torch.ones_like(turns), turns)


def _lumina_next_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": picture(batch, size),
        "encoder_hidden_states": text(batch),
        "encoder_mask": mask(batch, valid=4),
        "image_rotary_emb": _complex(8, 8, 8),
        "cross_attention_kwargs": {},
    }


def _aura() -> nn.Module:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )


def _aura_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {"hidden_states": picture(batch, size), "encoder_hidden_states": text(batch)}


def _cosmos() -> nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=24,
        adaln_lora_dim=8,
        max_size=(4, 8, 8),
        concat_padding_mask=False,  # its resizing needs torchvision
    )


def _cosmos_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {"hidden_states": clip(batch, size), "encoder_hidden_states": text(batch), "fps": 24}


ANIMALS = (
    Tiny("LatteTransformer3DModel", _latte, _latte_inputs),
    Tiny("AllegroTransformer3DModel", _allegro, _allegro_inputs),
    Tiny("LuminaNextDiT2DModel", _lumina_next, _lumina_next_inputs),
    Tiny("AuraFlowTransformer2DModel", _aura, _aura_inputs),
    Tiny("CosmosTransformer3DModel", _cosmos, _cosmos_inputs),
)
