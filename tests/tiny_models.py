"""A tiny random instance of every transformer class that the anatomy knows, and inputs for it.

`TINY` maps a name to a `Tiny`; `TINY[name].model()` builds the model, `.inputs()` the keyword arguments of
one forward. Everything is seeded, so two calls give equal weights and equal inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tiny:
    """A tiny model.

    Args:
        build: makes the model; call `model` instead, which seeds.
        arguments: (batch, seed, size) -> keyword arguments of the forward without the timestep; `size` 0 or 1
            chooses between two resolutions.
        timestep: the name of the timestep argument.
        scale: the timestep argument at full noise.
        tokens: image tokens at size 0.
        clocks: shape of the timesteps of one sample, where frames have their own.
        axes: of the sample, where they are not "blc", "bchw" or "bcfhw".
    """

    name: str
    build: Callable[[], nn.Module]
    arguments: Callable[[int, int, int], dict[str, Any]]
    timestep: str = "timestep"
    scale: float = 1000.0
    tokens: int = 16
    axes: str = ""
    clocks: tuple[int, ...] = ()

    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build().eval()
            # Zero-initialised layers would hide errors behind outputs that are zero.
            for parameter in model.parameters():
                if not parameter.detach().any():
                    nn.init.normal_(parameter, std=0.05)
        return model.requires_grad_(False)

    def inputs(self, batch: int = 1, seed: int = 0, size: int = 0, noise: float = 0.8) -> dict[str, Any]:
        """Keyword arguments of one forward at a noise level of 0 to 1."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            arguments = self.arguments(batch, seed, size)
        return {**arguments, self.timestep: self.time(batch, noise)}

    def time(self, batch: int, noise: float) -> Tensor:
        """The timestep argument at a noise level of 0 to 1."""
        return torch.full((batch, *self.clocks), noise * self.scale)


def output(result: Any) -> Tensor:
    """The tensor in what a forward returned."""
    if isinstance(result, Tensor):
        return result
    sample = result[0] if isinstance(result, tuple) else result.sample
    return torch.stack(sample) if isinstance(sample, list) else sample


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def _flux_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    height, width = ((4, 4), (6, 4))[size]
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return {
        "hidden_states": torch.randn(batch, height * width, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 24),
        "pooled_projections": torch.randn(batch, 16),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def _square(batch: int, size: int, channels: int = 4) -> Tensor:
    height, width = ((8, 8), (12, 8))[size]
    return torch.randn(batch, channels, height, width)


def _sd3_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": _square(batch, size),
        "encoder_hidden_states": torch.randn(batch, 5, 24),
        "pooled_projections": torch.randn(batch, 16),
    }


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=24,
        use_additional_conditions=False,
    )


def _pixart_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    mask = torch.ones(batch, 5)
    mask[:, 4] = 0
    return {
        "hidden_states": _square(batch, size),
        "encoder_hidden_states": torch.randn(batch, 5, 24),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def _dit_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    # DiTTransformer2DModel takes square pictures only: its output is cut as a square.
    side = (8, 12)[size]
    return {
        "hidden_states": torch.randn(batch, 4, side, side),
        "class_labels": torch.arange(seed, seed + batch) % 10,
    }


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=32,
    )


def _clip(batch: int, size: int, channels: int = 4) -> Tensor:
    frames, height, width = ((2, 8, 4), (3, 4, 8))[size]
    return torch.randn(batch, channels, frames, height, width)


def _wan_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": _clip(batch, size),
        "encoder_hidden_states": torch.randn(batch, 5, 24),
    }


def _hunyuan_video() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=24,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
    )


def _hunyuan_video_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    mask = torch.ones(batch, 5)
    mask[0, 3:] = 0
    return {
        "hidden_states": _clip(batch, size),
        "encoder_hidden_states": torch.randn(batch, 5, 24),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 16),
        "guidance": torch.full((batch,), 1000.0),
    }


def _angles(tokens: int, pairs: int) -> Tensor:
    """Rotary angles (tokens, 2 pairs) as a pipeline passes them: by position only, the same for all seeds."""
    frequencies = 0.9 ** torch.arange(pairs)
    return (torch.arange(tokens)[:, None] * frequencies).repeat_interleave(2, dim=1)


def _cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )


def _cogvideox_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    frames, height, width = ((2, 8, 4), (3, 4, 8))[size]
    tokens = frames * (height // 2) * (width // 2)
    angles = _angles(tokens, 8)
    return {
        "hidden_states": torch.randn(batch, frames, 4, height, width),
        "encoder_hidden_states": torch.randn(batch, 5, 24),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=24,
    )


def _ltx_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    frames, height, width = ((2, 4, 2), (3, 2, 4))[size]
    return {
        "hidden_states": torch.randn(batch, frames * height * width, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 24),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]]).expand(batch, -1).clone(),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _qwen() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
    )


def _qwen_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    height, width = ((4, 4), (6, 4))[size]
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 4] = False
    return {
        "hidden_states": torch.randn(batch, height * width, 16),
        "encoder_hidden_states": torch.randn(batch, 5, 24),
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, height, width)]] * batch,
    }


def _hunyuan_dit() -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=6,
    )


def _hunyuan_dit_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    sample = _square(batch, size)
    tokens = sample.shape[-2] * sample.shape[-1] // 4
    angles = _angles(tokens, 8)
    mask = torch.ones(batch, 5)
    mask[:, 4] = 0
    return {
        "hidden_states": sample,
        "encoder_hidden_states": torch.randn(batch, 5, 24),
        "text_embedding_mask": mask,
        "encoder_hidden_states_t5": torch.randn(batch, 6, 16),
        "text_embedding_mask_t5": torch.ones(batch, 6),
        "image_meta_size": torch.tensor([[8.0, 8, 8, 8, 0, 0]]).expand(batch, -1).clone(),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _own_dit() -> nn.Module:
    from ditkit.models.dit import DiT

    return DiT(input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=10)


def _own_dit_inputs(batch: int, seed: int, size: int) -> dict[str, Any]:
    return {"hidden_states": _square(batch, size), "class_labels": torch.arange(seed, seed + batch) % 10}


TINY: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny("FluxTransformer2DModel", _flux, _flux_inputs, scale=1.0),
        Tiny("SD3Transformer2DModel", _sd3, _sd3_inputs),
        Tiny("PixArtTransformer2DModel", _pixart, _pixart_inputs),
        Tiny("DiTTransformer2DModel", _dit, _dit_inputs),
        Tiny("WanTransformer3DModel", _wan, _wan_inputs),
        Tiny("HunyuanVideoTransformer3DModel", _hunyuan_video, _hunyuan_video_inputs),
        Tiny("CogVideoXTransformer3DModel", _cogvideox, _cogvideox_inputs, axes="bfchw"),
        Tiny("LTXVideoTransformer3DModel", _ltx, _ltx_inputs),
        Tiny("QwenImageTransformer2DModel", _qwen, _qwen_inputs, scale=1.0),
        Tiny("HunyuanDiT2DModel", _hunyuan_dit, _hunyuan_dit_inputs),
        Tiny("DiT", _own_dit, _own_dit_inputs),
    )
}
