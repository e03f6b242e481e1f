"""Train a transformer with flow matching on the latents of captioned pictures.

A Flux transformer of its own, with the text encoders of an earlier stage, which may train along; or that of a
whole pipeline to go on from (`start_from`), FLUX.1's or Stable Diffusion 3's. Pictures and, where their
encoders are frozen, captions are encoded when they are first seen. The export is a whole pipeline folder.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from pydantic import model_validator
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from ditkit.data.emoji import Split
from ditkit.data.latent_cache import weights_digest
from ditkit.data.latents import LatentSet, open_samples
from ditkit.data.pictures import Pictures, grid, periods
from ditkit.training.config import ConfigError
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.captions import Captions
from ditkit.training.tasks.flow_matching import FlowMatchingOptions, FlowMatchingTask, initialise, zero
from ditkit.training.tasks.forms import form_of
from ditkit.training.tasks.kept import KeptSamples
from ditkit.training.tasks.latents import encode_pictures

HELD_OUT = 128
"""Held-out pictures that are looked at, at most."""


class TextToImageOptions(FlowMatchingOptions):
    """`dynamic`: options of the routers by which the transformer of `start_from` learns which tokens to run
    (objective `dydit`). `guidance_scale`: what a transformer that reads one is given, as in a call of
    `FluxPipeline`."""

    text_encoders: str = "text_encoders"
    dynamic: dict[str, Any] | None = None
    guidance_scale: float = 3.5

    @model_validator(mode="after")
    def _dynamic_start(self) -> TextToImageOptions:
        if self.start_from is None and self.dynamic is not None:
            raise ValueError("dynamic needs start_from, a pipeline with a trained transformer")
        return self


class TextToImageTask(FlowMatchingTask):
    Options = TextToImageOptions
    autoencoder: Any
    transformer: Any
    latents: KeptSamples
    tokens: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = self.options
        self.pipe: Any = self.started(FluxPipeline, StableDiffusion3Pipeline) or self._begun()
        self.form = form_of(self.pipe)
        self._check_parts()
        self.pipe.register_modules(transformer=self.made_dynamic(self.pipe.transformer))
        self.autoencoder, self.transformer = self.pipe.vae, self.pipe.transformer
        self.autoencoder.requires_grad_(False)
        for name, part in self.pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                setattr(self, name, part.requires_grad_(options.train_text_encoders))
        self.pictures = self._open(self.run.data.split)
        self.latents = self._latents(self.pictures)  # (N, L, 4C) or (N, C, H, W)
        self.captions = Captions(
            self.pipe, self.form, options.max_sequence_length, options.train_text_encoders
        )
        self.register_buffer("tokens", self.captions.numbers(self.pictures.captions), persistent=False)
        self.register_buffer("no_tokens", self.captions.numbers([""])[0], persistent=False)
        self._heldout: tuple[KeptSamples, torch.Tensor] | None = None
        side = self.run.data.size // self.form.multiple(self.pipe)
        self.follow(self.pipe.scheduler, side**2)
        self.objectives = self.text_objectives()

    def _begun(self) -> FluxPipeline:
        """A pipeline of the earlier stages' parts and a fresh transformer."""
        options = self.options
        texts = self.stage_folder(options.text_encoders)
        tokenizer = AutoTokenizer.from_pretrained(texts / "tokenizer")
        text_encoder: Any = CLIPTextModel.from_pretrained(texts / "text_encoder")
        text_encoder_2: Any = T5EncoderModel.from_pretrained(texts / "text_encoder_2")
        autoencoder: Any = AutoencoderKL.from_pretrained(self.stage_folder(options.autoencoder))
        autoencoder.register_to_config(_name_or_path="")  # no folder of a run in what it exports
        transformer = FluxTransformer2DModel(
            in_channels=4 * autoencoder.config.latent_channels,
            joint_attention_dim=text_encoder_2.config.d_model,
            pooled_projection_dim=text_encoder.config.hidden_size,
            **options.transformer,
        )
        _initialise(transformer)
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            vae=autoencoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer,
            transformer=transformer,
        )

    def _check_parts(self) -> None:
        """Refuse pictures of a size that is no whole number of tokens, and a transformer that reads more than
        latents.

        Raises:
            ConfigError: what was seen and what to change.
        """
        size, multiple = self.run.data.size, self.form.multiple(self.pipe)
        if size % multiple:
            raise ConfigError(
                f"{self.run.name}.data.size: {size} is not a multiple of {multiple}, a token's side"
            )
        channels = self.form.pack(torch.zeros(1, self.pipe.vae.config.latent_channels, 2, 2)).shape
        reads, given = self.pipe.transformer.config.in_channels, channels[-1 if len(channels) == 3 else 1]
        if reads != given:
            raise ConfigError(
                f"{self.run.name}.task_options.start_from: its transformer reads {reads} channels, latents "
                f"have {given}; one that also reads pictures (fill, control) is not supported"
            )

    @property
    def adaptable(self) -> Any:
        return self.transformer

    def _open(self, split: Split) -> Pictures | LatentSet:
        """Pictures, or latents of this pipeline's autoencoder.

        Raises:
            ConfigError: cached latents of another one, or of pictures of another size.
        """
        found = open_samples(self.run.data, split)
        if isinstance(found, LatentSet):
            where, facts, config = f"{self.run.name}.data", found.facts, self.autoencoder.config
            own = {"weights_sha256": weights_digest(self.autoencoder)}
            own |= {name: config[name] for name in ("scaling_factor", "shift_factor")}
            if not own.items() <= facts["autoencoder"].items():
                raise ConfigError(
                    f"{where}.path: latents of another autoencoder; `ditkit data cache-latents` with the vae "
                    "folder of the pipeline makes them anew"
                )
            if facts["pictures"]["size"] != self.run.data.size:
                raise ConfigError(f"{where}.size: the latents are of {facts['pictures']['size']} pixels")
        return found

    def _latents(self, pictures: Pictures | LatentSet) -> KeptSamples:
        """The latents of pictures as the transformer sees them."""

        def encode(index: int) -> torch.Tensor:
            if isinstance(pictures, LatentSet):
                return self.form.pack(pictures.latents([index]))
            images = pictures.images([index]).to(self.autoencoder.device)
            return self.form.pack(encode_pictures(self.autoencoder, images))

        return KeptSamples(encode, len(pictures), lambda: self.autoencoder.device, "encoding pictures")

    @property
    def sample_count(self) -> int:
        return len(self.pictures)

    def sample_periods(self) -> list[int] | None:
        return None if isinstance(self.pictures, LatentSet) else periods(self.run.data, self.pictures)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        pictures = self.clean_pictures(indices)
        return self.flow_losses(self.latents[indices], self.tokens[indices], noise, pictures)

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        side = self.run.data.size // self.pipe.vae_scale_factor
        texts = self.captions.given(tokens)
        length, guidance = texts["encoder_hidden_states"].shape[1], self.options.guidance_scale
        return self.transformer(
            hidden_states=noisy,
            timestep=self.form.times * sigma,
            **texts,
            **self.form.more(self.transformer, (side, side), length, guidance),
            return_dict=False,
        )[0]

    def heldout_loss(self) -> dict[str, float]:
        device = self.tokens.device
        if self._heldout is None:
            pictures = self._open("heldout")
            numbers = self.captions.numbers(pictures.captions[:HELD_OUT])
            self._heldout = self._latents(pictures), numbers.to(device)
        latents, tokens = self._heldout
        total = 0.0
        for rows in torch.arange(len(tokens)).split(self.run.batch_size):
            noise = BatchNoise(self.run.seed, 0, len(tokens), rows, device)
            total += len(rows) * float(self.flow_loss(latents[rows], tokens[rows], noise))
        return {"loss": total / len(tokens)}

    def pipeline(self) -> Any:
        """The pipeline of this task's modules."""
        return self.pipe

    def draw(self) -> Image.Image | None:
        if not self.options.preview:
            return None
        self.pipe.set_progress_bar_config(disable=True)
        reads_guidance = self.transformer.config.get("guidance_embeds", False)
        images = self.pipe(
            self.options.preview,
            height=self.run.data.size,
            width=self.run.data.size,
            num_inference_steps=self.options.preview_steps,
            max_sequence_length=self.captions.length,
            **({"guidance_scale": self.options.guidance_scale} if reads_guidance else {}),
            generator=[torch.Generator().manual_seed(i) for i in range(len(self.options.preview))],
            output_type="pt",
        ).images
        return grid(images * 2 - 1, columns=8)


def _initialise(transformer: FluxTransformer2DModel) -> None:
    initialise(transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    norms = [
        getattr(b, name) for b in blocks for name in ("norm", "norm1", "norm1_context") if hasattr(b, name)
    ]
    zero(*(norm.linear for norm in norms), transformer.norm_out.linear, transformer.proj_out)
