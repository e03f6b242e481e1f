"""D2iT's first stage: an autoencoder with fine codes where a picture has detail, coarse ones elsewhere.

"D^2iT: Dynamic Diffusion Transformer for Accurate Image Generation", arXiv 2504.09454, section 3.1 (DVAE).
Regions whose grey levels have an entropy above a threshold keep one code for each fine cell (f = 8); the
others share one (f = 16), copied to their four cells, so that the latent stays a regular grid. The authors'
code was not available: entropy, encoder and routing are those of the same group's predecessor (DQ-VAE),
under its parameter names, checked against its numbers. Inferred, and options here: 32 grey bins on [-1, 1]
(`bins`; the paper's review says as many as a region has pixels), a Gaussian latent of 4 channels under a KL
weight of 1e-6, half of the regions fine. The predecessor's thresholds were computed with other bins than
its model uses: `fit_threshold` takes the model's own. The perceptual and adversarial terms of the loss need
networks of others and are not here.

Dimensions: B batch, H x W picture, S side of a region, h x w grid of regions, z latent channels; the fine
grid is 2 h x 2 w.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from torch import Tensor, nn

from ditkit.registry import Paper, register

PAPER = Paper("D^2iT: Dynamic Diffusion Transformer for Accurate Image Generation", "2504.09454", 2025)


# --- grains -------------------------------------------------------------------------------------------


def region_entropy(images: Tensor, side: int = 16, bins: int = 32, sigma: float = 0.01) -> Tensor:
    """Entropy in nats of the grey levels of each region, (B, 3, H, W) in [-1, 1] to (B, H/S, W/S).

    Args:
        images: pictures.
        side: S.
        bins: levels, evenly from -1 to 1, at which the density of the greys is estimated.
        sigma: width of the Gaussian kernel.

    Raises:
        ValueError: sides that are no multiples of S.
    """
    if any(size % side for size in images.shape[2:]):
        raise ValueError(f"pictures of {tuple(images.shape[2:])} can't be cut into regions of side {side}")
    red, green, blue = images.unbind(1)
    grey = 0.2989 * red + 0.5870 * green + 0.1140 * blue  # (B, H, W)
    patches = grey.unfold(1, side, side).unfold(2, side, side).flatten(3)  # (B, h, w, S S)
    levels = torch.linspace(-1, 1, bins, device=images.device, dtype=images.dtype)
    density = torch.stack(
        [torch.exp(-0.5 * ((patches - level) / sigma) ** 2).mean(-1) for level in levels], dim=-1
    )  # (B, h, w, bins)
    density = density / (density.sum(-1, keepdim=True) + 1e-40) + 1e-40
    return -(density * density.log()).sum(-1)


def fit_threshold(entropies: Tensor | Iterable[Tensor], fine_ratio: float) -> float:
    """The entropy that the given share of regions exceeds.

    Args:
        entropies: of the training pictures' regions, of any shape.
        fine_ratio: r, in (0, 1).

    Raises:
        ValueError: a ratio out of range.
    """
    if not 0 < fine_ratio < 1:
        raise ValueError(f"fine_ratio={fine_ratio} is not between 0 and 1")
    parts = [entropies] if isinstance(entropies, Tensor) else list(entropies)
    ordered = torch.cat([part.flatten() for part in parts]).sort().values
    return float(ordered[min(int((1 - fine_ratio) * len(ordered)), len(ordered) - 1)])


def to_cells(regions: Tensor) -> Tensor:
    """Regions (..., h, w), each copied to its four cells, (..., 2h, 2w)."""
    return regions.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def copy_neighbours(coarse: Tensor, fine: Tensor, grain: Tensor) -> Tensor:
    """Codes on the fine grid: fine ones where the grain is, else the region's, copied.

    Args:
        coarse: (B, z, h, w).
        fine: (B, z, 2h, 2w).
        grain: 1 or True where a region is fine, (B, h, w).
    """
    return torch.where(to_cells(grain.bool()).unsqueeze(1), fine, to_cells(coarse))


def share_in_regions(values: Tensor, grain: Tensor) -> Tensor:
    """The mean of its cells in every cell of a coarse region, (B, C, 2h, 2w)."""
    return copy_neighbours(F.avg_pool2d(values, 2), values, grain)


def multi_grained_noise(noise: Tensor, grain: Tensor) -> Tensor:
    """Noise of which a coarse region has one sample, not four: standard normal (B, C, 2h, 2w) in and out."""
    return copy_neighbours(noise[..., ::2, ::2], noise, grain)


def distinct_weights(grain: Tensor) -> Tensor:
    """What a cell counts, when a coarse region counts as one code: 1/4 or 1, (B, 1, 2h, 2w)."""
    return torch.where(to_cells(grain.bool()), 1.0, 0.25).unsqueeze(1)


# --- blocks of the encoder and decoder ----------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two convolutions, each after group norm and SiLU, (B, C, H, W) -> (B, C_out, H, W)."""

    def __init__(self, width: int, out: int, groups: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width, groups), _norm(out, groups)
        self.conv1, self.conv2 = nn.Conv2d(width, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(maps)))
        return self.nin_shortcut(maps) + self.conv2(F.silu(self.norm2(hidden)))


