"""CogVideoX' kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiny_models import Tiny
from zoo.common import angles, clip, mask, picture, text


def _consisid() -> nn.Module:
    from diffusers import ConsisIDTransformer3DModel

    return ConsisIDTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=16,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=3,
        LFE_output_dim=21,
        LFE_ff_mult=2,
        LFE_num_scale=2,
    )


def _consisid_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    sample = clip(batch, size).transpose(1, 2)
    return {
        "hidden_states": sample,
        "encoder_hidden_states": text(batch),
        "image_rotary_emb": angles(sample.shape[1] * 8, 8),
        "id_cond": torch.randn(batch, 8),
        "id_vit_hidden": [torch.randn(batch, 3, 16) for _ in range(2)],
    }


_SIZES: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": 24,
    "time_embed_dim": 8,
}


def _pairs(batch: int, *names: str) -> dict[str, Tensor]:
    return {name: torch.tensor([[8.0, 8.0]]).expand(batch, -1).clone() for name in names}


def _cogview3() -> nn.Module:
    from diffusers import CogView3PlusTransformer2DModel

    return CogView3PlusTransformer2DModel(**_SIZES, condition_dim=4, pos_embed_max_size=8, sample_size=8)


def _cogview_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": picture(batch, size),
        "encoder_hidden_states": text(batch),
        **_pairs(batch, "original_size", "target_size", "crop_coords"),
    }


def _cogview4() -> nn.Module:
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(**_SIZES, condition_dim=4, rope_axes_dim=(16, 16))


def _glm() -> nn.Module:
    from diffusers import GlmImageTransformer2DModel

    return GlmImageTransformer2DModel(**_SIZES, condition_dim=4, prior_vq_quantizer_codebook_size=10)


def _glm_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    sample = picture(batch, size)
    tokens = sample.shape[-2] * sample.shape[-1] // 4
    return {
        "hidden_states": sample,
        "encoder_hidden_states": text(batch),
        "prior_token_id": torch.arange(batch * tokens).reshape(batch, tokens) % 10,
        "prior_token_drop": torch.zeros(batch, tokens, dtype=torch.bool),
        **_pairs(batch, "target_size", "crop_coords"),
    }


def _easyanimate() -> nn.Module:
    from diffusers import EasyAnimateTransformer3DModel

    return EasyAnimateTransformer3DModel(**_SIZES, sample_width=8, sample_height=8, mmdit_layers=1)


def _easyanimate_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {"hidden_states": clip(batch, size), "encoder_hidden_states": text(batch)}


def _mochi() -> nn.Module:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(**_SIZES, pooled_projection_dim=16, max_sequence_length=5)


def _mochi_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": clip(batch, size),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": mask(batch, valid=3, dtype=torch.bool),
    }


ANIMALS = (
    Tiny("ConsisIDTransformer3DModel", _consisid, _consisid_inputs, axes="bfchw"),
    Tiny("CogView3PlusTransformer2DModel", _cogview3, _cogview_inputs),
    Tiny("CogView4Transformer2DModel", _cogview4, _cogview_inputs),
    Tiny("GlmImageTransformer2DModel", _glm, _glm_inputs),
    Tiny("EasyAnimateTransformer3DModel", _easyanimate, _easyanimate_inputs),
    Tiny("MochiTransformer3DModel", _mochi, _mochi_inputs),
)
