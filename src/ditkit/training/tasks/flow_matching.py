"""What the text-conditioned tasks share: flow matching on latents, dropped captions, exported pipelines.

x_sigma = (1 - sigma) x0 + sigma eps, target velocity eps - x0, loss mean squared error in float32, sigma
logit-normal. Captions are dropped with probability `caption_dropout` (classifier-free guidance).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ditkit.training.order import BatchNoise
from ditkit.training.tasks.base import Task, TaskOptions


class FlowMatchingOptions(TaskOptions):
    """`preview`: captions of the sample pictures; `storage`: dtype of the exported weights."""

    autoencoder: str = "autoencoder"
    transformer: dict[str, Any]
    train_text_encoders: bool = True
    caption_dropout: float = 0.1
    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    preview: list[str] = []
    preview_steps: int = 28
    storage: str = "float16"


class FlowMatchingTask(Task):
    """A subclass gives `velocity` and `pipeline`, and the buffer `no_tokens` (T,): the empty caption."""

    no_tokens: torch.Tensor

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The transformer's output for latents `noisy` (B, ...) at `sigma` (B,) under `tokens` (B, T)."""
        raise NotImplementedError

    def pipeline(self) -> Any:
        """A diffusers pipeline over this task's modules."""
        raise NotImplementedError

    def flow_loss(
        self, clean: torch.Tensor, tokens: torch.Tensor, noise: BatchNoise, rows: int | None = None
    ) -> torch.Tensor:
        """Loss of latents (B, ...) under tokens (B, T); `rows`: how many of the batch's rows these are."""
        options = self.options
        epsilon = noise.normal(*clean.shape[1:])[:rows]  # like clean
        sigma = torch.sigmoid(options.sigma_mean + options.sigma_std * noise.normal()[:rows])  # (B,)
        dropped = noise.uniform()[:rows] < options.caption_dropout  # (B,)
        tokens = torch.where(dropped[:, None], self.no_tokens, tokens)
        noisy = clean + sigma.view(-1, *[1] * (clean.ndim - 1)) * (epsilon - clean)
        return F.mse_loss(self.velocity(noisy, sigma, tokens).float(), epsilon - clean)

    def export(self, folder: Path) -> None:
        pipe = self.pipeline()
        pipe.to(getattr(torch, self.options.storage))
        pipe.save_pretrained(folder)
        pipe.to(torch.float32)


def initialise(transformer: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def zero(*layers: nn.Linear) -> None:
    """Modulations, gates and last projections start at zero (adaLN-Zero)."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
