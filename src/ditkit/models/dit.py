"""DiT: a transformer over latent patches, conditioned by adaptive layer norm; and SiT, the same network.

DiT: Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748, section 3: patch
tokens, N adaLN-Zero blocks, a linear head that predicts the noise and a variance. SiT: Ma et al., arXiv
2401.08740, keeps the network and changes the process (`ditkit.processes`): time is in [0, 1] and the
variance channels are dropped. Parameter names are those of both releases, so their state dicts load as they
are. Beyond them: rectangular latents, sizes other than the configured one, and guidance on all channels.

Dimensions: see `layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401  (a saved pipeline looks for it beside the model's class)
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditkit.models.base import ClassConditionalModel, ProcessName, both_sides, chosen
from ditkit.models.layers import (
    Attention,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    RoutableBlock,
    TimestepEmbedder,
    modulate,
    sincos_table,
    unpatchify,
)
from ditkit.models.layouts import LAYOUTS, Layout, State, dit_needs, infer_dit
from ditkit.models.routing import ChannelRouting
from ditkit.registry import Paper, register


class DiTBlock(RoutableBlock):
    """Attention and MLP, each shifted, scaled and gated by the conditioning (adaLN-Zero).

    The outputs of `attn` and `mlp` are taken before the gates: that is where feature caches hook.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = self.make_norm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = self.make_norm(width)
        self.mlp = self.make_mlp(width, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def make_norm(self, width: int) -> nn.Module:
        return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def make_mlp(self, width: int, mlp_ratio: float) -> nn.Module:
        return Mlp(width, int(width * mlp_ratio))

    def transform(self, hidden_states: Tensor, conditioning: Tensor, *more: Any) -> Tensor:
        """Tokens (B, T, D) and conditioning (B, T or 1, D) to tokens (B, T, D); `more` goes to `attn`."""
        modulation = self.adaLN_modulation(conditioning).chunk(6, dim=-1)  # 6 x (B, T or 1, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        attended = self.attn(modulate(self.norm1(hidden_states), shift_attn, scale_attn), *more)
        hidden_states = hidden_states + gate_attn * attended
        transformed = self.mlp(modulate(self.norm2(hidden_states), shift_mlp, scale_mlp))
        return hidden_states + gate_mlp * transformed


class DiT(ClassConditionalModel):
    """Class-conditional diffusion transformer.

    Args:
        input_size: height and width of the latent, or one number for both; other sizes run too.
        patch_size: side of a patch; every input side must be a multiple of it.
        in_channels: latent channels C.
        hidden_size: width D, a multiple of 4 and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        class_dropout_prob: how often training drops a label; above 0 there is a null class for guidance.
        num_classes: classes, the null class not counted.
        learn_sigma: whether the network predicts 2 C channels, the second half for a learned variance.
        routing: options of `routing.ChannelRouting`: blocks see channels chosen by the timestep; None: all.

    Raises:
        ValueError: for sizes that do not divide.
    """

    unit_time = False  # times are 0..999, not 0 (noise) to 1 (data)
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["x_embedder", "pos_embed", "t_embedder", "y_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        routing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.latent_size = both_sides(input_size)
        self.side_multiple = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.grid = self.x_embedder.grid(*self.latent_size)
        rows, columns = self.grid
        # A parameter, though fixed: the authors save it and count it.
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            [self.make_block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)]
        )
        self.channel_routing = (
            None if routing is None else ChannelRouting(hidden_size, unit_time=self.unit_time, **routing)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def make_block(self, width: int, num_heads: int, mlp_ratio: float) -> nn.Module:
        return DiTBlock(width, num_heads, mlp_ratio)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The authors' start: Xavier, with every gate and the head at zero, so each block is the identity."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder.", "y_embedder.")):
                nn.init.normal_(parameter, std=0.02)
            elif name != "pos_embed":
                nn.init.xavier_uniform_(parameter.flatten(1))  # a view: patches as one linear map
        self.pos_embed.copy_(sincos_table(self.config["hidden_size"], *self.grid))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table of a grid of tokens, (1, R S, D): the loaded one for the configured grid."""
        if grid == self.grid:
            return self.pos_embed
        return sincos_table(self.pos_embed.shape[-1], *grid).to(self.pos_embed.device, self.pos_embed.dtype)

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Latent (B, C, H, W), times (B,) and labels (B,) to tokens (B, T, D) and conditioning (B, 1, D)."""
        self.check(hidden_states, timestep, class_labels)
        class_labels = self.labels(class_labels, len(hidden_states))
        grid = self.x_embedder.grid(*hidden_states.shape[-2:])
        tokens = self.x_embedder(hidden_states) + self.positions(grid)  # (B, T, D)
        time = self.t_embedder(timestep, dtype=tokens.dtype)  # (B, D)
        conditioning = time + self.y_embedder(class_labels, force_drop_ids)  # (B, D)
        return tokens, conditioning.unsqueeze(1)

    def run_blocks(
        self,
        tokens: Tensor,
        conditioning: Tensor,
        start: int = 0,
        stop: int | None = None,
        timestep: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Blocks `start` to `stop` (not included; None is the end) over tokens (B, T, D).

        Raises:
            ValueError: no `timestep` (B,) for a model whose blocks need it (routing), or no `grid` (R, S)
                where they need it and it is not the configured one.
        """
        gates = self.gates(tokens, timestep, grid)
        for block in self.blocks[start:stop]:
            tokens = self.run(block, tokens, conditioning, *gates)
        return tokens

    def gates(self, tokens: Tensor, timestep: Tensor | None, grid: tuple[int, int] | None) -> tuple[Any, ...]:
        """What the blocks get beyond tokens and conditioning: the mask (B, 1, D) of a routed model."""
        if self.channel_routing is None:
            return ()
        if timestep is None:
            raise ValueError("this model is routed by the timestep: give run_blocks its timestep=(B,)")
        mask = self.channel_routing(timestep, dtype=tokens.dtype)
        return () if mask is None else (mask,)

    def head(self, tokens: Tensor, conditioning: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, R S, D) of a grid (R, S) to the prediction (B, C_out, H, W)."""
        tokens = self.final_layer(tokens, conditioning)  # (B, T, P P C_out)
        return unpatchify(tokens, grid, self.x_embedder.patch_size)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The network's prediction.

        Args:
            hidden_states: noised latent, (B, C, H, W).
            timestep: times, (B,) or a scalar, possibly fractional: 0..999 for DiT, 0..1 for SiT.
            class_labels: integer labels, (B,); the null class is `num_classes`, and None is null for all.
            force_drop_ids: 1 where the label is to be dropped, (B,); None drops at random in training.
            return_dict: whether to return an object with `.sample`, or a tuple.

        Returns:
            The prediction, (B, C_out, H, W): C_out = 2 C with a learned variance (DiT), else C.

        Raises:
            ValueError: for inputs of the wrong shape, or None as labels on a model without null class.
        """
        if timestep.ndim == 0:
            timestep = timestep.expand(hidden_states.shape[0])
        tokens, conditioning = self.embed(hidden_states, timestep, class_labels, force_drop_ids)
        grid = self.x_embedder.grid(*hidden_states.shape[-2:])
        tokens = self.run_blocks(tokens, conditioning, timestep=timestep, grid=grid)
        sample = self.head(tokens, conditioning, grid)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class SiT(DiT):
    """The same network for interpolants: times in [0, 1], variance channels computed but dropped."""

    unit_time = True

    @property
    def predicted_channels(self) -> int:
        """Channels of what `forward` returns."""
        return self.in_channels

    def unfit_for(self, process: ProcessName) -> str | None:
        """Gaussian diffusion: its times run from 0 to 1, and its variance channels are dropped."""
        if process == "gaussian":
            return "its times run from 0 to 1 and it predicts a velocity; a DiT is the same network for it"
        return super().unfit_for(process)

    def head(self, tokens: Tensor, conditioning: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, R S, D) to the prediction (B, C, H, W)."""
        return super().head(tokens, conditioning, grid)[:, : self.in_channels]


SIZES: dict[str, dict[str, int]] = {
    "s": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "b": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "l": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "xl": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
VARIANTS: dict[str, dict[str, int]] = {
    f"{size}/{patch}": {**dimensions, "patch_size": patch}
    for size, dimensions in SIZES.items()
    for patch in (2, 4, 8)
}


def infer(state: State, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes of a checkpoint tell."""
    return infer_dit(state, options, {size["hidden_size"]: size["num_heads"] for size in SIZES.values()})


@register(
    "model",
    "dit",
    summary="class-conditional diffusion transformer with adaLN-Zero blocks; dit-{s,b,l,xl}/{2,4,8}",
    paper=Paper("Scalable Diffusion Models with Transformers", "2212.09748", 2022),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def dit(variant: str | None = None, **config: Any) -> DiT:
    """A fresh DiT of a named variant ("xl/2"; None: the defaults), with changes to its config."""
    return DiT(**{**chosen(VARIANTS, variant), **config})


@register(
    "model",
    "sit",
    summary="the DiT network for interpolants (flow matching); sit-{s,b,l,xl}/{2,4,8}",
    paper=Paper(
        "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers",
        "2401.08740",
        2024,
    ),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def sit(variant: str | None = None, **config: Any) -> SiT:
    """A fresh SiT of a named variant ("xl/2"; None: the defaults), with changes to its config."""
    return SiT(**{**chosen(VARIANTS, variant), **config})


LAYOUTS["dit"] = LAYOUTS["sit"] = Layout(infer=infer, needs=dit_needs, variants=VARIANTS)