class PixelAttention(nn.Module):
    """Attention of one head over all pixels, added: (B, C, H, W)."""

    def __init__(self, width: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = _norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, maps: Tensor) -> Tensor:
        normed = self.norm(maps)
        query, key, value = (
            conv(normed).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v)
        )  # (B, 1, H W, C)
        attended = F.scaled_dot_product_attention(query, key, value).squeeze(1).transpose(1, 2)
        return maps + self.proj_out(attended.reshape(maps.shape))


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResidualBlock(width, width, groups),
            PixelAttention(width, groups),
            ResidualBlock(width, width, groups),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(maps)))


class _Resample(nn.Module):
    """Half the size (padded right and below, as VQGAN) or twice."""

    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv(F.interpolate(maps, scale_factor=2.0) if self.up else F.pad(maps, (0, 1, 0, 1)))


class _Level(nn.Module):
    """Residual blocks, each with attention if the level has it; a resampling beside them."""

    def __init__(self, width: int, out: int, blocks: int, attention: bool, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [ResidualBlock(width if index == 0 else out, out, groups) for index in range(blocks)]
        )
        self.attn = nn.ModuleList([PixelAttention(out, groups) for _ in range(blocks if attention else 0)])

    def forward(self, maps: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            maps = block(maps)
            maps = self.attn[index](maps) if len(self.attn) else maps
        return maps


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(groups, width), width, eps=1e-6)


