"""Train a small UMT5 encoder to say what the clip of a caption looks like.

As the text encoders of pictures (`text_encoders`), with another target: the principal components of the
first and the last frame of the caption's clip, drawn with the object's path in the middle. The states of the
words, averaged over the text, predict them through a linear layer that is thrown away afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from ditkit.data.clips import open_clips
from ditkit.data.words import END, PAD, word_tokenizer
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.base import Task, TaskOptions
from ditkit.training.tasks.text_encoders import principal_components, tokenize


class VideoTextEncoderOptions(TaskOptions):
    umt5: dict[str, Any]
    max_length: int = 12
    components: int = 192
    feature_size: int = 20


class VideoTextEncoderTask(Task):
    Options = VideoTextEncoderOptions
    text_encoder: Any
    tokens: torch.Tensor
    targets: torch.Tensor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = self.options
        centred = self.run.data.model_copy(
            update={"motion": self.run.data.motion.model_copy(update={"spread": 0.0})}
        )
        self.clips = open_clips(centred, self.run.seed)
        captions = self.clips.captions()
        self.tokenizer = word_tokenizer(captions, options.max_length)
        ids: Any = self.tokenizer.convert_tokens_to_ids
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(self.tokenizer), pad_token_id=ids(PAD), eos_token_id=ids(END), **options.umt5
            )
        )
        self.register_buffer("tokens", tokenize(self.tokenizer, captions), persistent=False)  # (N, T)
        self.register_buffer("targets", self._targets(), persistent=False)  # (N, components)
        self.head = nn.Linear(self.text_encoder.config.d_model, self.targets.shape[1])

    def _targets(self) -> torch.Tensor:
        ends = []
        for objects, camera in self.clips.scenes():
            video = self.clips.make(objects, camera).video  # (3, F, H, W)
            pair = torch.stack([video[:, 0], video[:, -1]])
            ends.append(F.interpolate(pair, size=self.options.feature_size, mode="area").flatten())
        return principal_components(torch.stack(ends), self.options.components)

    @property
    def sample_count(self) -> int:
        return len(self.tokens)

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        tokens = self.tokens[indices]  # (B, T)
        mask = (tokens != self.text_encoder.config.pad_token_id).long()
        states = self.text_encoder(tokens, mask).last_hidden_state.float()  # (B, T, D)
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        target = self.targets[indices]
        loss = F.mse_loss(self.head(mean).float(), target) / self.targets.square().mean()
        return {"loss": loss}

    def export(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.text_encoder.save_pretrained(folder / "text_encoder")
