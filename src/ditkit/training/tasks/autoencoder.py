"""Train diffusers' `AutoencoderKL` on pictures.

Loss: mean |x - x'| + `l2_weight` mean (x - x')^2 + `kl_weight` KL(q(z|x) || N(0, I)) per latent element.

At export the latents are standardised: with mu and sigma the mean and deviation of each latent channel over
the data, the last convolution of the encoder side (`quant_conv`) gives (z - mu) / sigma and the first of the
decoder side (`post_quant_conv`) takes it back. Pipelines that know one scale for all channels then see
channels of unit variance with `scaling_factor` 1 and `shift_factor` 0.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from ditkit.data.pictures import grid, open_pictures, periods
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.base import Task, TaskOptions


class AutoencoderOptions(TaskOptions):
    model: dict[str, Any]
    l2_weight: float = 0.5
    kl_weight: float = 1e-6


def restoration_losses(
    restored: torch.Tensor,
    pixels: torch.Tensor,
    moments: Any,
    options: AutoencoderOptions,
    weight: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The loss of restored pixels, with the L1 and L2 terms weighted by `weight` (mean 1 after scaling).

    `moments` is the encoder's distribution; `"mse"` is without the weight.
    """
    difference = restored.float() - pixels
    weight = torch.ones(()) if weight is None else weight / weight.mean()
    l1, l2 = (weight * difference.abs()).mean(), (weight * difference.square()).mean()
    mean, logvar = moments.mean.float(), moments.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    loss = l1 + options.l2_weight * l2 + options.kl_weight * kl
    return {"loss": loss, "mse": difference.square().mean(), "kl": kl}


class AutoencoderTask(Task):
    Options = AutoencoderOptions
    autoencoder: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pictures = open_pictures(self.run.data)
        self.autoencoder = self._build().to(memory_format=torch.channels_last)

    def _build(self) -> Any:
        return AutoencoderKL(**{"scaling_factor": 1.0, "shift_factor": 0.0, **self.options.model})

    @property
    def sample_count(self) -> int:
        return len(self.pictures)

    def sample_periods(self) -> list[int] | None:
        return periods(self.run.data, self.pictures)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        images = self._images(self.pictures, indices.cpu().numpy())  # (B, 3, H, W)
        moments = self.autoencoder.encode(images).latent_dist
        latents = moments.mean + moments.std * noise.normal(*moments.mean.shape[1:])
        restored = self.autoencoder.decode(latents).sample
        return restoration_losses(restored, images, moments, self.options)

    def _images(self, pictures: Any, indices: Any) -> torch.Tensor:
        device = next(self.autoencoder.parameters()).device
        return pictures.images(indices).to(device, memory_format=torch.channels_last)

    def heldout_loss(self) -> dict[str, float]:
        images = self._images(open_pictures(self.run.data, "heldout"), slice(None))
        error = sum(
            F.mse_loss(self._restore(part), part, reduction="sum").item() for part in images.split(64)
        )
        mse = error / images.numel()
        return {"mse": mse, "psnr": 10 * math.log10(4 / mse)}  # pictures span [-1, 1]

    def _restore(self, images: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode(self.autoencoder.encode(images).latent_dist.mean).sample

    def draw(self) -> Image.Image:
        """Pairs of rows: pictures above their reconstructions."""
        take = torch.linspace(0, self.sample_count - 1, 32).long().numpy()
        images = self._images(self.pictures, take)
        restored = self._restore(images)
        rows = [row for pair in zip(images.split(8), restored.split(8), strict=True) for row in pair]
        return grid(torch.cat(rows), columns=8)

    def export(self, folder: Path) -> None:
        standardise(self.autoencoder, (self._images(self.pictures, c.numpy()) for c in self._chunks()))
        self.autoencoder.to(memory_format=torch.contiguous_format).save_pretrained(folder)

    def _chunks(self) -> tuple[torch.Tensor, ...]:
        return torch.arange(self.sample_count).split(64)


@torch.no_grad()
def standardise(autoencoder: Any, batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold the standardisation of each latent channel into the 1 x 1 convolutions around the latents.

    Returns the mean and deviation `(C,)` that the channels had. Reconstructions stay as they were.
    """
    latents = torch.cat([autoencoder.encode(batch).latent_dist.mean.float().cpu() for batch in batches])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    enter, leave = autoencoder.quant_conv, autoencoder.post_quant_conv
    if enter is None or leave is None or enter.bias is None or leave.bias is None:
        raise ValueError("standardise: the autoencoder needs use_quant_conv and use_post_quant_conv")
    mean, std = mean.to(enter.weight), std.to(enter.weight)
    channels = len(mean)
    enter.weight[:channels] /= std[:, None, None, None]
    enter.bias[:channels] = (enter.bias[:channels] - mean) / std
    enter.bias[channels:] -= 2 * std.log()  # log-variances
    leave.bias += (leave.weight[:, :, 0, 0] * mean).sum(1)
    leave.weight *= std[None, :, None, None]
    return mean, std