class DualGrainEncoder(nn.Module):
    """Pictures (B, 3, H, W) to coarse codes of the last level and fine ones of the level before.

    Args:
        ch: width of the first level.
        ch_mult: width of each level over that.
        num_res_blocks: of each level.
        attn_resolutions: sides at which levels attend, for pictures of side `resolution`.
        z_channels: channels of each head.
        norm_num_groups: groups of channels that are normalised together, at most the width.
    """

    def __init__(
        self,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        resolution: int,
        z_channels: int,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(ch_mult) < 2:
            raise ValueError(f"ch_mult={tuple(ch_mult)}: two grains need two levels")
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        widths, groups = [ch, *(ch * factor for factor in ch_mult)], norm_num_groups
        self.down = nn.ModuleList()
        for index in range(len(ch_mult)):
            attention = resolution >> index in attn_resolutions
            level = _Level(widths[index], widths[index + 1], num_res_blocks, attention, groups)
            if index < len(ch_mult) - 1:
                level.downsample = _Resample(widths[index + 1], up=False)
            self.down.append(level)
        fine, coarse = widths[-2:]
        self.mid_coarse, self.norm_out_coarse = _Middle(coarse, groups), _norm(coarse, groups)
        self.conv_out_coarse = nn.Conv2d(coarse, z_channels, 3, padding=1)
        self.mid_fine, self.norm_out_fine = _Middle(fine, groups), _norm(fine, groups)
        self.conv_out_fine = nn.Conv2d(fine, z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The coarse codes (B, z, h, w) and the fine ones (B, z, 2h, 2w)."""
        maps, fine = self.conv_in(images), images
        level: Any
        for level in self.down:
            maps = level(maps)
            if hasattr(level, "downsample"):
                fine, maps = maps, level.downsample(maps)
        coarse = self.conv_out_coarse(F.silu(self.norm_out_coarse(self.mid_coarse(maps))))
        return coarse, self.conv_out_fine(F.silu(self.norm_out_fine(self.mid_fine(fine))))


class _Decoder(nn.Module):
    """Codes on the fine grid to pictures; levels listed from the picture down, as in the encoder."""

    def __init__(
        self,
        ch: int,
        ch_mult: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        side: int,
        z: int,
        groups: int,
    ) -> None:
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.conv_in, self.mid = nn.Conv2d(z, widths[-1], 3, padding=1), _Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            above = widths[min(index + 1, len(widths) - 1)]
            level = _Level(above, width, blocks + 1, side >> index in attention, groups)
            if index:
                level.upsample = _Resample(width, up=True)
            self.up.append(level)
        self.norm_out, self.conv_out = _norm(widths[0], groups), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        maps = self.mid(self.conv_in(latent))
        level: Any
        for level in list(self.up)[::-1]:
            maps = level(maps)
            maps = level.upsample(maps) if hasattr(level, "upsample") else maps
        return self.conv_out(F.silu(self.norm_out(maps)))


# --- the autoencoder ----------------------------------------------------------------------------------


@dataclass
class DualGrainLatent:
    """What a picture is encoded to.

    Args:
        latent_dist: of the latent (B, z, 2h, 2w); the four cells of a coarse region are alike. Draw with
            `sample`, which gives them one sample.
        grain: True where a region is fine, (B, h, w).
    """

    latent_dist: DiagonalGaussianDistribution
    grain: Tensor

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """One draw, (B, z, 2h, 2w), with one noise for each coarse region.

        Args:
            generator: for a draw that is the same again.
            noise: standard normal of the latent's shape, used instead.
        """
        mean, std = self.latent_dist.mean, self.latent_dist.std
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + std * multi_grained_noise(noise, self.grain)

    def mode(self) -> Tensor:
        return self.latent_dist.mode()


class DualGrainAutoencoder(ModelMixin, ConfigMixin):
    """The autoencoder.

    Args:
        ch: width of the first level.
        ch_mult: widths of the encoder's levels over that; a region's side S is 2^(levels - 1).
        decoder_ch_mult: of the decoder's, one level less; None: the encoder's without the last.
        num_res_blocks: of each level.
        attn_resolutions: sides at which levels attend.
        resolution: side of the pictures that those sides belong to; others run too.
        z_channels: latent channels.
        threshold: entropy above which a region is fine (`fit_threshold`).
        bins: grey levels of the entropy.
        sigma: width of its kernel.
        scaling_factor: what latents are multiplied by for diffusion.
        shift_factor: what is taken from them before.
        norm_num_groups: groups of channels that are normalised together, at most the width. A narrow model
            needs few: where each channel is a group of its own, a flat area loses its colour.

    Raises:
        ValueError: for levels that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_ch_mult: Sequence[int] | None = (1, 1, 2, 2),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16, 32),
        resolution: int = 256,
        z_channels: int = 4,
        threshold: float = 1.6778,
        bins: int = 32,
        sigma: float = 0.01,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        decoder = tuple(decoder_ch_mult or ch_mult[:-1])
        if len(decoder) != len(ch_mult) - 1:
            raise ValueError(
                f"decoder_ch_mult={decoder}: the decoder starts from the fine grid: one level less than "
                f"ch_mult={tuple(ch_mult)}"
            )
        self.region = 2 ** (len(ch_mult) - 1)  # side S of a region in pixels
        self.cell = self.region // 2  # of a fine code
        self.encoder = DualGrainEncoder(
            ch, ch_mult, num_res_blocks, attn_resolutions, resolution, 2 * z_channels, norm_num_groups
        )
        self.decoder = _Decoder(
            ch, decoder, num_res_blocks, attn_resolutions, resolution, z_channels, norm_num_groups
        )

    def grain(self, images: Tensor) -> Tensor:
        """Which regions of pictures (B, 3, H, W) in [-1, 1] are fine, (B, h, w)."""
        config: Any = self.config
        entropy = region_entropy(images.float(), self.region, config.bins, config.sigma)
        return entropy > config.threshold

    def encode(self, images: Tensor, grain: Tensor | None = None) -> DualGrainLatent:
        """Latent and grains of pictures (B, 3, H, W) in [-1, 1].

        Args:
            images: sides multiples of S.
            grain: True where a region is fine, (B, h, w); None: by its entropy.
        """
        grain = self.grain(images) if grain is None else grain.bool()
        coarse, fine = self.encoder(images)
        return DualGrainLatent(DiagonalGaussianDistribution(copy_neighbours(coarse, fine, grain)), grain)

    def decode(self, latent: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures (B, 3, H, W) of latents (B, z, 2h, 2w), as `.sample` or in a tuple."""
        images = self.decoder(latent)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, images: Tensor, grain: Tensor | None = None) -> Tensor:
        """Pictures encoded, drawn and decoded."""
        return self.decoder(self.encode(images, grain).sample())

    def losses(
        self, images: Tensor, kl_weight: float = 1e-6, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of each picture, (B,): "reconstruction" (mean absolute error), "kl" (nats, of the distinct
        codes) and their weighted sum "loss". `noise` is that of `DualGrainLatent.sample`."""
        encoded = self.encode(images)
        reconstruction = (self.decoder(encoded.sample(noise=noise)) - images).abs().flatten(1).mean(1)
        mean, log_variance = encoded.latent_dist.mean, encoded.latent_dist.logvar
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        kl = (divergence * distinct_weights(encoded.grain)).flatten(1).sum(1)
        return {"loss": reconstruction + kl_weight * kl, "reconstruction": reconstruction, "kl": kl}


@register(
    "model",
    "d2it-vae",
    summary="D2iT's autoencoder: fine codes where a picture has detail, coarse ones elsewhere",
    paper=PAPER,
    seam=("architecture",),
)
def d2it_vae(variant: str | None = None, **config: Any) -> DualGrainAutoencoder:
    """A fresh autoencoder; it has no named sizes."""
    if variant is not None:
        raise ValueError(f"no variant {variant!r}: d2it-vae has one size; change it by its configuration")
    return DualGrainAutoencoder(**config)
