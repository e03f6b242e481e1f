"""LiT for text: a PixArt transformer with linear self-attention of few heads, started from a trained PixArt.

The text-to-image student of "LiT: Delving into a Simplified Linear Diffusion Transformer for Image
Generation", arXiv 2501.12976; `lit` holds the attention, the class-conditional student and the distillation
(weights 1.0 for the noise and 0.05 for the variance here). Every self-attention of diffusers' class becomes
LiT's, in float32 as the authors'; the attention to the text and all else stay, names of weights too, so a
`PixArtSigmaPipeline` takes it as its transformer. The convolution reads the picture's own grid, of any sides.
The paper lets all self-attentions start afresh, the released code keeps their output projection: `attention`
of `inherit`. Inferred: 4 heads at width 1152, as the class-conditional XL.

Dimensions: B batch, T = R S tokens of a grid, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import (
    ModelMixin,  # noqa: F401  (a saved pipeline looks for it beside the model's class)
    PixArtTransformer2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from ditkit.models.base import chosen
from ditkit.models.layouts import LAYOUTS, Layout
from ditkit.models.lit import LinearAttention, fill, heads_for, take_over
from ditkit.registry import Paper, register

GRID = "grid"
"""The key of `cross_attention_kwargs` by which blocks learn their grid: PixArt hands those on to all."""


class LiTPixArtBlock(BasicTransformerBlock):
    """A PixArt block whose self-attention is linear."""

    def __init__(self, dim: int, attention: LinearAttention, **options: Any) -> None:
        super().__init__(dim, **options)
        self.attn1 = attention

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: None = None,
    ) -> Tensor:
        """Tokens (B, T, D), text (B, L, D), its bias (B, 1, L), times (B, 6 D) and the grid -> (B, T, D)."""
        assert timestep is not None
        options = dict(cross_attention_kwargs or {})
        grid = options.pop(GRID)
        modulation = self.scale_shift_table[None] + timestep.unflatten(1, (6, -1))  # (B, 6, D)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # (B, 1, D) each
        normed = self.norm1(hidden_states) * (1 + scale) + shift
        hidden_states = hidden_states + gate * self.attn1(normed, grid)
        if self.attn2 is not None:
            hidden_states = hidden_states + self.attn2(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **options,
            )
        norm: Any = self.norm2
        normed = norm(hidden_states) * (1 + scale_mlp) + shift_mlp
        return hidden_states + gate_mlp * self.ff(normed)


class LiTPixArtTransformer2DModel(PixArtTransformer2DModel):
    """The network: diffusers' PixArt transformer with linear self-attention.

    Args:
        linear_heads: few, of the self-attention; `num_attention_heads` are those of the attention to text.
        upcast_linear: attend to the picture in float32.
        (others): see `PixArtTransformer2DModel`; `attention_bias` is of the linear q, k and v too.

    Raises:
        ValueError: a width that can't be split over the linear heads.
    """

    _no_split_modules = ["LiTPixArtBlock", "PatchEmbed"]
    _repeated_blocks = ["LiTPixArtBlock"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
        linear_heads: int = 4,
        upcast_linear: bool = True,
    ) -> None:
        super().__init__(
            num_attention_heads,
            attention_head_dim,
            in_channels,
            out_channels,
            0,
            dropout,
            norm_num_groups,
            cross_attention_dim,
            attention_bias,
            sample_size,
            patch_size,
            activation_fn,
            num_embeds_ada_norm,
            upcast_attention,
            norm_type,
            norm_elementwise_affine,
            norm_eps,
            interpolation_scale,
            use_additional_conditions,
            caption_channels,
            attention_type,
        )
        self.register_to_config(num_layers=num_layers)
        width = self.inner_dim
        options = {
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "dropout": dropout,
            "cross_attention_dim": cross_attention_dim,
            "activation_fn": activation_fn,
            "attention_bias": attention_bias,
            "upcast_attention": upcast_attention,
            "norm_type": norm_type,
            "norm_elementwise_affine": norm_elementwise_affine,
            "norm_eps": norm_eps,
        }
        self.transformer_blocks = nn.ModuleList(
            [
                LiTPixArtBlock(
                    width, LinearAttention(width, linear_heads, attention_bias, upcast_linear), **options
                )
                for _ in range(num_layers)
            ]
        )
        for block in self.transformer_blocks:
            attention: Any = block.attn1
            for layer in (attention.q, attention.kv, attention.proj):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def example_inputs(self) -> dict[str, Any]:
        """Arguments of a forward of one sample at the size the model was built for, with PixArt-Sigma's 300
        text tokens, all zero, on the current device."""
        config = self.config
        side, text = config["sample_size"], config["caption_channels"] or config["cross_attention_dim"]
        return {
            "hidden_states": torch.zeros(1, config["in_channels"], side, side),
            "encoder_hidden_states": torch.zeros(1, 300, text),
            "timestep": torch.zeros(1, dtype=torch.long),
        }

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `PixArtTransformer2DModel.forward`, without a mask among the picture's tokens.

        Args:
            hidden_states: (B, C, H, W) of any sides that patches divide.
            encoder_hidden_states: captions, (B, L, caption_channels).
            timestep: (B,).

        Raises:
            ValueError: an `attention_mask`, which linear attention has no weights for.
        """
        if attention_mask is not None:
            raise ValueError("attention_mask: linear attention has no weights to mask; leave it out")
        patch = self.config["patch_size"]
        grid = (hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch)
        forward: Any = super().forward  # diffusers wants a LongTensor, its schedulers give others
        return forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs=added_cond_kwargs,
            cross_attention_kwargs={**(cross_attention_kwargs or {}), GRID: grid},
            encoder_attention_mask=encoder_attention_mask,
            return_dict=return_dict,
        )


