"""Train a Wan transformer with flow matching on the latents of captioned clips.

The text encoder of an earlier stage may train along; or it goes on from a whole pipeline (`start_from`), in
batches of clips. Steps of single frames and of whole clips alternate as `windows` says; a single frame is the
beginning of a clip, with the clip's caption. The latents are encoded once and kept beside the autoencoder;
those for a whole pipeline when they are first seen. The export is a whole `WanPipeline` folder.

Steps of thinned clips see some latent frames of each clip, drawn for the step, at their own places in time:
the same motion in a third of the tokens, and so three times the clips.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from PIL import Image
from pydantic import Field
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, UMT5EncoderModel

from ditkit.data.clips import open_clips
from ditkit.data.emoji_motion import EmojiMotion, videos
from ditkit.data.pictures import grid
from ditkit.files import whole_file, write_text
from ditkit.hub import CALL_FILE, call_defaults
from ditkit.training.config import ConfigError
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.captions import Captions
from ditkit.training.tasks.flow_matching import FlowMatchingOptions, FlowMatchingTask, initialise, zero
from ditkit.training.tasks.forms import form_of
from ditkit.training.tasks.kept import KeptSamples
from ditkit.training.tasks.latents import encode_video
from ditkit.training.tasks.windows import Windows

HELD_OUT = 32
GUIDANCE = 2.0


class TextToVideoOptions(FlowMatchingOptions):
    """`clips`: how many there are; `start`: an earlier stage of this task to continue from, else fresh
    weights; `thinned`: share of the steps of whole clips that see only `thinned_frames` of their latent
    frames; `shift`: of the sampling times, towards the noisy end."""

    text_encoder: str = "text_encoder"
    start: str | None = None
    clips: int = Field(default=1000, ge=1)
    windows: Windows = Windows()
    thinned: float = Field(default=0.0, ge=0, le=1)
    thinned_frames: int = Field(default=3, ge=1)
    shift: float = Field(default=1.0, gt=0)


class TextToVideoTask(FlowMatchingTask):
    Options = TextToVideoOptions
    autoencoder: Any
    transformer: Any
    text_encoder: Any
    latents: torch.Tensor | KeptSamples
    tokens: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = self.options
        self.pipe: Any = self.started(WanPipeline)
        self.guidance = GUIDANCE if self.pipe is None else call_defaults(self.pipe)["guidance_scale"]
        if self.pipe is None:
            self.pipe = self._begun()
        self._check_parts()
        self.autoencoder = self.pipe.vae.requires_grad_(False)
        self.text_encoder = self.pipe.text_encoder.requires_grad_(options.train_text_encoders)
        self.transformer = self.pipe.transformer
        self.transformer.rope.forward = partial(self._rotary, self.transformer.rope.forward)
        self._places: list[int] | None = (
            None  # of the latent frames that the transformer sees; None: from 0 on
        )
        self.clips = open_clips(self.run.data, self.run.seed)
        self.frames = max(options.windows.lengths)
        self._hold_latents()
        self.form = form_of(self.pipe)
        self.captions = Captions(
            self.pipe, self.form, options.max_sequence_length, options.train_text_encoders
        )
        captions = [self.clips.scene(i)[2] for i in range(options.clips)]
        self.register_buffer("tokens", self.captions.numbers(captions), persistent=False)  # (N, 1)
        self.register_buffer("no_tokens", self.captions.numbers([""])[0], persistent=False)  # (1,)
        self._heldout: tuple[KeptSamples, torch.Tensor] | None = None
        side = self.run.data.size // self.pipe.vae_scale_factor_spatial
        self.follow(self.pipe.scheduler, self._latent_frames(self.frames) * side**2)
        self.objectives = self.text_objectives()

    def _begun(self) -> WanPipeline:
        """A pipeline of the earlier stages' parts."""
        options = self.options
        texts = self.stage_folder(options.start or options.text_encoder)
        text_encoder: Any = UMT5EncoderModel.from_pretrained(texts / "text_encoder", dtype=torch.float32)
        autoencoder: Any = AutoencoderKLWan.from_pretrained(self.stage_folder(options.autoencoder))
        autoencoder.register_to_config(_name_or_path="")
        return WanPipeline(
            tokenizer=AutoTokenizer.from_pretrained(texts / "tokenizer"),
            text_encoder=text_encoder,
            vae=autoencoder,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=options.shift),
            transformer=self._transformer(autoencoder.config.z_dim, text_encoder.config.d_model),
        )

    def _transformer(self, channels: int, text_dim: int) -> Any:
        options = self.options
        if options.start is not None:
            folder = self.stage_folder(options.start) / "transformer"
            transformer = WanTransformer3DModel.from_pretrained(folder, dtype=torch.float32)
            transformer.register_to_config(_name_or_path="")  # no folder of a run in what it exports
            return transformer
        transformer = WanTransformer3DModel(
            in_channels=channels, out_channels=channels, text_dim=text_dim, **options.transformer
        )
        _initialise(transformer)
        return transformer

    def _check_parts(self) -> None:
        """Refuse a pipeline that does more in a call than this task in a step.

        Raises:
            ConfigError: what it has, and what is supported.
        """
        pipe, reason = self.pipe, None
        if pipe.transformer is None or pipe.transformer_2 is not None:
            reason = "it has another transformer for little noise"
        elif pipe.config.expand_timesteps:
            reason = "its tokens have times of their own"
        elif pipe.transformer.config.in_channels != pipe.vae.config.z_dim:
            reason = "its transformer also reads pictures"
        if reason:
            raise ConfigError(
                f"{self.run.name}.task_options.start_from: {reason}; Wan 2.1's text to video is supported"
            )

    def _hold_latents(self) -> None:
        """`latents`: (N, C, F, H, W) of the clips."""
        options = self.options
        if options.start_from is not None:
            self.latents = self._latents(self.clips, options.clips)
            return
        folder = self.stage_folder(options.autoencoder).parent
        with torch.autocast("cpu", torch.bfloat16, enabled=self.run.precision == "bf16"):
            latents = kept_latents(self.autoencoder, self.clips, options.clips, self.frames, folder)
        self.register_buffer("latents", latents, persistent=False)  # bfloat16

    def _latents(self, clips: EmojiMotion, count: int) -> KeptSamples:
        """The latents of the first clips, each encoded when it is first seen."""

        def encode(index: int) -> torch.Tensor:
            video = clips.clip(index).video[None, :, : self.frames]
            return encode_video(self.autoencoder, video.to(self.autoencoder.device))

        return KeptSamples(encode, count, lambda: self.autoencoder.device, "encoding clips")

    @property
    def adaptable(self) -> Any:
        return self.transformer

    @property
    def sample_count(self) -> int:
        return len(self.latents)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        frames = self.options.windows.length(noise.shared())
        places = list(range(self._latent_frames(frames)))
        if frames == self.frames and noise.shared() < self.options.thinned:
            drawn = torch.tensor([noise.shared() for _ in places]).argsort()[: self.options.thinned_frames]
            places = sorted(drawn.tolist())
            frames = (len(places) - 1) * self.autoencoder.config.scale_factor_temporal + 1
        rows = max(1, len(indices) // frames) if self.options.start_from is None else len(indices)
        indices = indices[:rows]
        latents = self.latents[indices][:, :, places].float()

        def pictures() -> torch.Tensor:
            return self._pictures(indices, places).to(latents.device)

        self._places = places
        try:
            return self.flow_losses(latents, self.tokens[indices], noise.first(rows), pictures)
        finally:
            self._places = None

    def _pictures(self, indices: torch.Tensor, places: list[int]) -> torch.Tensor:
        """Of clips (B,), the first of the frames that each of the latent frames at `places` covers: the
        encoder sees the first frame of a clip alone, (B, 3, F, H', W')."""
        covers = self.autoencoder.config.scale_factor_temporal
        first = [0 if place == 0 else (place - 1) * covers + 1 for place in places]
        return videos([self.clips.clip(int(index)) for index in indices])[:, :, first]

    def _rotary(self, rotary: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The transformer's rotary factors (1, F H W, 1, D), for frames at other places than 0, 1, 2, ..."""
        if self._places is None:
            return rotary(hidden_states)
        last = self._places[-1] + 1
        full = rotary(hidden_states[:, :, :1].expand(-1, -1, last, -1, -1))
        cos, sin = (part.unflatten(1, (last, -1))[:, self._places].flatten(1, 2) for part in full)
        return cos, sin

    def _latent_frames(self, frames: int) -> int:
        return (frames - 1) // self.autoencoder.config.scale_factor_temporal + 1

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.transformer(
            hidden_states=noisy,
            timestep=self.form.times * sigma,
            **self.captions.given(tokens),
            return_dict=False,
        )[0]

    def heldout_loss(self) -> dict[str, float]:
        """Clips of another seed: the same objects at other places."""
        device = self.tokens.device
        if self._heldout is None:
            clips = open_clips(self.run.data, self.run.seed + 1)
            numbers = self.captions.numbers([clips.scene(i)[2] for i in range(HELD_OUT)])
            self._heldout = self._latents(clips, HELD_OUT), numbers.to(device)
        latents, tokens = self._heldout
        total = 0.0
        for rows in torch.arange(HELD_OUT).split(8):
            noise = BatchNoise(self.run.seed, 0, HELD_OUT, rows, device)
            total += len(rows) * float(self.flow_loss(latents[rows], tokens[rows], noise))
        return {"loss": total / HELD_OUT}

    def pipeline(self) -> Any:
        """The `WanPipeline` of this task's modules."""
        return self.pipe

    def export(self, folder: Path) -> None:
        super().export(folder)
        size = self.run.data.size
        call = {"height": size, "width": size, "num_frames": self.frames, "guidance_scale": self.guidance}
        write_text(folder / CALL_FILE, json.dumps(call) + "\n")

    def draw(self) -> Image.Image | None:
        """One row a caption: every other frame."""
        if not self.options.preview:
            return None
        pipe: Any = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        frames = pipe(
            self.options.preview,
            height=self.run.data.size,
            width=self.run.data.size,
            num_frames=self.frames,
            num_inference_steps=self.options.preview_steps,
            guidance_scale=self.guidance,
            max_sequence_length=self.captions.length,
            generator=[torch.Generator().manual_seed(i) for i in range(len(self.options.preview))],
            output_type="pt",
        ).frames[:, ::2]  # (B, F / 2, 3, H, W) in [0, 1]
        return grid(frames.flatten(0, 1) * 2 - 1, columns=frames.shape[1])


def kept_latents(autoencoder: Any, clips: EmojiMotion, count: int, frames: int, folder: Path) -> torch.Tensor:
    """Latents (count, C, F, H, W) of the first clips, bfloat16; from `folder` when they were made before.

    Args:
        frames: how many frames of each clip, from its beginning.
    """
    facts = [count, frames, clips.seed, clips.size, clips.config.model_dump(mode="json")]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    file = folder / f"latents-{name}.safetensors"
    if file.is_file():
        return load_file(file)["latents"]
    latents = _encode(autoencoder, clips, range(count), frames).bfloat16()
    with whole_file(file) as part:
        save_file({"latents": latents}, part)
    return latents


def _encode(autoencoder: Any, clips: EmojiMotion, indices: range, frames: int) -> torch.Tensor:
    device = next(autoencoder.parameters()).device
    batch = max(1, 32 // frames)
    parts = []
    for first in tqdm(indices[::batch], desc="encoding clips", delay=5, mininterval=5):
        video = videos([clips.clip(i) for i in range(first, min(first + batch, indices.stop))])
        parts.append(encode_video(autoencoder, video[:, :, :frames].to(device)).cpu())
    return torch.cat(parts)


def _initialise(transformer: Any) -> None:
    initialise(transformer)
    with torch.no_grad():
        torch.nn.init.xavier_uniform_(transformer.patch_embedding.weight.flatten(1))
        torch.nn.init.zeros_(transformer.patch_embedding.bias)
        for block in transformer.blocks:
            block.scale_shift_table[:, [2, 5]] = 0  # the gates of self-attention and feed-forward
    zero(
        transformer.condition_embedder.time_proj,
        *(block.attn2.to_out[0] for block in transformer.blocks),
        transformer.proj_out,
    )
