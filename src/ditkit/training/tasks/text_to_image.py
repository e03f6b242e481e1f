"""Train a Flux transformer with flow matching on the latents of captioned pictures.

The text encoders of an earlier stage may train along. Or it goes on from a whole pipeline (`start_from`). The
export is a whole `FluxPipeline` folder.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from pydantic import model_validator
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from ditkit.data.pictures import grid, open_pictures, periods
from ditkit.training.config import ConfigError
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.flow_matching import FlowMatchingOptions, FlowMatchingTask, initialise, zero
from ditkit.training.tasks.latents import encode_pictures
from ditkit.training.tasks.text_encoders import tokenize


class TextToImageOptions(FlowMatchingOptions):
    """`start_from`, in place of the earlier stages and of `transformer`: a pipeline to go on from. `dynamic`:
    options of the routers by which its transformer learns which tokens to run (objective `dydit`)."""

    text_encoders: str = "text_encoders"
    transformer: dict[str, Any] = {}
    start_from: str | None = None
    dynamic: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_start(self) -> TextToImageOptions:
        if self.start_from is None and self.dynamic is not None:
            raise ValueError("dynamic needs start_from, a pipeline with a trained transformer")
        if bool(self.transformer) == (self.start_from is not None):
            raise ValueError(
                "give transformer, settings to begin with, or start_from, a pipeline to go on from"
            )
        return self


class TextToImageTask(FlowMatchingTask):
    Options = TextToImageOptions
    autoencoder: Any
    transformer: Any
    text_encoder: Any
    text_encoder_2: Any
    latents: torch.Tensor
    tokens: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = self.options
        self._open_parts()
        self.text_encoder.requires_grad_(options.train_text_encoders)
        self.text_encoder_2.requires_grad_(options.train_text_encoders)
        self.autoencoder.requires_grad_(False)
        self.pictures = open_pictures(self.run.data)
        self.register_buffer("latents", self._encode(self.pictures), persistent=False)  # (N, L, 4C)
        self.register_buffer(
            "tokens", tokenize(self.tokenizer, self.pictures.captions), persistent=False
        )  # (N, T)
        self.register_buffer("no_tokens", tokenize(self.tokenizer, [""])[0], persistent=False)  # (T,)
        side = self.run.data.size // self._downscale() // 2
        image_ids = torch.zeros(side, side, 3)
        image_ids[..., 1] = torch.arange(side)[:, None]
        image_ids[..., 2] = torch.arange(side)[None]
        self.register_buffer("image_ids", image_ids.reshape(-1, 3), persistent=False)
        self.register_buffer("text_ids", torch.zeros(self.tokenizer.model_max_length, 3), persistent=False)
        self.objectives = self.text_objectives()

    def _open_parts(self) -> None:
        """Tokenizer, text encoders, autoencoder and transformer."""
        options, pipe = self.options, self.started(FluxPipeline)
        if pipe is not None:
            self._check_parts(pipe)
            self.tokenizer, self.autoencoder = pipe.tokenizer, pipe.vae
            self.transformer = self.made_dynamic(pipe.transformer)
            self.text_encoder, self.text_encoder_2 = pipe.text_encoder, pipe.text_encoder_2
            return
        texts = self.stage_folder(options.text_encoders)
        self.tokenizer = AutoTokenizer.from_pretrained(texts / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(texts / "text_encoder")
        self.text_encoder_2 = T5EncoderModel.from_pretrained(texts / "text_encoder_2")
        self.autoencoder = AutoencoderKL.from_pretrained(self.stage_folder(options.autoencoder))
        self.autoencoder.register_to_config(_name_or_path="")  # no folder of a run in what it exports
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * self.autoencoder.config.latent_channels,
            joint_attention_dim=self.text_encoder_2.config.d_model,
            pooled_projection_dim=self.text_encoder.config.hidden_size,
            **options.transformer,
        )
        _initialise(self.transformer)

    def _check_parts(self, pipe: Any) -> None:
        """Refuse a pipeline that this task would not call as it is called in use."""
        where = f"{self.run.name}.task_options.start_from"
        if pipe.transformer.config.guidance_embeds:
            raise ConfigError(
                f"{where}: its transformer reads a guidance scale, which this task does not give"
            )
        if pipe.tokenizer.get_vocab() != pipe.tokenizer_2.get_vocab():
            raise ConfigError(
                f"{where}: its text encoders read words differently; here one tokenizer serves both"
            )

    @property
    def adaptable(self) -> Any:
        return self.transformer

    def _downscale(self) -> int:
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def _encode(self, pictures: Any) -> torch.Tensor:
        """Packed latents (N, H/2 W/2, 4C) of every picture, as `FluxPipeline` packs them."""
        packed = []
        for chunk in torch.arange(len(pictures)).split(64):
            latents = encode_pictures(self.autoencoder, pictures.images(chunk.numpy()))
            packed.append(FluxPipeline._pack_latents(latents, *latents.shape))
        return torch.cat(packed)

    @property
    def sample_count(self) -> int:
        return len(self.pictures)

    def sample_periods(self) -> list[int] | None:
        return periods(self.run.data, self.pictures)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        pictures = self.clean_pictures(indices)
        return self.flow_losses(self.latents[indices], self.tokens[indices], noise, pictures)

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.transformer(
            hidden_states=noisy,
            timestep=sigma,
            encoder_hidden_states=self.text_encoder_2(tokens).last_hidden_state,
            pooled_projections=self.text_encoder(tokens).pooler_output,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]

    def heldout_loss(self) -> dict[str, float]:
        pictures = open_pictures(self.run.data, "heldout")
        rows = torch.arange(len(pictures))
        noise = BatchNoise(self.run.seed, 0, len(pictures), rows, self.latents.device)
        clean, tokens = self._encode(pictures), tokenize(self.tokenizer, pictures.captions)
        return {"loss": float(self.flow_loss(clean, tokens, noise))}

    def pipeline(self) -> FluxPipeline:
        """A `FluxPipeline` over this task's modules."""
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            vae=self.autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer,
            transformer=self.transformer,
        )

    def draw(self) -> Image.Image | None:
        if not self.options.preview:
            return None
        pipe: Any = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            self.options.preview,
            height=self.run.data.size,
            width=self.run.data.size,
            num_inference_steps=self.options.preview_steps,
            max_sequence_length=self.tokenizer.model_max_length,
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
