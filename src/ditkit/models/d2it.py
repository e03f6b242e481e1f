"""D2iT: noise in two grains, a rough one for every region and a correction where a picture has detail.

"D^2iT: Dynamic Diffusion Transformer for Accurate Image Generation", arXiv 2504.09454, section 3.2. The
content transformer (`D2iT`) predicts the noise of a latent of `d2it_autoencoder` with DiT blocks on the
coarse grid, then corrects it in fine regions with a few blocks over their cells (RefineNet). The grain
transformer (`GrainTransformer`) draws the map of grains from the class. The authors' code was not
available. Known are the sizes (12, 24, 28 blocks, two of them refining), learned positions and the losses'
idea; inferred is all else: a grain's embedding is added to tokens; RefineNet reads a cell's noisy code
beside its coarse token; the variance is the base's alone; the grain loss counts distinct codes, so that a
coarse region counts once; the grain transformer fills a masked map. A coarse region has one code, hence one
noise (`multi_grained_noise`) and one prediction: the mean of its cells' is taken, so that its cells stay
alike while one samples. 463.4 M (L) and 681.6 M (XL) parameters, the paper 467 and 687: DiT's, as two
blocks are moved and not added, and RefineNet's input, head and positions.

Dimensions: B batch, C latent channels, h x w regions, 2h x 2w cells, D width, K the most fine cells of a
sample.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditkit.models.base import ClassConditionalModel, Recomputing, both_sides, chosen
from ditkit.models.d2it_autoencoder import PAPER, distinct_weights, share_in_regions, to_cells
from ditkit.models.dit import DiTBlock
from ditkit.models.layers import (
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_table,
    unpatchify,
)
from ditkit.processes.gaussian import mean_flat
from ditkit.registry import register


class D2iT(ClassConditionalModel):
    """The content transformer.

    Args:
        input_size: height and width of the latent, or one number for both; other sizes run too.
        in_channels: latent channels C.
        hidden_size: width D.
        depth: blocks on the coarse grid.
        refine_depth: blocks over fine cells; 0 leaves RefineNet out.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        class_dropout_prob: how often training drops a label; above 0 there is a null class for guidance.
        num_classes: classes, the null class not counted; 0 for an unconditional model.
        learn_sigma: whether 2 C channels are predicted, the second half for a learned variance.

    Raises:
        ValueError: for sizes that do not divide.
    """

    _no_split_modules = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["x_embedder", "pos_embed", "t_embedder", "y_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 26,
        refine_depth: int = 2,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.latent_size, self.side_multiple = both_sides(input_size), 2
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbed(2, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.grain_embedder = nn.Embedding(2, hidden_size)
        self.grid = self.x_embedder.grid(*self.latent_size)
        self.pos_embed = nn.Parameter(torch.empty(1, *self.grid, hidden_size))  # learned
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, 2, self.out_channels)
        self.refine_blocks = nn.ModuleList(
            [DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(refine_depth)]
        )
        if refine_depth:
            self.cell_embedder = nn.Linear(in_channels, hidden_size)
            self.cell_pos_embed = nn.Parameter(torch.empty(1, *self.latent_size, hidden_size))
            self.cell_merge = nn.Linear(2 * hidden_size, hidden_size)
            self.refine_layer = FinalLayer(hidden_size, 1, in_channels)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As DiT's: Xavier, with gates, heads and grains at zero; positions start at sines and cosines."""
        zero = ("adaLN_modulation", "final_layer.linear", "refine_layer.linear", "grain_embedder")
        for name, parameter in self.named_parameters():
            if name.endswith("pos_embed"):
                height, width = parameter.shape[1:3]
                parameter.copy_(sincos_table(parameter.shape[-1], height, width).view_as(parameter))
            elif name.endswith("bias") or any(part in name for part in zero):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder.", "y_embedder.")):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
        grain: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The network's prediction.

        Args:
            hidden_states: noised latent, (B, C, 2h, 2w).
            timestep: times, (B,) or a scalar, possibly fractional, 0..999.
            class_labels: integer labels, (B,); the null class is `num_classes`, and None is null for all.
            force_drop_ids: 1 where the label is to be dropped, (B,); None drops at random in training.
            grain: 1 or True where a region is fine, (B, h, w); None: everywhere.
            return_dict: whether to return an object with `.sample`, or a tuple.

        Returns:
            The prediction, (B, C_out, 2h, 2w); the cells of a coarse region have the same.

        Raises:
            ValueError: for inputs of the wrong shape.
        """
        if timestep.ndim == 0:
            timestep = timestep.expand(len(hidden_states))
        self.check(hidden_states, timestep, class_labels)
        grid = self.x_embedder.grid(*hidden_states.shape[2:])
        everywhere = grain is None
        if grain is None:
            grain = torch.ones(len(hidden_states), *grid, dtype=torch.bool, device=hidden_states.device)
        if grain.shape != (len(hidden_states), *grid):
            raise ValueError(
                f"grain has shape {tuple(grain.shape)}; expected one for each region, "
                f"{(len(hidden_states), *grid)}"
            )
        grain = grain.bool()
        labels = self.labels(class_labels, len(hidden_states))
        time = self.t_embedder(timestep, dtype=hidden_states.dtype)
        condition = (time + self.y_embedder(labels, force_drop_ids)).unsqueeze(1)  # (B, 1, D)
        tokens = self.x_embedder(hidden_states) + _positions(self.pos_embed, grid)  # (B, h w, D)
        tokens = tokens + self.grain_embedder(grain.long()).flatten(1, 2)
        for block in self.blocks:
            tokens = self.run(block, tokens, condition)
        rough = unpatchify(self.final_layer(tokens, condition), grid, 2)  # (B, C_out, 2h, 2w)
        sample = share_in_regions(rough, grain)
        if len(self.refine_blocks) and (everywhere or bool(grain.any())):
            where = None if everywhere else grain
            correction = self._refine(hidden_states, tokens.unflatten(1, grid), condition, where)
            sample = torch.cat(
                [sample[:, : self.in_channels] + correction, sample[:, self.in_channels :]], dim=1
            )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _refine(self, latent: Tensor, tokens: Tensor, condition: Tensor, grain: Tensor | None) -> Tensor:
        """The correction (B, C, 2h, 2w) of the noise in fine regions, zero elsewhere.

        Args:
            latent: (B, C, 2h, 2w).
            tokens: the base's output (B, h, w, D).
            condition: (B, 1, D).
            grain: (B, h, w), at least one of it fine; None: all of them.
        """
        size = (latent.shape[2], latent.shape[3])
        cells = self.cell_embedder(latent.movedim(1, -1)).flatten(1, 2)  # (B, 4 h w, D)
        cells = cells + _positions(self.cell_pos_embed, size) + self.grain_embedder.weight[1]
        coarse = to_cells(tokens.movedim(-1, 1)).movedim(1, -1).flatten(1, 2)  # (B, 4 h w, D)
        both = self.cell_merge(torch.cat([cells, coarse], dim=-1))
        if grain is None:
            for block in self.refine_blocks:
                both = self.run(block, both, condition)
            return self.refine_layer(both, condition).transpose(1, 2).unflatten(2, size)
        fine = to_cells(grain).flatten(1)  # (B, 4 h w)
        most = int(fine.sum(1).max())
        picked = (~fine).long().argsort(dim=1, stable=True)[:, :most]  # (B, K), fine cells first
        real = fine.gather(1, picked)  # (B, K)
        hidden = both.gather(1, picked[..., None].expand(-1, -1, both.shape[-1]))
        # A sample without fine cells would attend to nothing; what it computes is dropped.
        mask = None if bool(real.all()) else (real | ~real.any(1, keepdim=True))[:, None, None]
        for block in self.refine_blocks:
            hidden = self.run(block, hidden, condition, None, *(() if mask is None else (mask,)))
        values = self.refine_layer(hidden, condition) * real[..., None]  # (B, K, C)
        blank = values.new_zeros(len(latent), fine.shape[1], self.in_channels)
        index = picked[..., None].expand(-1, -1, self.in_channels)
        return blank.scatter(1, index, values).transpose(1, 2).unflatten(2, size)


def _positions(table: Tensor, size: tuple[int, int]) -> Tensor:
    """A learned table (1, H, W, D) as (1, T, D), interpolated at another size."""
    if tuple(table.shape[1:3]) != size:
        table = F.interpolate(table.movedim(-1, 1), size, mode="bilinear").movedim(1, -1)
    return table.flatten(1, 2)


def dynamic_grain_loss(prediction: Tensor, noise: Tensor, grain: Tensor) -> Tensor:
    """Squared error of the noise over distinct codes, of which a coarse region has one, (B,).

    Args:
        prediction: of the noise, (B, C, 2h, 2w).
        noise: multi-grained, of that shape.
        grain: True where a region is fine, (B, h, w).
    """
    return mean_flat((prediction - noise).square(), distinct_weights(grain))


# --- the map of grains --------------------------------------------------------------------------------

_HIDDEN = 2  # beside coarse (0) and fine (1)


class GrainTransformer(Recomputing, ModelMixin, ConfigMixin):
    """Draws maps of grains from a class, a few regions at a time, each given those that are there.

    Args:
        grid: regions, or one number for both sides.
        hidden_size: width D.
        depth: blocks.
        num_heads: attention heads.
        num_classes: classes, the null class not counted; 0 for an unconditional model.
        class_dropout_prob: how often training drops a label.
    """

    @register_to_config
    def __init__(
        self,
        grid: int | tuple[int, int] = 16,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid = both_sides(grid)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.grain_embedder = nn.Embedding(3, hidden_size)
        self.pos_embed = nn.Parameter(torch.empty(1, *self.grid, hidden_size))
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, 4.0) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, 1, 2)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_table(hidden_size, *self.grid).view_as(self.pos_embed))
            for name, parameter in self.named_parameters():
                if "adaLN_modulation" in name:
                    parameter.zero_()

    def forward(
        self, grain: Tensor, class_labels: Tensor | None = None, force_drop_ids: Tensor | None = None
    ) -> Tensor:
        """Logits (B, h, w, 2) of maps (B, h, w) of coarse (0), fine (1) and hidden (2) regions.

        Labels (B,) are dropped where `force_drop_ids` is 1, by default at random in training.
        """
        if class_labels is None:
            class_labels = torch.full((len(grain),), self.y_embedder.null_label, device=grain.device)
        condition = self.y_embedder(class_labels, force_drop_ids).unsqueeze(1)  # (B, 1, D)
        grid = (grain.shape[1], grain.shape[2])
        tokens = self.grain_embedder(grain.long()).flatten(1, 2) + _positions(self.pos_embed, grid)
        for block in self.blocks:
            tokens = self.run(block, tokens, condition)
        return self.final_layer(tokens, condition).unflatten(1, grid)

    def loss(
        self,
        grain: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats of the hidden regions of maps (B, h, w), (B,).

        Args:
            grain: True where a region is fine.
            class_labels: (B,); None: no class.
            force_drop_ids: 1 where the label is dropped, (B,); None: at random in training.
            hidden: True where the map is to be guessed, (B, h, w); None: a random share of each.
        """
        if hidden is None:
            share = torch.rand(len(grain), 1, 1, device=grain.device)
            hidden = torch.rand(grain.shape, device=grain.device) < share
        logits = self(torch.where(hidden, _HIDDEN, grain.long()), class_labels, force_drop_ids)
        each = F.cross_entropy(logits.movedim(-1, 1), grain.long(), reduction="none") * hidden
        return each.flatten(1).sum(1) / hidden.flatten(1).sum(1).clamp(min=1)

    @torch.no_grad()
    def sample(
        self,
        class_labels: Tensor | None = None,
        batch: int | None = None,
        num_steps: int = 16,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Maps (B, h, w), True where a region is fine, drawn and not the likeliest.

        Args:
            class_labels: (B,); None draws without a class.
            batch: B, where there are no labels.
            num_steps: in how many rounds regions are filled, in random order; the more, the more exact.
            generator: for maps that are the same again.

        Raises:
            ValueError: neither labels nor a batch.
        """
        count = batch if class_labels is None else len(class_labels)
        if count is None or num_steps < 1:
            raise ValueError(
                f"batch={batch}, num_steps={num_steps}: give labels or a batch, and a step at least"
            )
        height, width = self.grid
        regions = height * width
        grain = torch.full((count, regions), _HIDDEN, device=self.device)
        device = "cpu" if generator is None else generator.device
        order = torch.rand(count, regions, generator=generator, device=device).argsort(dim=1).to(self.device)
        bounds = [round(regions * (1 - math.cos(math.pi / 2 * k / num_steps))) for k in range(num_steps + 1)]
        for start, stop in pairwise(bounds):  # few at first, when little is known
            if start == stop:
                continue
            logits = self(grain.unflatten(1, self.grid), class_labels).flatten(1, 2)
            fine = logits.float().softmax(-1)[..., 1]
            chance = torch.rand(fine.shape, generator=generator, device=device).to(fine.device)
            drawn = (chance < fine).long()
            places = order[:, start:stop]
            grain = grain.scatter(1, places, drawn.gather(1, places))
        return grain.unflatten(1, self.grid).bool()


VARIANTS: dict[str, dict[str, Any]] = {
    "b": {"hidden_size": 768, "depth": 10, "refine_depth": 2, "num_heads": 12},
    "l": {"hidden_size": 1024, "depth": 22, "refine_depth": 2, "num_heads": 16},
    "xl": {"hidden_size": 1152, "depth": 26, "refine_depth": 2, "num_heads": 16},
}


@register(
    "model",
    "d2it",
    summary="rough noise for all regions, a correction where there is detail; d2it-{b,l,xl}",
    paper=PAPER,
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def d2it(variant: str | None = None, **config: Any) -> D2iT:
    """A fresh D2iT of a named variant ("xl"; None: the defaults), with changes to its config."""
    return D2iT(**{**chosen(VARIANTS, variant), **config})


@register(
    "model",
    "d2it-grain",
    summary="draws D2iT's map of fine and coarse regions from a class",
    paper=PAPER,
    seam=("architecture",),
)
def d2it_grain(variant: str | None = None, **config: Any) -> GrainTransformer:
    """A fresh grain transformer; it has no named sizes."""
    if variant is not None:
        raise ValueError(f"no variant {variant!r}: d2it-grain has one size; change it by its configuration")
    return GrainTransformer(**config)
