"""Between pixels and the standardised latents that a transformer sees.

Legend: N pictures in all, B pictures or clips, C latent channels, F latent frames, H, W latent height and
width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ditkit.data.latents import LatentSet


@torch.no_grad()
def encode_pictures(autoencoder: Any, images: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H', W') in [-1, 1] -> latents (B, C, H, W), scaled as the config says."""
    config, encoded = autoencoder.config, autoencoder.encode(images)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mean
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


@torch.no_grad()
def decode_pictures(autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_pictures`."""
    config = autoencoder.config
    return autoencoder.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample


@torch.no_grad()
def network_samples(pictures: Any, autoencoder: Any = None, pixels: int | None = None) -> torch.Tensor:
    """All samples as a network sees them, (N, C, H, W).

    Args:
        pictures: cached latents, which are taken as they are, or pictures.
        autoencoder: encodes pictures; None: the network sees pixels.
        pixels: scale pictures to that many a side; None: as they are.
    """
    if isinstance(pictures, LatentSet):
        return pictures.latents()
    parts = []
    for chunk in tqdm(torch.arange(len(pictures)).split(64), desc="encoding pictures", delay=2):
        images = pictures.images(chunk.numpy())
        if autoencoder is not None:
            images = encode_pictures(autoencoder, images)
        elif pixels:
            images = F.interpolate(images, size=pixels, mode="area")
        parts.append(images)
    return torch.cat(parts)


@torch.no_grad()
def encode_video(autoencoder: Any, video: torch.Tensor) -> torch.Tensor:
    """Clips (B, 3, F', H', W') in [-1, 1] -> latents (B, C, F, H, W), each channel standardised.

    The autoencoder is an `AutoencoderKLWan`; its causal convolutions make the first latents of a clip those
    of the clip's beginning alone.
    """
    mean, std = _statistics(autoencoder)
    return (autoencoder.encode(video).latent_dist.mean - mean) / std


@torch.no_grad()
def decode_video(autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_video`, clipped to [-1, 1]."""
    mean, std = _statistics(autoencoder)
    return autoencoder.decode(latents * std + mean).sample


def _statistics(autoencoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel, (C, 1, 1, 1)."""
    config, like = autoencoder.config, next(autoencoder.parameters())
    mean, std = (
        torch.tensor(v).to(like).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
    )
    return mean, std
