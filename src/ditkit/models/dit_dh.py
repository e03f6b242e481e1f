"""DiT-DH: a transformer with a shallow, wide head, for latents of many channels, a vision model's tokens.

"Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690. A flow on latents of n channels
is learned only by blocks at least n wide. The backbone may be narrow: it reads the noisy latent, and its
tokens s condition, each for itself, the adaptive norms of a few wide blocks (the DDT head) that read the
latent again and predict the velocity. Blocks have RMSNorm, gated perceptrons and rotary positions. The
authors' clock is 1 for noise and 0 for data, and their velocity points to the noise; `forward` has the time
of all flows here, 0 for noise, and turns both. Of theirs, patches larger than 1 and blocks without rotary
positions fail; here they work.

Dimensions: see `layers`; D1 and D2 are the widths of backbone and head, P the patch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin  # noqa: F401  (a saved pipeline looks for it beside the model's class)
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditkit.models.base import ClassConditionalModel, ProcessName, both_sides, chosen
from ditkit.models.building import SETTINGS, DataShape
from ditkit.models.dit import SIZES, DiTBlock
from ditkit.models.guidance import GuidedChannels
from ditkit.models.layers import (
    FinalLayer,
    GatedMlp,
    LabelEmbedder,
    PatchEmbed,
    Rotary,
    axial_rotary,
    sincos_table,
    unpatchify,
)
from ditkit.models.layouts import LAYOUTS, Layout, Settings, State, count, label_rows, shapes_of
from ditkit.registry import Paper, register

HEAD_WIDTH, HEAD_DEPTH, HEAD_HEADS = 2048, 2, 16


class FourierEmbedder(nn.Module):
    """Sines and cosines of the time at random, frozen frequencies, then a perceptron: (B,) -> (B, D)."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        # A parameter, though fixed: the authors save it and count it.
        self.W = nn.Parameter(torch.randn(frequencies), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        angles = 2 * math.pi * timestep.float()[:, None] * self.W.float()  # (B, 256)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype))


class DiTDHBlock(DiTBlock):
    """DiT's block with RMSNorm, a gated perceptron of two thirds of its width, and rotary positions."""

    def make_norm(self, width: int) -> nn.Module:
        return nn.RMSNorm(width, eps=1e-6)

    def make_mlp(self, width: int, mlp_ratio: float) -> nn.Module:
        return GatedMlp(width, gated_width(width, mlp_ratio))


def gated_width(width: int, mlp_ratio: float) -> int:
    """Hidden width of a gated perceptron with as many parameters as a plain one of that ratio."""
    return int(2 / 3 * int(width * mlp_ratio))


class DiTDH(ClassConditionalModel):
    """Class-conditional transformer with a wide head; a flow's velocity is what it predicts.

    Args:
        input_size: height and width of the latent, or one number for both; other sizes run too.
        patch_size: side of a patch; every input side must be a multiple of it.
        in_channels: latent channels C.
        hidden_size: widths of backbone and head, (D1, D2), multiples of four times their heads.
        depth: blocks of backbone and head.
        num_heads: attention heads of both.
        mlp_ratio: hidden width over D of the plain perceptron that the gated one replaces.
        class_dropout_prob: how often training drops a label; above 0 there is a null class for guidance.
        num_classes: classes, the null class not counted.
        rope: whether queries and keys are turned by their positions.
        position_table: whether a fixed table is added to the backbone's tokens.

    Raises:
        ValueError: for sizes that do not divide, or a model that knows no positions at all.
    """

    authors_guidance: ClassVar[GuidedChannels] = "all"
    _no_split_modules = ["DiTDHBlock"]
    _skip_layerwise_casting_patterns = ["embedder", "pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        in_channels: int = 768,
        hidden_size: tuple[int, int] = (1152, HEAD_WIDTH),
        depth: tuple[int, int] = (28, HEAD_DEPTH),
        num_heads: tuple[int, int] = (16, HEAD_HEADS),
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        rope: bool = True,
        position_table: bool = True,
    ) -> None:
        super().__init__()
        if not rope and not position_table:
            raise ValueError("rope=False and position_table=False: tokens would not know where they are")
        self.latent_size, self.side_multiple = both_sides(input_size), patch_size
        self.in_channels = self.out_channels = in_channels
        self.gradient_checkpointing = False
        self.backbone_depth = depth[0]
        (narrow, wide), (heads, head_heads) = hidden_size, num_heads
        self.head_widths = (narrow // heads, wide // head_heads) if rope else None
        for width in self.head_widths or ():
            axial_rotary(width, 1, 1)  # refused here rather than in the first forward
        self.s_embedder = PatchEmbed(patch_size, in_channels, narrow)
        self.x_embedder = PatchEmbed(patch_size, in_channels, wide)
        self.t_embedder = FourierEmbedder(narrow)
        self.y_embedder = LabelEmbedder(num_classes, narrow, class_dropout_prob)
        self.s_projector = nn.Identity() if narrow == wide else nn.Linear(narrow, wide)
        self.grid = self.s_embedder.grid(*self.latent_size)
        rows, columns = self.grid
        # A parameter, though fixed: the authors save it and count it.
        self.pos_embed = (
            nn.Parameter(torch.empty(1, rows * columns, narrow), requires_grad=False)
            if position_table
            else None
        )
        self.blocks = nn.ModuleList(
            [DiTDHBlock(narrow, heads, mlp_ratio) for _ in range(depth[0])]
            + [DiTDHBlock(wide, head_heads, mlp_ratio) for _ in range(depth[1])]
        )
        self.final_layer = FinalLayer(wide, patch_size, in_channels, nn.RMSNorm(wide, eps=1e-6))
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The authors' start: gates and the last layer at zero, Xavier for patches, torch's own elsewhere."""
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
            elif name.startswith(("x_embedder.", "s_embedder.")):
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.xavier_uniform_(parameter.flatten(1))  # a view: patches as one linear map
            elif name.startswith("y_embedder.") or (name.startswith("t_embedder.mlp") and "weight" in name):
                nn.init.normal_(parameter, std=0.02)
        if self.pos_embed is not None:
            self.pos_embed.copy_(sincos_table(self.pos_embed.shape[-1], *self.grid))

    def unfit_for(self, process: ProcessName) -> str | None:
        """Gaussian diffusion: it predicts a velocity at times from 0 to 1."""
        if process == "gaussian":
            return "its times run from 0 to 1 and it predicts a velocity; set process: flow"
        return super().unfit_for(process)

    def positions(self, grid: tuple[int, int]) -> Tensor | float:
        """The position table of a grid of tokens, (1, R S, D1): the loaded one for the configured grid."""
        if self.pos_embed is None:
            return 0.0
        if grid == self.grid:
            return self.pos_embed
        return sincos_table(self.pos_embed.shape[-1], *grid).to(self.pos_embed.device, self.pos_embed.dtype)

    def rotaries(self, grid: tuple[int, int]) -> tuple[Rotary | None, Rotary | None]:
        """Rotary positions of backbone and head for a grid (R, S)."""
        if self.head_widths is None:
            return None, None
        narrow, wide = self.head_widths
        return axial_rotary(narrow, *grid), axial_rotary(wide, *grid)

    def backbone(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
    ) -> Tensor:
        """The backbone's tokens s (B, T, D1), which condition the head.

        They change slowly over time, so that a forward may be given those of an earlier one
        (`backbone_tokens`). Arguments are `forward`'s.
        """
        time = self._time(hidden_states, timestep)  # (B, D1)
        labels = self.labels(class_labels, len(hidden_states))
        conditioning = nn.functional.silu(time + self.y_embedder(labels, force_drop_ids)).unsqueeze(1)
        grid = self.s_embedder.grid(*hidden_states.shape[-2:])
        tokens = self.s_embedder(hidden_states) + self.positions(grid)  # (B, T, D1)
        rotary = self.rotaries(grid)[0]
        for block in self.blocks[: self.backbone_depth]:
            tokens = self.run(block, tokens, conditioning, None, None, rotary)
        return nn.functional.silu(time.unsqueeze(1) + tokens)

    def _time(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """The time's embedding (B, D1), by the authors' clock."""
        return self.t_embedder(1 - timestep.float(), dtype=hidden_states.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
        backbone_tokens: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The network's prediction.

        Args:
            hidden_states: noised latent, (B, C, H, W).
            timestep: times, (B,) or a scalar, from 0 (noise) to 1 (data).
            class_labels: integer labels, (B,); the null class is `num_classes`, and None is null for all.
            force_drop_ids: 1 where the label is to be dropped, (B,); None drops at random in training.
            backbone_tokens: s (B, T, D1) of `backbone`, at another time perhaps; the backbone does not run
                then, and time and labels are not read. None: it runs.
            return_dict: whether to return an object with `.sample`, or a tuple.

        Returns:
            The velocity from noise to data, (B, C, H, W).

        Raises:
            ValueError: for inputs of the wrong shape, or None as labels on a model without null class.
        """
        if timestep.ndim == 0:
            timestep = timestep.expand(len(hidden_states))
        self.check(hidden_states, timestep, class_labels)
        grid = self.x_embedder.grid(*hidden_states.shape[-2:])
        if backbone_tokens is None:
            backbone_tokens = self.backbone(hidden_states, timestep, class_labels, force_drop_ids)
        elif backbone_tokens.shape[:2] != (len(hidden_states), grid[0] * grid[1]):
            raise ValueError(
                f"backbone_tokens has shape {tuple(backbone_tokens.shape)}; expected "
                f"({len(hidden_states)}, {grid[0] * grid[1]}, {self.config['hidden_size'][0]})"
            )
        conditioning = self.s_projector(backbone_tokens)  # (B, T, D2): every token has its own
        tokens = self.x_embedder(hidden_states)  # (B, T, D2)
        rotary = self.rotaries(grid)[1]
        for block in self.blocks[self.backbone_depth :]:
            tokens = self.run(block, tokens, conditioning, None, None, rotary)
        tokens = self.final_layer(tokens, conditioning)  # (B, T, P P C)
        sample = -unpatchify(tokens, grid, self.x_embedder.patch_size)  # to the data, not to the noise
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


VARIANTS: dict[str, dict[str, Any]] = {
    name: {
        "hidden_size": (size["hidden_size"], HEAD_WIDTH),
        "depth": (size["depth"], HEAD_DEPTH),
        "num_heads": (size["num_heads"], HEAD_HEADS),
    }
    for name, size in SIZES.items()
}


@register(
    "model",
    "dit-dh",
    summary="transformer with a shallow, wide head, for latents of many channels; dit-dh-{s,b,l,xl}",
    paper=Paper("Diffusion Transformers with Representation Autoencoders", "2510.11690", 2025),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def dit_dh(variant: str | None = None, **config: Any) -> DiTDH:
    """A fresh DiT-DH of a named variant ("xl"; None: the defaults), with changes to its config."""
    return DiTDH(**{**chosen(VARIANTS, variant), **config})


def _for_data(shape: DataShape, variant: str | None) -> dict[str, Any]:
    return {"input_size": shape.size, "in_channels": shape.channels, "num_classes": shape.classes}


SETTINGS["dit-dh"] = _for_data


# --- the authors' checkpoints -------------------------------------------------------------------------

_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()} | {HEAD_WIDTH: HEAD_HEADS}


def _infer(state: State, options: Mapping[str, Any]) -> Settings:
    shapes = shapes_of(state)
    narrow, wide = (shapes.get(f"{name}_embedder.proj.weight", ()) for name in ("s", "x"))
    if len(narrow) != 4 or len(wide) != 4 or not all(narrow):
        return {}
    settings: Settings = {
        "hidden_size": (narrow[0], wide[0]),
        "in_channels": narrow[1],
        "patch_size": narrow[2],
        "position_table": "pos_embed" in shapes,
    }
    tokens = shapes.get("pos_embed", ())
    if len(tokens) == 3 and math.isqrt(tokens[1]) ** 2 == tokens[1]:
        settings["input_size"] = math.isqrt(tokens[1]) * narrow[2]
    widths = [shapes.get(f"blocks.{n}.norm1.weight", (0,))[0] for n in range(count(state, "blocks"))]
    head = HEAD_DEPTH if narrow[0] == wide[0] else widths.count(wide[0])
    settings["depth"] = (len(widths) - head, head)
    hidden = shapes.get("blocks.0.mlp.w3.weight", (0, 0))[1]
    if hidden and hidden != gated_width(narrow[0], 4.0):
        settings["mlp_ratio"] = 1.5 * (hidden + 0.5) / narrow[0]
    settings |= label_rows(shapes.get("y_embedder.embedding_table.weight", (0,))[0], options)
    tables = (shapes.get(f"{name}_feat_rope.freqs_cos", ()) for name in ("enc", "dec"))
    heads = tuple(
        width // table[-1] if table else _HEADS.get(width)
        for width, table in zip(settings["hidden_size"], tables, strict=True)
    )
    return settings | ({} if None in heads else {"num_heads": heads})


def _needs(settings: Settings) -> Iterable[tuple[str, str]]:
    yield "hidden_size", "there are no s_embedder.proj.weight and x_embedder.proj.weight of four dimensions"
    yield "num_classes", "there is no y_embedder.embedding_table.weight"
    yield (
        "input_size",
        "the position table pos_embed is missing or not square: give config={'input_size': (H, W)}",
    )
    yield (
        "num_heads",
        f"there are no rotary tables and widths of {settings.get('hidden_size')} are no named size's: "
        "give config={'num_heads': (N1, N2)}",
    )


def _rename(state: State) -> dict[str, Tensor]:
    """Rotary tables are computed."""
    return {name: value for name, value in state.items() if "_feat_rope." not in name}


LAYOUTS["dit-dh"] = Layout(infer=_infer, needs=_needs, variants=VARIANTS, rename=_rename)
