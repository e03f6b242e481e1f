"""What the text-conditioned tasks share: flow matching on latents, dropped captions, exported pipelines.

x_sigma = (1 - sigma) x0 + sigma eps, target velocity eps - x0, loss mean squared error in float32, sigma
logit-normal. Captions are dropped with probability `caption_dropout` (classifier-free guidance).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from ditkit.processes.transport import Transport
from ditkit.training import objectives
from ditkit.training.config import ConfigError
from ditkit.training.objectives import Setting, TrainingStep
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.base import Task, TaskOptions
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


class FlowMatchingTask(Task):
    """A subclass gives `velocity` and `pipeline`, and the buffer `no_tokens` (1,): the empty caption.

    `tokens` (B, 1) are numbers of captions, see `Captions`."""

    no_tokens: torch.Tensor

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The transformer's output for latents `noisy` (B, ...) at `sigma` (B,) under `tokens` (B, 1)."""
        raise NotImplementedError

    def pipeline(self) -> Any:
        """A diffusers pipeline over this task's modules."""
        raise NotImplementedError

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.objectives = objectives.Objectives({})

    def follow(self, scheduler: Any, tokens: int) -> None:
        """Take the mean of sigma's logit from a scheduler, unless the file gives it; see `time_shift`."""
        if self.options.sigma_mean is None:
            mean = 0.0 if self.options.start_from is None else time_shift(scheduler, tokens)
            self.options = self.options.model_copy(update={"sigma_mean": mean})

    def plain_objectives(self, model: nn.Module) -> objectives.Objectives:
        """The objectives of the file, which need nothing of a step but the network and its losses.

        Raises:
            ConfigError: one that does not fit.
        """
        try:
            setting = Setting(model, Transport(), self.run.batch_size, averages=self.run.ema is not None)
            chosen = objectives.create(self.run.objective, setting)
            for name, objective in chosen.made.items():
                if not objective.plain:
                    raise ValueError(f"{name}: it is for classes; task {self.run.task!r} does not take it")
        except ValueError as error:
            raise ConfigError(f"{self.run.name}.objective: {error}") from error
        return chosen

    def flow_loss(
        self, clean: torch.Tensor, tokens: torch.Tensor, noise: BatchNoise, rows: int | None = None
    ) -> torch.Tensor:
        """Loss of latents (B, ...) under tokens (B, 1); `rows`: how many of the batch's rows these are."""
        noisy, sigma, target, tokens, _ = self._noised(clean, tokens, noise, rows)
        return F.mse_loss(self.velocity(noisy, sigma, tokens).float(), target)

    def flow_losses(
        self, clean: torch.Tensor, tokens: torch.Tensor, noise: BatchNoise, model: nn.Module
    ) -> dict[str, torch.Tensor]:
        """The loss of a training step, with the objectives on a network, and what has a name in it."""
        if not len(self.objectives):
            return {"loss": self.flow_loss(clean, tokens, noise)}
        noisy, sigma, target, tokens, dropped = self._noised(clean, tokens, noise, chosen=self.objectives)
        seen: list[torch.Tensor] = []

        def losses() -> dict[str, torch.Tensor]:
            seen[:] = [self.velocity(noisy, sigma, tokens).float()]
            return {"loss": (seen[0] - target).square().flatten(1).mean(1)}

        with self.objectives.around(model, noise):
            first = losses()
        step = TrainingStep(
            model=model,
            process=Transport(),
            step=noise.step,
            progress=noise.step / self.run.steps,
            clean=clean,
            noise=target + clean,
            noisy=noisy,
            timestep=1 - sigma,  # ours runs from noise to data, and so does the velocity
            model_timestep=sigma,
            labels=tokens,
            dropped=dropped.long(),
            output=-seen[0],
            outputs=[-seen[0]],
            losses=first,
            draws=noise,
            again=losses,
        )
        return self.objectives(step)

    def _noised(
        self,
        clean: torch.Tensor,
        tokens: torch.Tensor,
        noise: BatchNoise,
        rows: int | None = None,
        chosen: objectives.Objectives | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Noisy latents, sigma (B,), the velocity to be learned, tokens (B, 1) and which were dropped (B,).

        Objectives that choose the times choose quantiles of sigma.
        """
        options = self.options
        epsilon = noise.normal(*clean.shape[1:])[:rows]  # like clean
        if chosen is not None and "times" in chosen.owners:
            quantile = 1 - chosen.times(noise.uniform(), noise)  # time 0 is noise, sigma 1
            normal = torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))
        else:
            normal = noise.normal()[:rows]
        sigma = torch.sigmoid(options.sigma_mean + options.sigma_std * normal)  # (B,)
        dropped = noise.uniform()[:rows] < options.caption_dropout  # (B,)
        tokens = torch.where(dropped[:, None], self.no_tokens, tokens)
        noisy = clean + sigma.view(-1, *[1] * (clean.ndim - 1)) * (epsilon - clean)
        return noisy, sigma, epsilon - clean, tokens, dropped

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
