"""Train an architecture of ours that reads text: Gaussian diffusion with learned variance, or flow matching.

The network sees pixels (scaled to `pixels` a side) or latents: those of an autoencoder, an earlier stage's
name or a folder, or cached ones. The text encoder is one of those that the stage `text_encoders` trained; it
may train along. Captions are dropped for guidance. The export is a whole `TextConditionalPipeline` folder.

Dimensions: N pictures in all, B of a batch, C latent channels, H and W latent height and width, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from ditkit import models
from ditkit.data.latents import LatentSet, open_samples
from ditkit.data.pictures import grid, need_captions, periods
from ditkit.models.text import text_conditions, text_settings
from ditkit.pipelines.denoising import scheduler_for
from ditkit.pipelines.text_conditional import TextConditionalPipeline
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.noising import drawn_times
from ditkit.processes.transport import Transport
from ditkit.training.config import ConfigError
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.base import TaskOptions, load_frozen
from ditkit.training.tasks.denoising import DenoisingTask, Network
from ditkit.training.tasks.latents import network_samples

ENCODERS: dict[str, tuple[str, Any]] = {
    "clip": ("text_encoder", CLIPTextModel),
    "t5": ("text_encoder_2", T5EncoderModel),
}


class TextConditionalOptions(TaskOptions):
    """`process`: `gaussian` trains noise and variance, `flow` velocity on the linear path. `text_encoders`:
    an earlier stage or a folder like its export. `preview`: captions of the sample pictures; `storage`: dtype
    of the exported weights."""

    arch: str
    model: dict[str, Any] = {}
    process: Literal["gaussian", "flow"] = "flow"
    pixels: int | None = None
    autoencoder: str | None = None
    text_encoders: str = "text_encoders"
    encoder: Literal["clip", "t5"] = "t5"
    train_text_encoder: bool = True
    caption_dropout: float = 0.1
    preview: list[str] = []
    preview_steps: int = 28
    preview_guidance: float = 2.0
    storage: Literal["float32", "float16", "bfloat16"] = "float32"


class TextConditionalTask(DenoisingTask):
    Options = TextConditionalOptions
    autoencoder: Any
    text_encoder: Any
    samples: torch.Tensor
    tokens: torch.Tensor
    masks: torch.Tensor
    no_tokens: torch.Tensor
    no_mask: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = self.options
        self.pictures = open_samples(self.run.data)
        self.autoencoder = self._open_autoencoder()
        texts = self._folder("text_encoders", "tokenizer/tokenizer_config.json")
        part, cls = ENCODERS[options.encoder]
        self.tokenizer = AutoTokenizer.from_pretrained(texts / "tokenizer")
        self.text_encoder = cls.from_pretrained(texts / part).requires_grad_(options.train_text_encoder)
        samples = network_samples(self.pictures, self.autoencoder, options.pixels)
        self.register_buffer("samples", samples, persistent=False)  # (N, C, H, W)
        tokens, masks = self._tokenize(need_captions(self.pictures))
        self.register_buffer("tokens", tokens, persistent=False)  # (N, T)
        self.register_buffer("masks", masks, persistent=False)  # (N, T)
        no_tokens, no_mask = self._tokenize([""])
        self.register_buffer("no_tokens", no_tokens, persistent=False)  # (1, T)
        self.register_buffer("no_mask", no_mask, persistent=False)  # (1, T)
        self.model = self._build()
        self.learned = self.model.predicted_channels > self.model.in_channels
        variance = "learned_range" if self.learned else "fixed_small"
        gaussian = options.process == "gaussian"
        self.process = GaussianDiffusion.create(1000, variance=variance) if gaussian else Transport()
        self.objectives = self._objectives(labels=False, example=self._example)

    def _build(self) -> Any:
        options = self.options
        settings = {
            "input_size": tuple(self.samples.shape[2:]),
            "in_channels": self.samples.shape[1],
            "learn_sigma": options.process == "gaussian",
            **options.model,
        }
        try:
            width = self.text_encoder.config.hidden_size
            return models.create(options.arch, **text_settings(options.arch, width), **settings)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.run.name}.task_options: {options.arch}: {error}") from error

    def _folder(self, key: str, holds: str) -> Path:
        """What an option names: an earlier stage's export, or a folder."""
        name = getattr(self.options, key)
        folder = self.stage_folder(name) if name in self.earlier else Path(name)
        if not (folder / holds).is_file():
            raise ConfigError(
                f"{self.run.name}.task_options.{key}: no stage and no folder {name!r} with {holds} (stages "
                f"before it: {', '.join(self.earlier) or 'none'})"
            )
        return folder

    def _open_autoencoder(self) -> Any:
        options = self.options
        cached = self.pictures.autoencoder if isinstance(self.pictures, LatentSet) else None
        if (options.pixels, options.autoencoder, cached).count(None) < 2:
            raise ConfigError(
                f"{self.run.name}.task_options: pixels, autoencoder and cached latents, which bring their "
                "own, exclude each other"
            )
        if cached is None and options.autoencoder is None:
            return None
        return load_frozen(AutoencoderKL, cached or self._folder("autoencoder", "config.json"))

    def _tokenize(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and masks (N, T), padded to the tokenizer's own length."""
        read = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return read.input_ids, read.attention_mask

    @property
    def sample_count(self) -> int:
        return len(self.pictures)

    def sample_periods(self) -> list[int] | None:
        return None if isinstance(self.pictures, LatentSet) else periods(self.run.data, self.pictures)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        clean = self.samples[indices]
        epsilon = noise.normal(*clean.shape[1:])  # (B, C, H, W)
        times = drawn_times(self.process, self.objectives.times(noise.uniform(), noise))  # (B,)
        network = self._under(*self._dropped(self.tokens[indices], self.masks[indices], noise))
        return self.trained(network, clean, epsilon, times, noise, self.clean_pictures(indices))

    def _dropped(
        self, tokens: torch.Tensor, mask: torch.Tensor, noise: BatchNoise
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions and their masks (B, T), some of them replaced by the empty one."""
        dropped = (noise.uniform() < self.options.caption_dropout)[:, None]  # (B, 1)
        return torch.where(dropped, self.no_tokens, tokens), torch.where(dropped, self.no_mask, mask)

    def _under(self, tokens: torch.Tensor, mask: torch.Tensor) -> Network:
        """The network under captions (B, T)."""
        conditions = text_conditions(self.model, self.text_encoder, tokens, mask)

        def network(state: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
            return [self.model(state, t, return_dict=False, **conditions)[0].float()]

        return network

    def _example(self) -> None:
        """A forward of one sample."""
        clean = self.samples[:1]
        self._under(self.no_tokens, self.no_mask)(clean, torch.zeros(1, device=clean.device))

    def heldout_loss(self) -> dict[str, float]:
        device = self.samples.device
        pictures = open_samples(self.run.data, "heldout")
        clean = network_samples(pictures, self.autoencoder, self.options.pixels).to(device)
        tokens, mask = (part.to(device) for part in self._tokenize(pictures.captions))
        noise = BatchNoise(self.run.seed, 0, len(pictures), torch.arange(len(pictures)), device)
        epsilon, times = noise.normal(*clean.shape[1:]), drawn_times(self.process, noise.uniform())
        network = self._under(*self._dropped(tokens, mask, noise))
        losses = self.step(network, clean, epsilon, times, noise).losses
        return {name: float(value.mean()) for name, value in losses.items()}

    def pipeline(self) -> TextConditionalPipeline:
        """A pipeline over this task's modules."""
        return TextConditionalPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            transformer=self.model,
            scheduler=scheduler_for(self.options.process, self.learned, clip=self.autoencoder is None),
            vae=self.autoencoder,
        )

    def draw(self) -> Image.Image | None:
        if not self.options.preview:
            return None
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        drawn: Any = pipe(
            self.options.preview,
            guidance_scale=self.options.preview_guidance,
            num_inference_steps=self.options.preview_steps,
            generator=[torch.Generator().manual_seed(i) for i in range(len(self.options.preview))],
            output_type="pt",
        )
        return grid(drawn.images * 2 - 1, columns=8)

    def export(self, folder: Path) -> None:
        pipe: Any = self.pipeline()
        pipe.to(getattr(torch, self.options.storage))
        pipe.save_pretrained(folder)
        pipe.to(torch.float32)
