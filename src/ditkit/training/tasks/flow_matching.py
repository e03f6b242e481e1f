"""What the text-conditioned tasks share: flow matching on latents, dropped captions, exported pipelines.

x_sigma = (1 - sigma) x0 + sigma eps, target velocity eps - x0, loss mean squared error in float32, sigma
logit-normal. Captions are dropped with probability `caption_dropout` (classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn

from ditkit.processes.transport import Transport
from ditkit.training import objectives
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.base import TaskOptions
from ditkit.training.tasks.denoising import DenoisingTask, Network
from ditkit.training.tasks.forms import time_shift


class FlowMatchingOptions(TaskOptions):
    """`start_from`, in place of the earlier stages and of `transformer`: a pipeline to go on from.
    `max_sequence_length`: tokens that a text is padded to; None: as in a call of the pipeline. `sigma_mean`:
    None: 0, or as the scheduler of the pipeline that it goes on from shifts it. `preview`: captions of the
    sample pictures; `storage`: dtype of the exported weights."""

    autoencoder: str = "autoencoder"
    transformer: dict[str, Any] = {}
    start_from: str | None = None
    max_sequence_length: int | None = Field(default=None, ge=1)
    train_text_encoders: bool = True
    caption_dropout: float = 0.1
    sigma_mean: float | None = None
    sigma_std: float = 1.0
    preview: list[str] = []
    preview_steps: int = 28
    storage: str = "float16"

    @model_validator(mode="after")
    def _one_start(self) -> FlowMatchingOptions:
        if bool(self.transformer) == (self.start_from is not None):
            raise ValueError(
                "give transformer, settings to begin with, or start_from, a pipeline to go on from"
            )
        return self


class FlowMatchingTask(DenoisingTask):
    """A subclass gives `velocity` and `pipeline`, and the buffers `latents` (N, ...) and `no_tokens` (1,),
    the empty caption. Its objectives are `text_objectives`.

    `tokens` (B, 1) are numbers of captions, see `Captions`."""

    denoiser_name = "transformer"
    latents: Any
    no_tokens: torch.Tensor

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The transformer's output for latents `noisy` (B, ...) at `sigma` (B,) under `tokens` (B, 1)."""
        raise NotImplementedError

    def pipeline(self) -> Any:
        """A diffusers pipeline over this task's modules."""
        raise NotImplementedError

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.process = Transport()  # the logit-normal times are drawn here

    def follow(self, scheduler: Any, tokens: int) -> None:
        """Take the mean of sigma's logit from a scheduler, unless the file gives it; see `time_shift`."""
        if self.options.sigma_mean is None:
            mean = 0.0 if self.options.start_from is None else time_shift(scheduler, tokens)
            self.options = self.options.model_copy(update={"sigma_mean": mean})

    def text_objectives(self) -> objectives.Objectives:
        """The objectives of the file; to be called when everything else is there."""

        def example() -> None:
            clean = self.latents[torch.tensor([0])].float()
            self._under(self.no_tokens[None])(clean, torch.zeros(1, device=clean.device))

        return self._objectives(labels=False, example=example)

    def flow_losses(
        self,
        clean: torch.Tensor,
        tokens: torch.Tensor,
        noise: BatchNoise,
        pictures: Callable[[], torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The loss of a training step, with the objectives, and what has a name in it.

        Args:
            clean, tokens: latents (B, ...) and their captions (B, 1).
            pictures: gives what `TrainingStep.pictures` does.
        """
        return self.trained(*self._drawn(clean, tokens, noise, self.objectives), noise, pictures)

    def flow_loss(self, clean: torch.Tensor, tokens: torch.Tensor, noise: BatchNoise) -> torch.Tensor:
        """The loss of latents (B, ...) under tokens (B, 1), without objectives."""
        return self.step(*self._drawn(clean, tokens, noise), noise).losses["loss"].mean()

    def _drawn(
        self,
        clean: torch.Tensor,
        tokens: torch.Tensor,
        noise: BatchNoise,
        chosen: objectives.Objectives | None = None,
    ) -> tuple[Network, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The network under the captions that are not dropped, latents, noise like them and times (B,).

        Objectives that choose the times choose quantiles of sigma.
        """
        options = self.options
        epsilon = noise.normal(*clean.shape[1:])  # like clean
        if chosen is not None and "times" in chosen.owners:
            quantile = 1 - chosen.times(noise.uniform(), noise)  # time 0 is noise, sigma 1
            normal = torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))
        else:
            normal = noise.normal()
        sigma = torch.sigmoid(options.sigma_mean + options.sigma_std * normal)  # (B,)
        dropped = noise.uniform() < options.caption_dropout  # (B,)
        tokens = torch.where(dropped[:, None], self.no_tokens, tokens)
        return self._under(tokens), clean, epsilon, 1 - sigma

    def _under(self, tokens: torch.Tensor) -> Network:
        """The network under captions (B, 1): times run from noise to data here, and so does the velocity."""

        def network(noisy: torch.Tensor, times: torch.Tensor) -> list[torch.Tensor]:
            return [-self.velocity(noisy, 1 - times, tokens).float()]

        return network

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
