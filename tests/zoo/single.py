"""Classes with one stream, behind refiners or not; mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiny_models import Tiny
from zoo.common import TEXT, mask, picture, text


def _lumina2() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(32, 8, 8),
        cap_feat_dim=24,
    )


def _lumina2_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    # Every prompt has four tokens of the five: prompts of other lengths have a test of their own.
    valid = mask(batch, dtype=torch.bool)
    valid[:, 4:] = False
    return {
        "hidden_states": picture(batch, size),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": valid,
    }


def _z_image() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 4, 8],
        axes_lens=[80, 16, 16],
    )


def _z_image_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    height, width = ((8, 32), (16, 16))[size]
    return {
        "x": list(torch.randn(batch, 4, 1, height, width)),
        "cap_feats": [torch.randn(TEXT + place, 24) for place in range(batch)],
    }


def _fibo2() -> nn.Module:
    from diffusers import BriaFibo2Transformer2DModel

    return BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=24,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=3,
        max_num_gist_tokens=6,
        gist_step=3,
        gist_min_text_len=4,
        gist_max_text_len=8,
        axes_dims=(4, 4, 8),
        axes_lens=(16, 8, 8),
    )


def _fibo2_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": picture(batch, size),
        "encoder_hidden_states": torch.randn(batch, 2, TEXT, 24),
        "encoder_attention_mask": mask(batch, dtype=torch.bool),
    }


def _omnigen() -> nn.Module:
    from diffusers import OmniGenTransformer2DModel

    return OmniGenTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        num_layers=2,
        pad_token_id=0,
        vocab_size=16,
        max_position_embeddings=128,
        original_max_position_embeddings=64,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=16,
        time_step_dim=16,
    )


def _omnigen_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    sample = picture(batch, size)
    length = TEXT + 1 + sample.shape[-2] * sample.shape[-1] // 4
    seen = torch.ones(batch, length, length)
    seen[:, :TEXT] = torch.ones(TEXT, length).tril()  # words do not look ahead
    return {
        "hidden_states": sample,
        "input_ids": torch.arange(batch * TEXT).reshape(batch, TEXT) % 16,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": seen,
        "position_ids": torch.arange(length).expand(batch, -1),
    }


def _ernie() -> nn.Module:
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=48,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        text_in_dim=24,
        rope_axes_dim=(4, 4, 8),
    )


def _ernie_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    lengths = torch.full((batch,), TEXT)
    lengths[0] = 3
    return {"hidden_states": picture(batch, size), "text_bth": text(batch), "text_lens": lengths}


def _krea2() -> nn.Module:
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=24,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )


def _places(size: int) -> Tensor:
    """(L, 3): frame, row, column."""
    height, width = ((4, 4), (6, 4))[size]
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))


def _krea2_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    places = _places(size)
    return {
        "hidden_states": torch.randn(batch, len(places), 4),
        "encoder_hidden_states": torch.randn(batch, TEXT, 2, 24),
        "encoder_attention_mask": mask(batch, valid=4, dtype=torch.bool),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), places]),
    }


def _ideogram4() -> nn.Module:
    from diffusers import Ideogram4Transformer2DModel

    return Ideogram4Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=48,
        adaln_dim=8,
        llm_features_dim=24,
        mrope_section=(4, 2, 2),
    )


def _ideogram4_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    places = _places(size).long()
    length = TEXT + len(places)
    segments = torch.ones(batch, length, dtype=torch.long)
    segments[0, 0] = -1  # padding
    words = torch.arange(TEXT)[:, None].expand(-1, 3)
    return {
        "hidden_states": torch.randn(batch, length, 4),
        "encoder_hidden_states": text(batch, 24, length),
        "position_ids": torch.cat([words, places + 7]).expand(batch, -1, -1),
        "segment_ids": segments,
        "indicator": torch.tensor([3] * TEXT + [2] * len(places)).expand(batch, -1),
    }


def _prx() -> nn.Module:
    from diffusers import PRXTransformer2DModel

    return PRXTransformer2DModel(
        in_channels=4, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]
    )


def _prx_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": picture(batch, size),
        "encoder_hidden_states": text(batch),
        "attention_mask": mask(batch, valid=4),
    }


def _hidream() -> nn.Module:
    from diffusers import HiDreamImageTransformer2DModel

    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[24, 12],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 4, 8),
        max_resolution=(12, 12),
        llama_layers=[0, 1, 1],
    )


def _hidream_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    side = (8, 12)[size]
    return {
        "hidden_states": torch.randn(batch, 4, side, side),
        "encoder_hidden_states_t5": text(batch),
        "encoder_hidden_states_llama3": torch.randn(2, batch, 2, 12),
        "pooled_embeds": torch.randn(batch, 16),
    }


def _nucleus() -> nn.Module:
    from diffusers import NucleusMoEImageTransformer2DModel

    model = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
        mlp_ratio=2.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=1.0,
    )
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.1)  # diffusers leaves them as the memory was
    return model


def _nucleus_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    height, width = ((4, 4), (6, 4))[size]
    return {
        "hidden_states": torch.randn(batch, height * width, 16),
        "encoder_hidden_states": text(batch),
        "img_shapes": [(1, height, width)] * batch,
    }


ANIMALS = (
    Tiny("Lumina2Transformer2DModel", _lumina2, _lumina2_inputs, scale=1.0),
    Tiny("ZImageTransformer2DModel", _z_image, _z_image_inputs, timestep="t", scale=1.0, axes="bcfhw"),
    Tiny("BriaFibo2Transformer2DModel", _fibo2, _fibo2_inputs, scale=1.0),
    Tiny("OmniGenTransformer2DModel", _omnigen, _omnigen_inputs, scale=1.0),
    Tiny("ErnieImageTransformer2DModel", _ernie, _ernie_inputs),
    Tiny("Krea2Transformer2DModel", _krea2, _krea2_inputs, scale=1.0),
    Tiny("Ideogram4Transformer2DModel", _ideogram4, _ideogram4_inputs, scale=1.0),
    Tiny("PRXTransformer2DModel", _prx, _prx_inputs, scale=1.0),
    Tiny("HiDreamImageTransformer2DModel", _hidream, _hidream_inputs, timestep="timesteps"),
    Tiny("NucleusMoEImageTransformer2DModel", _nucleus, _nucleus_inputs, scale=1.0),
)
