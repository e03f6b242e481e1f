"""Train a class-conditional architecture: Gaussian diffusion with learned variance, or flow matching.

The network sees pixels (scaled to `pixels` a side) or the latents of an autoencoder: an earlier stage's name
or a folder. Classes are the emoji groups, or the folders that the picture files lie in. The export is the
model's own folder (`save_pretrained`) with `process.json` beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from ditkit import models
from ditkit.data.pictures import class_labels, grid, open_pictures, periods
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.gaussian_sampling import trajectory
from ditkit.processes.transport import Transport
from ditkit.processes.transport_sampling import sample_ode
from ditkit.training.config import ConfigError
from ditkit.training.order import BatchNoise, mix
from ditkit.training.tasks.base import Task, TaskOptions
from ditkit.training.tasks.latents import decode_pictures, encode_pictures


class ClassToImageOptions(TaskOptions):
    """`process`: `gaussian` trains noise and variance, `flow` velocity on the linear path."""

    arch: str
    model: dict[str, Any] = {}
    process: Literal["gaussian", "flow"] = "gaussian"
    pixels: int | None = None
    autoencoder: str | None = None
    class_dropout: float = 0.1
    preview_steps: int = 50


class ClassToImageTask(Task):
    Options = ClassToImageOptions
    autoencoder: Any
    samples: torch.Tensor
    labels: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = self.options
        if options.pixels and options.autoencoder:
            raise ConfigError(f"{self.run.name}.task_options: pixels and autoencoder exclude each other")
        self.pictures = open_pictures(self.run.data)
        labels, self.classes = class_labels(self.pictures)
        self.autoencoder = self._open_autoencoder()
        self.register_buffer("samples", self._encode(self.pictures), persistent=False)  # (N, C, H, W)
        self.register_buffer("labels", labels, persistent=False)  # (N,)
        model = {
            "input_size": tuple(self.samples.shape[2:]),
            "in_channels": self.samples.shape[1],
            "num_classes": len(self.classes),
            "learn_sigma": options.process == "gaussian",
            **options.model,
        }
        self.model = models.create(options.arch, **model)
        self.gaussian = GaussianDiffusion.create(1000)
        self.transport = Transport()

    def _open_autoencoder(self) -> Any:
        name = self.options.autoencoder
        if name is None:
            return None
        folder = self.stage_folder(name) if name in self.earlier else Path(name)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{self.run.name}.task_options.autoencoder: no stage and no folder {name!r}")
        return AutoencoderKL.from_pretrained(folder).requires_grad_(False)

    @torch.no_grad()
    def _encode(self, pictures: Any) -> torch.Tensor:
        parts = []
        for chunk in torch.arange(len(pictures)).split(64):
            images = pictures.images(chunk.numpy())
            if self.autoencoder is not None:
                images = encode_pictures(self.autoencoder, images)
            elif self.options.pixels:
                images = F.interpolate(images, size=self.options.pixels, mode="area")
            parts.append(images)
        return torch.cat(parts)

    @property
    def sample_count(self) -> int:
        return len(self.pictures)

    def sample_periods(self) -> list[int] | None:
        return periods(self.run.data, self.pictures)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        return self._losses(self.samples[indices], self.labels[indices], noise)

    def _losses(
        self, clean: torch.Tensor, labels: torch.Tensor, noise: BatchNoise
    ) -> dict[str, torch.Tensor]:
        epsilon, times = noise.normal(*clean.shape[1:]), noise.uniform()  # (B, C, H, W), (B,)
        dropped = (noise.uniform() < self.options.class_dropout).long()  # (B,)

        def network(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            output = self.model(state, t, labels, force_drop_ids=dropped, return_dict=False)[0]
            return output.float()

        if self.options.process == "gaussian":
            steps = (times * self.gaussian.num_steps).long()
            losses = self.gaussian.training_losses(network, clean, steps, epsilon)
        else:
            losses = self.transport.training_losses(network, clean, epsilon, times)
        return {name: value.mean() for name, value in losses.items()}

    def heldout_loss(self, seed: int | None = None) -> dict[str, float]:
        """Losses on the held-out pictures; `seed` of the noise: the run's own unless given."""
        pictures = open_pictures(self.run.data, "heldout")
        labels = class_labels(pictures, self.classes)[0]
        rows = torch.arange(len(pictures))
        seed = self.run.seed if seed is None else seed
        noise = BatchNoise(seed, 0, len(pictures), rows, self.samples.device)
        return {
            name: float(value) for name, value in self._losses(self._encode(pictures), labels, noise).items()
        }

    def draw(self) -> Image.Image:
        """One row of eight for each of the first eight classes, without guidance."""
        classes = torch.arange(min(8, len(self.classes))).repeat_interleave(8)
        return grid(self.sample(classes, torch.Generator().manual_seed(mix(self.run.seed, 3))), columns=8)

    def sample(self, classes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Pictures (B, 3, h, w) in [-1, 1] of classes (B,), without guidance; the noise is `generator`'s."""
        start = torch.randn(len(classes), *self.samples.shape[1:], generator=generator)
        start, classes = start.to(self.samples.device), classes.to(self.samples.device)

        def network(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.model(state, t, classes, return_dict=False)[0].float()

        if self.options.process == "gaussian":
            process = GaussianDiffusion.create(1000, str(self.options.preview_steps))
            *_, images = trajectory(process, network, start, generator=generator)
        else:
            images = sample_ode(
                self.transport, network, start, method="euler", points=self.options.preview_steps + 1
            )[-1]
        if self.autoencoder is not None:
            images = decode_pictures(self.autoencoder, images)
        return images

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        facts = {
            "process": self.options.process,
            "classes": self.classes,
            "autoencoder": self.options.autoencoder,
        }
        (folder / "process.json").write_text(json.dumps(facts, indent=2) + "\n")
