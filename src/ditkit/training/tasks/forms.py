"""How the text pipelines of diffusers call their transformers: what a training step has to do alike.

Legend: B pictures or clips, C latent channels, H, W latent height and width, L image tokens, T text tokens,
D width of the text's states, P of a pooled text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

Given = dict[str, Any]
"""Arguments of a transformer by name."""


@dataclass(frozen=True)
class Form:
    """What differs between the classes of pipelines.

    Args:
        texts: `(pipe, captions, length) -> Given`, tensors (B, ...) of captions padded to `length` tokens.
        times: the transformer's time at sigma 1.
        pack: latents (B, C, H, W) as the transformer sees them.
        more: `(transformer, grid, length, guidance) -> Given`, of latents of H x W and texts of T tokens.
        patch: latents a side that make up a token, of a transformer.
    """

    texts: Callable[[Any, list[str], int], Given]
    times: float
    patch: Callable[[Any], int]
    pack: Callable[[Tensor], Tensor] = lambda latents: latents
    more: Callable[[Any, tuple[int, int], int, float], Given] = lambda *_: {}

    def multiple(self, pipe: Any) -> int:
        """Pixels a side of a token, of which a picture's size is a multiple."""
        return 2 ** (len(pipe.vae.config.block_out_channels) - 1) * self.patch(pipe.transformer)


def _flux_texts(pipe: Any, captions: list[str], length: int) -> Given:
    states, pooled, _ = pipe.encode_prompt(captions, max_sequence_length=length)  # (B, T, D), (B, P)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _flux_more(transformer: Any, grid: tuple[int, int], length: int, guidance: float) -> Given:
    height, width = (side // 2 for side in grid)
    places = torch.zeros(height, width, 3, device=transformer.device)
    places[..., 1] = torch.arange(height, device=places.device)[:, None]
    places[..., 2] = torch.arange(width, device=places.device)[None]
    words = torch.zeros(length, 3, device=places.device)
    given = {"img_ids": places.reshape(-1, 3), "txt_ids": words}  # (L, 3), (T, 3)
    if transformer.config.guidance_embeds:
        given["guidance"] = torch.full([1], guidance, device=places.device)
    return given


def _sd3_texts(pipe: Any, captions: list[str], length: int) -> Given:
    states, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _wan_texts(pipe: Any, captions: list[str], length: int) -> Given:
    states, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": states}  # (B, T, D), 0 after the end


FORMS = {
    "FluxPipeline": Form(
        texts=_flux_texts,
        times=1.0,
        patch=lambda transformer: 2,
        pack=lambda latents: FluxPipeline._pack_latents(latents, *latents.shape),  # (B, L, 4 C)
        more=_flux_more,
    ),
    "StableDiffusion3Pipeline": Form(
        texts=_sd3_texts, times=1000.0, patch=lambda transformer: transformer.config.patch_size
    ),
    "WanPipeline": Form(
        texts=_wan_texts, times=1000.0, patch=lambda transformer: transformer.config.patch_size[1]
    ),
}


def form_of(pipe: Any) -> Form:
    """The form of a pipeline of one of the classes in `FORMS`."""
    return next(FORMS[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in FORMS)


def time_shift(scheduler: Any, tokens: int) -> float:
    """The mean of the logit of sigma to which a scheduler's shift moves one of 0.

    A shift s takes sigma to s sigma / (1 + (s - 1) sigma), which adds log s to its logit.

    Args:
        scheduler: of a pipeline.
        tokens: L, by which a dynamic shift goes, along a line.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return math.log(config.get("flow_shift") or config.get("shift") or 1.0)
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    shift = low + (high - low) * (tokens - first) / (last - first)
    return shift if config.get("time_shift_type", "exponential") == "exponential" else math.log(shift)
