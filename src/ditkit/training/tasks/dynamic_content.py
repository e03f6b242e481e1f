"""Train a class-conditional transformer on latents of two grains, with one noise for a coarse region.

Latents and maps come from an autoencoder of two grains: an earlier stage or a folder. A coarse region is one
code: its cells share one noise and count once in the loss. The export is a whole `DynamicGrainPipeline`
folder, with `process.json` in it; the pipeline draws its own maps where `grain` names the transformer
for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from tqdm.auto import tqdm

from ditkit.data.pictures import class_labels, grid, open_pictures, periods
from ditkit.files import write_text
from ditkit.models.d2it import D2iT, GrainTransformer
from ditkit.models.d2it_autoencoder import DualGrainAutoencoder, distinct_weights, multi_grained_noise
from ditkit.pipelines.denoising import scheduler_for
from ditkit.pipelines.dynamic_grain import DynamicGrainPipeline
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.noising import drawn_times, training_losses
from ditkit.processes.transport import Transport
from ditkit.training.order import BatchNoise, mix
from ditkit.training.tasks.base import Task, TaskOptions


class DynamicContentOptions(TaskOptions):
    """`autoencoder`, `grain`: a stage or a folder; `model`: of `D2iT`; `process`: `gaussian` trains noise and
    variance, `flow` velocity on the linear path."""

    autoencoder: str = "autoencoder"
    grain: str | None = None
    model: dict[str, Any] = {}
    process: Literal["gaussian", "flow"] = "gaussian"
    class_dropout: float = Field(default=0.1, ge=0, le=1)
    preview_steps: int = Field(default=50, ge=1)
    preview_guidance: float = 1.0


class DynamicContentTask(Task):
    Options = DynamicContentOptions
    autoencoder: Any
    grain_transformer: Any
    latents: torch.Tensor
    maps: torch.Tensor
    labels: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = self.options
        self.pictures = open_pictures(self.run.data)
        self.autoencoder = self.frozen(DualGrainAutoencoder, "autoencoder")
        self.grain_transformer = self.frozen(GrainTransformer, "grain") if options.grain else None
        labels, self.classes = class_labels(self.pictures)
        latents, maps = self._encode(self.pictures)
        self.register_buffer("latents", latents, persistent=False)  # (N, C, 2h, 2w)
        self.register_buffer("maps", maps, persistent=False)  # (N, h, w)
        self.register_buffer("labels", labels, persistent=False)  # (N,)
        self.transformer = D2iT(
            **{
                "input_size": tuple(latents.shape[2:]),
                "in_channels": latents.shape[1],
                "num_classes": len(self.classes),
                "learn_sigma": options.process == "gaussian",
                **options.model,
            }
        )
        self.process = GaussianDiffusion.create(1000) if options.process == "gaussian" else Transport()

    @torch.no_grad()
    def _encode(self, pictures: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled latents (N, C, 2h, 2w) and grains (N, h, w)."""
        config, device = self.autoencoder.config, next(self.autoencoder.parameters()).device
        latents, maps = [], []
        for chunk in tqdm(torch.arange(len(pictures)).split(64), desc="encoding pictures", delay=2):
            encoded = self.autoencoder.encode(pictures.images(chunk.numpy()).to(device))
            latents.append((encoded.mode() - config.shift_factor) * config.scaling_factor)
            maps.append(encoded.grain)
        return torch.cat(latents), torch.cat(maps)

    @property
    def sample_count(self) -> int:
        return len(self.pictures)

    def sample_periods(self) -> list[int] | None:
        return periods(self.run.data, self.pictures)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        return self._losses(self.latents[indices], self.maps[indices], self.labels[indices], noise)

    def _losses(
        self, clean: torch.Tensor, grain: torch.Tensor, labels: torch.Tensor, noise: BatchNoise
    ) -> dict[str, torch.Tensor]:
        epsilon = multi_grained_noise(noise.normal(*clean.shape[1:]), grain)  # (B, C, 2h, 2w)
        times = drawn_times(self.process, noise.uniform())  # (B,)
        dropped = (noise.uniform() < self.options.class_dropout).long()  # (B,)

        def network(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            output = self.transformer(
                state, t, labels, force_drop_ids=dropped, grain=grain, return_dict=False
            )[0]
            return output.float()

        losses = training_losses(self.process, network, clean, epsilon, times, distinct_weights(grain))
        return {name: value.mean() for name, value in losses.items()}

    def heldout_loss(self) -> dict[str, float]:
        pictures = open_pictures(self.run.data, "heldout")
        device = self.latents.device
        labels = class_labels(pictures, self.classes)[0].to(device)
        noise = BatchNoise(self.run.seed, 0, len(pictures), torch.arange(len(pictures)), device)
        losses = self._losses(*self._encode(pictures), labels, noise)
        return {name: float(value) for name, value in losses.items()}

    def pipeline(self) -> DynamicGrainPipeline:
        """A pipeline over this task's modules."""
        learned = self.options.process == "gaussian"
        return DynamicGrainPipeline(
            transformer=self.transformer,
            scheduler=scheduler_for(self.options.process, learned, clip=False),
            vae=self.autoencoder,
            grain_transformer=self.grain_transformer,
            fine_ratio=self.maps.float().mean().item(),
            class_names=self.classes,
        )

    def draw(self) -> Image.Image:
        """One row of eight for each of the first eight classes, over drawn maps or those of pictures."""
        pipe: Any = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        classes = torch.arange(min(8, len(self.classes))).repeat_interleave(8)
        generator = torch.Generator().manual_seed(mix(self.run.seed, 3))
        images = pipe(
            classes,
            guidance_scale=self.options.preview_guidance,
            num_inference_steps=self.options.preview_steps,
            grain=None if self.grain_transformer is not None else self._maps_of(classes),
            generator=generator,
            output_type="pt",
        ).images
        return grid(images * 2 - 1, columns=8)

    def _maps_of(self, classes: torch.Tensor) -> torch.Tensor:
        """A map of the data for each class, other ones where it comes again."""
        places, seen = [], dict.fromkeys(range(len(self.classes)), 0)
        for label in classes.tolist():
            of_class = (self.labels == label).nonzero()[:, 0]
            places.append(of_class[seen[label] % len(of_class)])
            seen[label] += 1
        return self.maps[torch.stack(places)]

    def export(self, folder: Path) -> None:
        self.pipeline().save_pretrained(folder)
        facts = {"process": self.options.process, "classes": self.classes}
        write_text(folder / "process.json", json.dumps(facts, indent=2) + "\n")
