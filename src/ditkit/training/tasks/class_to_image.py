"""Train a class-conditional architecture: Gaussian diffusion with learned variance, or flow matching.

The network sees pixels (scaled to `pixels` a side) or latents: of an autoencoder, an earlier stage's name or
a folder, or cached ones (`data: {kind: latents}`). Classes are the emoji groups, or those of the data. It
starts afresh, from a trained network of another architecture (`inherit_from`), or goes on from a pipeline on
data of its own (`start_from`). The file's `objective:` changes the loss. The export is a whole
`ClassConditionalPipeline` folder with `process.json` in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field, PositiveFloat, model_validator

from ditkit.data.latents import LatentSet, open_samples
from ditkit.data.pictures import class_labels, grid, periods
from ditkit.models import autoencoder_class
from ditkit.models.building import DataShape, build
from ditkit.models.layers import relabelled
from ditkit.pipelines.class_conditional import ClassConditionalPipeline
from ditkit.pipelines.denoising import is_flow, scheduler_for
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.gaussian_sampling import trajectory
from ditkit.processes.noising import drawn_times
from ditkit.processes.times import TimeDistribution, dimension_shift
from ditkit.processes.transport import Transport
from ditkit.processes.transport_sampling import sample_ode
from ditkit.training.config import ConfigError
from ditkit.training.order import BatchNoise, mix
from ditkit.training.tasks.base import TaskOptions, load_frozen
from ditkit.training.tasks.denoising import DenoisingTask, Network
from ditkit.training.tasks.latents import decode_pictures, network_samples


class ClassToImageOptions(TaskOptions):
    """`process`: `gaussian` trains noise, and variance where the network learns one, `flow` velocity on the
    linear path. `inherit_from`: an earlier stage or a model's folder. `start_from`, in place of `arch`: an
    earlier stage or a pipeline's folder, whose network, autoencoder and, where the data are of no others,
    classes it takes over; with `dynamic`, options of its routers, that network learns which of its parts to
    run (objective `dydit`).

    Of a flow alone: `time_distribution` with `time_mean` and `time_std` of the logit of the share of noise,
    and `shift` of the times towards noise (`auto`: by how many numbers a sample has; null: none)."""

    arch: str | None = None
    model: dict[str, Any] = {}
    inherit_from: str | None = None
    start_from: str | None = None
    dynamic: dict[str, Any] | None = None
    process: Literal["gaussian", "flow"] = "gaussian"
    time_distribution: TimeDistribution = "uniform"
    time_mean: float = 0.0
    time_std: float = Field(default=1.0, gt=0)
    shift: PositiveFloat | Literal["auto"] | None = None
    pixels: int | None = None
    autoencoder: str | None = None
    class_dropout: float = 0.1
    preview_steps: int = 50

    @model_validator(mode="after")
    def _one_start(self) -> ClassToImageOptions:
        if (self.arch is None) == (self.start_from is None):
            raise ValueError(
                "give arch, an architecture to begin with, or start_from, a pipeline to go on from"
            )
        if self.start_from is None and self.dynamic is not None:
            raise ValueError("dynamic needs start_from; a network to begin with is arch: dydit")
        if self.start_from is not None and (self.model or self.inherit_from is not None):
            raise ValueError("start_from takes the network as it is, without model and inherit_from")
        return self


class ClassToImageTask(DenoisingTask):
    Options = ClassToImageOptions
    autoencoder: Any
    samples: torch.Tensor
    labels: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = self.options
        if options.pixels and options.autoencoder:
            raise ConfigError(f"{self.run.name}.task_options: pixels and autoencoder exclude each other")
        self.pipeline: Any = self.started(ClassConditionalPipeline)
        if options.process == "gaussian" and (options.shift or options.time_distribution != "uniform"):
            raise ConfigError(
                f"{self.run.name}.task_options: time_distribution and shift are of a flow's times; set "
                "process: flow or leave them out"
            )
        self.pictures = open_samples(self.run.data)
        if options.pixels and isinstance(self.pictures, LatentSet):
            raise ConfigError(f"{self.run.name}.task_options.pixels: the data are latents, not pixels")
        labels, self.classes = class_labels(self.pictures, self._known_classes())
        self.autoencoder = self._open_autoencoder()
        self.register_buffer("samples", self._encode(self.pictures), persistent=False)  # (N, C, H, W)
        self.register_buffer("labels", labels, persistent=False)  # (N,)
        self.model: Any = self._build()
        self.process = self._flow() if options.process == "flow" else self._gaussian()
        self.objectives = self._objectives({"process": options.process, "classes": self.classes})

    @property
    def adaptable(self) -> Any:
        return self.model

    def _known_classes(self) -> list[str] | None:
        """The classes of the pipeline that it goes on from, where the data have no others."""
        known = None if self.pipeline is None else self.pipeline.class_names
        return known if known is not None and set(self.pictures.classes) <= set(known) else None

    def _continued(self) -> Any:
        """The pipeline's network, with a table for the data's classes where they are others; an adapter
        brings that table itself."""
        model, shape = self.pipeline.transformer, tuple(self.samples.shape[1:])
        where = f"{self.run.name}.task_options"
        if (model.in_channels, *model.latent_size) != shape:
            raise ConfigError(
                f"{where}.start_from: its network is for {model.in_channels} x {model.latent_size[0]} x "
                f"{model.latent_size[1]}, the samples are {' x '.join(map(str, shape))}: "
                "change data.size or pixels"
            )
        trained = "flow" if is_flow(self.pipeline.scheduler) else "gaussian"
        if trained != self.options.process:
            raise ConfigError(
                f"{where}.process: {self.options.process} does not go on from a {trained} network"
            )
        if self._known_classes() is None:
            self.new_classes = self.classes
            if self.run.adapter is None:
                try:
                    model.y_embedder = relabelled(model.y_embedder, self.classes)
                except ValueError as error:
                    raise ConfigError(f"{where}.start_from: {error}") from error
                model.register_to_config(num_classes=len(self.classes))
        return model

    def _build(self) -> Any:
        options = self.options
        if self.pipeline is not None:
            return self.made_dynamic(self._continued())
        channels, height, width = self.samples.shape[1:]
        shape = DataShape((height, width), channels, len(self.classes), options.process == "gaussian")
        try:
            start = self.model_folder(options.inherit_from) if options.inherit_from else None
            model = build(options.arch, shape, options.model, start)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.run.name}.task_options: {error}") from error
        if reason := model.unfit_for(options.process):
            raise ConfigError(
                f"{self.run.name}.task_options.process: {options.process} can't train {options.arch}: "
                f"{reason}"
            )
        if model.y_embedder.dropout <= 0 < options.class_dropout:
            raise ConfigError(
                f"{self.run.name}.task_options.class_dropout: {options.class_dropout} needs a null class; "
                "set it to 0, or model.class_dropout_prob above 0"
            )
        return model

    def _flow(self) -> Transport:
        options = self.options
        shift = dimension_shift(self.samples[0].numel()) if options.shift == "auto" else options.shift or 1.0
        return Transport(
            times=options.time_distribution,
            times_mean=options.time_mean,
            times_std=options.time_std,
            shift=shift,
        )

    def _gaussian(self, respacing: str = "") -> GaussianDiffusion:
        learned = self.model.predicted_channels > self.model.in_channels
        variance = "learned_range" if learned else "fixed_small"
        return GaussianDiffusion.create(1000, respacing, variance=variance)

    def _open_autoencoder(self) -> Any:
        if isinstance(self.pictures, LatentSet):
            if self.options.autoencoder is not None:
                raise ConfigError(
                    f"{self.run.name}.task_options.autoencoder: cached latents bring their own; leave it out"
                )
            return load_frozen(autoencoder_class(self.pictures.autoencoder), self.pictures.autoencoder)
        if self.pipeline is not None and self.options.autoencoder is None:
            vae = self.pipeline.vae
            return None if vae is None else vae.requires_grad_(False).eval()
        return None if self.options.autoencoder is None else self.frozen(None, "autoencoder")

    def _encode(self, pictures: Any) -> torch.Tensor:
        return network_samples(pictures, self.autoencoder, self.options.pixels)

    @property
    def sample_count(self) -> int:
        return len(self.pictures)

    def sample_periods(self) -> list[int] | None:
        return None if isinstance(self.pictures, LatentSet) else periods(self.run.data, self.pictures)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        clean, labels = self.samples[indices], self.labels[indices]
        epsilon = noise.normal(*clean.shape[1:])  # (B, C, H, W)
        times = drawn_times(self.process, self.objectives.times(noise.uniform(), noise))  # (B,)
        network, dropped = self._under(labels, noise)
        pictures = self.clean_pictures(indices)
        return self.trained(network, clean, epsilon, times, noise, pictures, labels=labels, dropped=dropped)

    def _under(self, labels: torch.Tensor, noise: BatchNoise) -> tuple[Network, torch.Tensor | None]:
        """The network under labels (B,), and which of them are dropped, (B,), drawn from `noise`."""
        dropped = (noise.uniform() < self.options.class_dropout).long()  # (B,)
        if self.model.y_embedder.dropout <= 0:
            dropped = None

        def network(state: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
            result = self.model(state, t, labels, force_drop_ids=dropped)
            return [stage.float() for stage in getattr(result, "stages", None) or [result.sample]]

        return network, dropped

    def heldout_loss(self, seed: int | None = None) -> dict[str, float]:
        """The process's losses, without objectives, so that runs can be compared.

        Args:
            seed: of the noise; None: the run's own.
        """
        pictures = open_samples(self.run.data, "heldout")
        labels = class_labels(pictures, self.classes)[0].to(self.samples.device)
        rows = torch.arange(len(pictures))
        seed = self.run.seed if seed is None else seed
        noise = BatchNoise(seed, 0, len(pictures), rows, self.samples.device)
        clean = self._encode(pictures).to(self.samples.device)
        epsilon, times = noise.normal(*clean.shape[1:]), drawn_times(self.process, noise.uniform())
        network, dropped = self._under(labels, noise)
        losses = self.step(network, clean, epsilon, times, noise, labels=labels, dropped=dropped).losses
        return {name: float(value.mean()) for name, value in losses.items()}

    def draw(self) -> Image.Image:
        """One row of eight for each of the first eight classes, without guidance."""
        classes = torch.arange(min(8, len(self.classes))).repeat_interleave(8)
        return grid(self.sample(classes, torch.Generator().manual_seed(mix(self.run.seed, 3))), columns=8)

    def sample(
        self, classes: torch.Tensor, generator: torch.Generator, steps: int | None = None
    ) -> torch.Tensor:
        """Pictures (B, 3, h, w) in [-1, 1] of classes (B,), without guidance; the noise is `generator`'s.

        Args:
            steps: of drawing; None: `preview_steps`.
        """
        taken: int = steps or self.options.preview_steps
        start = torch.randn(len(classes), *self.samples.shape[1:], generator=generator)
        start, classes = start.to(self.samples.device), classes.to(self.samples.device)

        def network(state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.model(state, t, classes, return_dict=False)[0].float()

        if isinstance(self.process, GaussianDiffusion):
            process = self._gaussian(str(taken))
            *_, images = trajectory(process, network, start, generator=generator)
        else:
            images = sample_ode(self.process, network, start, method="euler", points=taken + 1)[-1]
        if self.autoencoder is not None:
            images = decode_pictures(self.autoencoder, images)
        return images

    def export(self, folder: Path) -> None:
        learned = self.model.predicted_channels > self.model.in_channels
        shift = self.process.shift if isinstance(self.process, Transport) else 1.0
        scheduler = scheduler_for(self.options.process, learned, self.autoencoder is None, shift)
        names = self.classes if len(self.classes) == self.model.y_embedder.num_classes else None
        pipe = ClassConditionalPipeline(self.model, scheduler, self.autoencoder, names)
        pipe.save_pretrained(folder)
        facts = {
            "process": self.options.process,
            "classes": self.classes,
            "autoencoder": self.options.autoencoder,
        }
        (folder / "process.json").write_text(json.dumps(facts, indent=2) + "\n")