@torch.no_grad()
def inherit(
    teacher: PixArtTransformer2DModel, attention: Iterable[str] = (), **config: Any
) -> LiTPixArtTransformer2DModel:
    """A linear PixArt that starts from a trained one: all its weights but those of the self-attention.

    Args:
        teacher: best fully converged.
        attention: which of "q", "k", "v", "proj" to take over as well; ("proj",) is the released code's way.
        **config: changes, e.g. `linear_heads`; by default the paper's heads.

    Raises:
        TypeError: a teacher that is no PixArt.
        ValueError: a part of the attention that does not exist, or a change of the inherited sizes.
    """
    if not isinstance(teacher, PixArtTransformer2DModel) or hasattr(teacher.config, "linear_heads"):
        raise TypeError(f"a linear PixArt inherits from a PixArt; got a {type(teacher).__name__}")
    settings = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    settings["linear_heads"] = heads_for(teacher.inner_dim)
    student = LiTPixArtTransformer2DModel(**{**settings, **config})
    fill(student, teacher, ".attn1.", config)
    parts = tuple(attention)
    old: Any
    new: Any
    for old, new in zip(teacher.transformer_blocks, student.transformer_blocks, strict=True):
        layers = {"q": old.attn1.to_q, "k": old.attn1.to_k, "v": old.attn1.to_v, "proj": old.attn1.to_out[0]}
        take_over(new.attn1, parts, {name: layer.state_dict() for name, layer in layers.items()})
    return student


# --- in the registry ----------------------------------------------------------------------------------

_SIGMA = {"caption_channels": 4096, "use_additional_conditions": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "xl/2": {**_SIGMA, "sample_size": 128},
    "xl/2-512": {**_SIGMA, "sample_size": 64},
}
"""PixArt-Sigma's sizes, for 1,024 and 512 pixels."""


@register(
    "model",
    "lit-pixart",
    summary="PixArt with LiT's linear self-attention, from text; lit-pixart-xl/2, lit-pixart-xl/2-512",
    paper=Paper(
        "LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation", "2501.12976", 2025
    ),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def lit_pixart(variant: str | None = None, **config: Any) -> LiTPixArtTransformer2DModel:
    """A fresh linear PixArt of a named variant ("xl/2"; None: the defaults), with changes to its config."""
    return LiTPixArtTransformer2DModel(**{**chosen(VARIANTS, variant), **config})


LAYOUTS["lit-pixart"] = Layout(variants=VARIANTS, inherits={"pixart": inherit})
