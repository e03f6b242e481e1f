"""Train diffusers' `AutoencoderKLWan` on clips and single frames.

The loss is the autoencoder task's, with the pixels of the objects weighted `1 + object_weight`: most of a
clip is plain ground. It is taken before the decoder's output is clipped to [-1, 1]: clipped, a network that
paints everything white has no gradient left. A step sees windows of one length, see `windows`.

`start` names an earlier stage to continue from: frames first and clips after, as Wan's own was trained.
With `decoder_only` the latents stay what they were, and a transformer that was trained on them stays of use.

At export the mean and deviation of each latent channel over the data go to `latents_mean` and `latents_std`
of the config, where `WanPipeline` looks for them.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, unpatchify
from PIL import Image
from pydantic import Field
from torch import nn

from ditkit.data.clips import open_clips
from ditkit.data.emoji_motion import videos
from ditkit.data.pictures import grid
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.autoencoder import AutoencoderOptions, restoration_losses
from ditkit.training.tasks.base import Task
from ditkit.training.tasks.windows import Windows


class VideoAutoencoderOptions(AutoencoderOptions):
    """`measured_clips`: how many clips the channels' statistics and the held-out loss come from."""

    start: str | None = None
    decoder_only: bool = False
    windows: Windows = Windows(lengths={1: 0.3, 5: 0.5, 17: 0.2})
    object_weight: float = Field(default=4.0, ge=0)
    measured_clips: int = Field(default=64, ge=1)


