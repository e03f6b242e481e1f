"""Train an autoencoder of two grains: fine codes where a picture has detail, coarse ones elsewhere.

The entropy above which a region is fine is fitted to the training pictures before the first step, so that
`fine_ratio` of their regions are; where many regions are equally flat, fewer are. The loss is the model's:
mean |x - x'| + `kl_weight` KL of the distinct codes. At export the latents' mean and deviation over the data
become `shift_factor` and `scaling_factor`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tqdm.auto import tqdm

from ditkit.data.pictures import open_pictures
from ditkit.models.d2it_autoencoder import DualGrainAutoencoder, fit_threshold, region_entropy
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.autoencoder import AutoencoderTask
from ditkit.training.tasks.base import TaskOptions


class DynamicAutoencoderOptions(TaskOptions):
    """`model`: of `DualGrainAutoencoder`; a `threshold` in it is used instead of a fitted one."""

    model: dict[str, Any]
    fine_ratio: float = Field(default=0.5, gt=0, lt=1)
    kl_weight: float = Field(default=1e-6, ge=0)


class DynamicAutoencoderTask(AutoencoderTask):
    Options = DynamicAutoencoderOptions

    def _build(self) -> DualGrainAutoencoder:
        options = self.options
        model = DualGrainAutoencoder(**{"resolution": self.run.data.size, **options.model})
        if "threshold" not in options.model:
            config: Any = model.config
            chunks = tqdm(self._chunks(), desc="measuring entropies", delay=2)
            entropies = [
                region_entropy(self.pictures.images(c.numpy()), model.region, config.bins, config.sigma)
                for c in chunks
            ]
            model.register_to_config(threshold=fit_threshold(entropies, options.fine_ratio))
        return model

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        images = self._images(self.pictures, indices.cpu().numpy())  # (B, 3, H, W)
        cell, channels = self.autoencoder.cell, self.autoencoder.config.z_channels
        drawn = noise.normal(channels, images.shape[2] // cell, images.shape[3] // cell)
        losses = self.autoencoder.losses(images, self.options.kl_weight, drawn)
        return {name: value.mean() for name, value in losses.items()}

    def heldout_loss(self) -> dict[str, float]:
        """Error, and the share of regions that are fine."""
        images = self._images(open_pictures(self.run.data, "heldout"), slice(None))
        return {**super().heldout_loss(), "fine_ratio": self.autoencoder.grain(images).float().mean().item()}

    def export(self, folder: Path) -> None:
        chunks = [self._images(self.pictures, c.numpy()) for c in self._chunks()]
        latents = torch.cat([self.autoencoder.encode(chunk).latent_dist.mean for chunk in chunks]).float()
        self.autoencoder.register_to_config(
            shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
        )
        self.autoencoder.to(memory_format=torch.contiguous_format).save_pretrained(folder)
