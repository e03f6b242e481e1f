"""Train a small vision transformer on the words of captions, as a teacher for `repa` and `haste`.

A transformers `ViTModel`. The mean of its patch tokens tells, by one linear layer, which words the caption
of a picture has, and its class where the data has classes: every patch is asked to know something of what it
shows. Pictures are moved and scaled a little, so that it does not learn them by
heart. The export is the model's own folder, without the linear layer; `labels.json` lists the labels.

Dimensions: B pictures of H x W pixels, T patches, D width, K labels.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from ditkit.data.pictures import open_pictures, periods
from ditkit.training.config import ConfigError
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.base import Task, TaskOptions


class TeacherOptions(TaskOptions):
    """`model`: of `ViTConfig`; its image_size is the pictures'. `least`: in how many pictures a word or class
    must be to be a label. `move`: a picture is shifted by at most this share of its side, and scaled by as
    much."""

    model: dict[str, Any] = {}
    least: int = Field(default=10, ge=1)
    move: float = Field(default=0.1, ge=0, lt=1)


def words_of(caption: str) -> set[str]:
    """Words of three letters or more."""
    return set(re.findall(r"[a-z]{3,}", caption.lower()))


def _labels_of(pictures: Any) -> list[set[str]]:
    """The words of each picture's caption and its class, where it has one."""
    return [
        words_of(caption) | (set() if name is None else {f"class {name}"})
        for caption, name in zip(pictures.captions, pictures.classes, strict=True)
    ]


def moved(images: Tensor, draws: Tensor, most: float) -> Tensor:
    """Pictures (B, 3, H, W), each shifted and scaled by three numbers (B, 3) in [0, 1)."""
    by = (2 * draws - 1) * most  # (B, 3): shares of the side left, up, and larger
    scale, zero = 1 - by[:, 2], torch.zeros_like(by[:, 0])
    # Places run from -1 to 1 over a side.
    rows = [torch.stack([scale, zero, 2 * by[:, 0]], 1), torch.stack([zero, scale, 2 * by[:, 1]], 1)]
    places = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


class TeacherTask(Task):
    Options = TeacherOptions
    labels: Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pictures = open_pictures(self.run.data)
        counts = Counter(label for labels in _labels_of(self.pictures) for label in labels)
        self.names = sorted(name for name, count in counts.items() if count >= self.options.least)
        if not self.names:
            raise ConfigError(
                f"{self.run.name}.task_options.least: no word of a caption and no class has "
                f"{self.options.least} pictures"
            )
        self.register_buffer("labels", self._labels(self.pictures), persistent=False)  # (N, K)
        where = f"{self.run.name}.task_options.model"
        sizes = {"image_size": self.run.data.size, "num_channels": 3, **self.options.model}
        if unknown := sorted(set(sizes) - set(ViTConfig().to_dict())):
            raise ConfigError(f"{where}: a ViTConfig has no {', '.join(unknown)}")
        try:
            self.network: Any = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error
        self.head = nn.Linear(self.network.config.hidden_size, self.labels.shape[1])

    def _labels(self, pictures: Any) -> Tensor:
        """1 for the labels that each picture has, (N, K)."""
        rows = [[name in there for name in self.names] for there in _labels_of(pictures)]
        return torch.tensor(rows, dtype=torch.float32)

    @property
    def sample_count(self) -> int:
        return len(self.pictures)

    def sample_periods(self) -> list[int] | None:
        return periods(self.run.data, self.pictures)

    def _logits(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to labels (B, K)."""
        tokens = self.network(pixel_values=images).last_hidden_state[:, 1:]  # (B, T, D)
        return self.head(tokens.mean(1)).float()

    def forward(self, indices: Tensor, noise: BatchNoise) -> dict[str, Tensor]:
        images = self.pictures.images(indices.cpu().numpy()).to(self.labels.device)
        images = moved(images, noise.uniform(3), self.options.move)
        return {"loss": F.binary_cross_entropy_with_logits(self._logits(images), self.labels[indices])}

    def heldout_loss(self) -> dict[str, float]:
        """The loss, and which share of a picture's n labels are among the n likeliest."""
        pictures = open_pictures(self.run.data, "heldout")
        labels = self._labels(pictures).to(self.labels.device)  # (N, K)
        images = pictures.images().to(labels.device)
        logits = torch.cat([self._logits(part) for part in images.split(64)])
        order = labels.gather(1, logits.argsort(1, descending=True))
        counted = labels.sum(1, keepdim=True) > torch.arange(labels.shape[1], device=labels.device)
        found = float((order * counted).sum() / labels.sum())
        return {"loss": float(F.binary_cross_entropy_with_logits(logits, labels)), "found": found}

    def export(self, folder: Path) -> None:
        self.network.save_pretrained(folder)
        pixels = {
            "image_processor_type": "ViTImageProcessor",
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        size = {"height": self.run.data.size, "width": self.run.data.size}
        facts = {**pixels, "size": size, "rescale_factor": 1 / 255}
        (folder / "preprocessor_config.json").write_text(json.dumps(facts, indent=2) + "\n")
        (folder / "labels.json").write_text(json.dumps(self.names, indent=2) + "\n")