class VideoAutoencoderTask(Task):
    Options = VideoAutoencoderOptions
    autoencoder: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.clips = open_clips(self.run.data, self.run.seed)
        self.autoencoder = self._autoencoder()
        for module in self.autoencoder.modules():
            if isinstance(module, WanCausalConv3d):
                module.forward = partial(causal_convolution, module)
        set_memory_format(self.autoencoder, torch.channels_last_3d, torch.channels_last)
        if self.options.decoder_only:
            self.autoencoder.encoder.requires_grad_(False)
            self.autoencoder.quant_conv.requires_grad_(False)

    def _autoencoder(self) -> Any:
        if self.options.start is not None:
            autoencoder = AutoencoderKLWan.from_pretrained(self.stage_folder(self.options.start))
            autoencoder.register_to_config(_name_or_path="")  # no folder of a run in what it exports
            return autoencoder
        model: dict[str, Any] = {**self.options.model}
        channels = model.get("z_dim", 16)
        model |= {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
        model["scale_factor_temporal"] = 2 ** sum(model["temperal_downsample"])
        model["scale_factor_spatial"] = (model.get("patch_size") or 1) * 2 ** (len(model["dim_mult"]) - 1)
        autoencoder = AutoencoderKLWan(**model)
        frame_by_frame(autoencoder)
        return autoencoder

    @property
    def sample_count(self) -> int:
        return 2**20

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        frames = self.options.windows.length(noise.shared())
        count = max(1, len(indices) // frames)
        clips = [self.clips.clip(int(i)) for i in indices[:count]]
        starts = [
            int(u * (clip.video.shape[1] - frames + 1))
            for u, clip in zip(noise.uniform(), clips, strict=False)
        ]
        windows = [slice(start, start + frames) for start in starts]
        video = self._on_device(
            torch.stack([clip.video[:, window] for clip, window in zip(clips, windows, strict=True)])
        )  # (B, 3, F, H, W)
        masks = torch.stack([clip.masks.any(0)[window] for clip, window in zip(clips, windows, strict=True)])[
            :, None
        ].to(video)  # (B, 1, F, H, W)
        moments = self.autoencoder.encode(video).latent_dist
        latents = moments.mean + moments.std * noise.normal(*moments.mean.shape[1:])[:count]
        restored = decode_unclipped(self.autoencoder, latents)
        return restoration_losses(
            restored, video, moments, self.options, 1 + self.options.object_weight * masks
        )

    def _on_device(self, video: torch.Tensor) -> torch.Tensor:
        device = next(self.autoencoder.parameters()).device
        return video.to(device, memory_format=torch.channels_last_3d)

    def _restore(self, video: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode(self.autoencoder.encode(video).latent_dist.mean).sample

    def heldout_loss(self) -> dict[str, float]:
        """Whole clips of another seed; `object_psnr` counts the pixels of the objects alone."""
        clips = open_clips(self.run.data, self.run.seed + 1)
        error = inside = pixels = objects = 0.0
        for index in range(self.options.measured_clips):
            clip = clips.clip(index)
            square = (self._restore(self._on_device(clip.video[None]))[0].float().cpu() - clip.video).square()
            mask = clip.masks.any(0).expand_as(square)
            error, pixels = error + float(square.sum()), pixels + square.numel()
            inside, objects = inside + float(square[mask].sum()), objects + int(mask.sum())
        return {
            "psnr": 10 * math.log10(4 * pixels / error),  # pixels span [-1, 1]
            "object_psnr": 10 * math.log10(4 * objects / inside),
        }

    def draw(self) -> Image.Image:
        """Pairs of rows: every other frame of a clip above its reconstruction."""
        rows = []
        for index in range(4):
            video = self.clips.clip(index).video
            restored = self._restore(self._on_device(video[None]))[0].float().cpu()
            rows += [frames[:, ::2].transpose(0, 1) for frames in (video, restored)]  # (F / 2, 3, H, W)
        return grid(torch.cat(rows), columns=len(rows[0]))

    def export(self, folder: Path) -> None:
        if not self.options.decoder_only:
            self._standardise()
        set_memory_format(self.autoencoder, torch.contiguous_format, torch.contiguous_format)
        self.autoencoder.save_pretrained(folder)

    def _standardise(self) -> None:
        batches = [
            self.autoencoder.encode(self._on_device(videos([self.clips.clip(i)]))).latent_dist.mean
            for i in range(self.options.measured_clips)
        ]
        latents = torch.cat(batches).float().transpose(0, 1).flatten(1)  # (C, N)
        self.autoencoder.register_to_config(
            latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist()
        )


def decode_unclipped(autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """`AutoencoderKLWan.decode` without its last step, the clipping to [-1, 1]."""
    autoencoder.clear_cache()
    states, parts = autoencoder.post_quant_conv(latents), []
    for frame in range(latents.shape[2]):
        autoencoder._conv_idx = [0]
        parts.append(
            autoencoder.decoder(
                states[:, :, frame : frame + 1],
                feat_cache=autoencoder._feat_map,
                feat_idx=autoencoder._conv_idx,
                first_chunk=frame == 0,
            )
        )
    autoencoder.clear_cache()
    video = torch.cat(parts, 2)
    return unpatchify(video, autoencoder.config.patch_size) if autoencoder.config.patch_size else video


def causal_convolution(
    layer: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None
) -> torch.Tensor:
    """`WanCausalConv3d.forward`; a first frame, with nothing but zeros before it, as a 2-D convolution."""
    if cache_x is None and x.shape[2] == 1 and layer.stride == (1, 1, 1):
        padding = (int(layer._padding[2]), int(layer._padding[0]))  # rows, columns
        return F.conv2d(x[:, :, 0], layer.weight[:, :, -1], layer.bias, padding=padding)[:, :, None]
    return WanCausalConv3d.forward(layer, x, cache_x)


@torch.no_grad()
def frame_by_frame(autoencoder: Any) -> None:
    """Start as an autoencoder of frames: no convolution looks back, of each pair of frames one is kept.

    Trained on pictures first, the network then codes clips passably before it has seen one.
    """
    for module in autoencoder.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1:
            module.weight[:, :, :-1] = 0
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            repeats = module.time_conv.out_channels // module.time_conv.in_channels
            one = torch.eye(module.time_conv.in_channels).repeat(repeats, 1)
            module.time_conv.weight[:, :, -1] = one[:, :, None, None]
            module.time_conv.bias.zero_()  # pyright: ignore[reportOptionalMemberAccess]


def set_memory_format(model: nn.Module, video: torch.memory_format, image: torch.memory_format) -> None:
    """Lay out the weights of 3-D convolutions as `video` and of 2-D ones as `image`."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            layout = video if isinstance(module, nn.Conv3d) else image
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
