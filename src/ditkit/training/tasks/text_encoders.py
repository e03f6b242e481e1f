"""Train small CLIP and T5 text encoders to say what the picture of a caption looks like.

Each encoder, through a linear layer that is thrown away afterwards, predicts the principal components of
the caption's picture (scaled to `feature_size` pixels, projected on `components` directions; a component is
divided by the square root of its deviation, so that strong ones lead but weak ones still count). A
transformer that is trained with these encoders starts from texts that are already told apart by what they
show.

CLIP predicts from its pooled output (the state at `</s>`), T5 from the mean of its states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ditkit.data.pictures import need_captions, open_pictures, periods
from ditkit.data.words import END, PAD, word_tokenizer
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.base import Task, TaskOptions


def principal_components(pixels: torch.Tensor, components: int) -> torch.Tensor:
    """(N, components) scores of pixels (N, P), each divided by the square root of its deviation."""
    centred = pixels - pixels.mean(0)
    if len(centred) < centred.shape[1]:  # the smaller of the two Gram matrices has the same scores
        values, directions = torch.linalg.eigh(centred @ centred.T)
        scores = directions.flip(1) * values.flip(0).clamp_min(0).sqrt()
    else:
        _, directions = torch.linalg.eigh(centred.T @ centred)
        scores = centred @ directions.flip(1)
    scores = scores[:, :components]
    return scores / scores.std(0).clamp_min(1e-6).sqrt()


def tokenize(tokenizer: Any, captions: Sequence[str]) -> torch.Tensor:
    """Ids (N, T), padded to the tokenizer's own length."""
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


class TextEncodersOptions(TaskOptions):
    clip: dict[str, Any]
    t5: dict[str, Any]
    max_length: int = 12
    components: int = 256
    feature_size: int = 24


class TextEncodersTask(Task):
    Options = TextEncodersOptions
    text_encoder: Any
    text_encoder_2: Any
    tokens: torch.Tensor
    targets: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = self.options
        self.pictures = open_pictures(self.run.data)
        self.tokenizer = word_tokenizer(need_captions(self.pictures), options.max_length)
        ids: Any = self.tokenizer.convert_tokens_to_ids
        shared: dict[str, Any] = {
            "vocab_size": len(self.tokenizer),
            "pad_token_id": ids(PAD),
            "eos_token_id": ids(END),
        }
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                **shared, bos_token_id=ids(END), max_position_embeddings=options.max_length, **options.clip
            )
        )
        self.text_encoder_2 = T5EncoderModel(T5Config(**shared, **options.t5))
        self.clip_head = nn.Linear(self.text_encoder.config.hidden_size, options.components)
        self.t5_head = nn.Linear(self.text_encoder_2.config.d_model, options.components)
        self.register_buffer("tokens", self._tokenize(), persistent=False)
        self.register_buffer("targets", self._principal_components(), persistent=False)

    def _tokenize(self) -> torch.Tensor:
        return tokenize(self.tokenizer, self.pictures.captions)

    def _principal_components(self) -> torch.Tensor:
        """(N, components) features of every picture."""
        size = self.options.feature_size
        chunks = torch.arange(len(self.pictures)).split(256)
        pixels = torch.cat(
            [
                F.interpolate(self.pictures.images(c.numpy()), size=size, mode="area").flatten(1)
                for c in chunks
            ]
        )
        return principal_components(pixels, self.options.components)

    @property
    def sample_count(self) -> int:
        return len(self.pictures)

    def sample_periods(self) -> list[int] | None:
        return periods(self.run.data, self.pictures)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        tokens, target = self.tokens[indices], self.targets[indices]  # (B, T), (B, components)
        scale = self.targets.square().mean()
        clip = F.mse_loss(self.clip_head(self.text_encoder(tokens).pooler_output).float(), target) / scale
        t5 = (
            F.mse_loss(self.t5_head(self.text_encoder_2(tokens).last_hidden_state.mean(1)).float(), target)
            / scale
        )
        return {"loss": clip + t5, "unexplained_clip": clip, "unexplained_t5": t5}

    def export(self, folder: Path) -> None:
        for name in ("tokenizer", "tokenizer_2"):
            self.tokenizer.save_pretrained(folder / name)
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.text_encoder_2.save_pretrained(folder / "text_encoder_2")
