"""Train a transformer that draws, from a class, which regions of a picture are fine.

The maps are those that an autoencoder of two grains, an earlier stage or a folder, gives the pictures.
Classes are the emoji groups, or the folders that the picture files lie in. The loss is the model's: the
cross-entropy of a random share of each map, given the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from tqdm.auto import tqdm

from ditkit.data.pictures import class_labels, grid, open_pictures, periods
from ditkit.models.d2it import GrainTransformer
from ditkit.models.d2it_autoencoder import DualGrainAutoencoder
from ditkit.training.order import BatchNoise, mix
from ditkit.training.tasks.base import Task, TaskOptions


class GrainOptions(TaskOptions):
    """`autoencoder`: a stage or a folder; `model`: of `GrainTransformer`."""

    autoencoder: str = "autoencoder"
    model: dict[str, Any] = {}
    class_dropout: float = Field(default=0.1, ge=0, le=1)


class GrainTask(Task):
    Options = GrainOptions
    autoencoder: Any
    maps: torch.Tensor
    labels: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pictures = open_pictures(self.run.data)
        self.autoencoder = self.frozen(DualGrainAutoencoder, "autoencoder")
        labels, self.classes = class_labels(self.pictures)
        self.register_buffer("maps", self._maps(self.pictures), persistent=False)  # (N, h, w)
        self.register_buffer("labels", labels, persistent=False)  # (N,)
        self.model = GrainTransformer(
            **{
                "grid": tuple(self.maps.shape[1:]),
                "num_classes": len(self.classes),
                **self.options.model,
            }
        )

    @torch.no_grad()
    def _maps(self, pictures: Any) -> torch.Tensor:
        chunks = tqdm(torch.arange(len(pictures)).split(64), desc="mapping grains", delay=2)
        return torch.cat([self.autoencoder.grain(pictures.images(chunk.numpy())) for chunk in chunks])

    @property
    def sample_count(self) -> int:
        return len(self.pictures)

    def sample_periods(self) -> list[int] | None:
        return periods(self.run.data, self.pictures)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        return {"loss": self._loss(self.maps[indices], self.labels[indices], noise)}

    def _loss(self, maps: torch.Tensor, labels: torch.Tensor, noise: BatchNoise) -> torch.Tensor:
        hidden = noise.uniform(*maps.shape[1:]) < noise.uniform(1, 1)  # (B, h, w), a share of each
        dropped = (noise.uniform() < self.options.class_dropout).long()  # (B,)
        return self.model.loss(maps, labels, dropped, hidden).mean()

    def heldout_loss(self) -> dict[str, float]:
        pictures = open_pictures(self.run.data, "heldout")
        device = self.maps.device
        labels = class_labels(pictures, self.classes)[0].to(device)
        noise = BatchNoise(self.run.seed, 0, len(pictures), torch.arange(len(pictures)), device)
        return {"loss": float(self._loss(self._maps(pictures).to(device), labels, noise))}

    def draw(self) -> Image.Image:
        """Eight maps of each of the first eight classes, one row a class; fine regions are white."""
        classes = torch.arange(min(8, len(self.classes))).repeat_interleave(8).to(self.maps.device)
        generator = torch.Generator().manual_seed(mix(self.run.seed, 3))
        maps = self.model.sample(classes, generator=generator).cpu()  # (B, h, w)
        maps = F.pad(maps.float() * 2 - 1, (0, 1, 0, 1))  # a grey line between them
        large = maps.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
        return grid(large.unsqueeze(1).expand(-1, 3, -1, -1), columns=8)

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
