"""What the transformer of a pipeline was trained to predict, by its scheduler.

Flow matching: x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0. DDPM: x_t = sqrt(a_t) x0 + sqrt(1 - a_t)
eps, target eps, v = sqrt(a_t) eps - sqrt(1 - a_t) x0, or x0. B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.fitting.errors import FittingError
from ditkit.fitting.recording import first_channels
from ditkit.fitting.samples import Samples
from ditkit.seams.anatomy import describe
from ditkit.training.order import BatchNoise


@dataclass(frozen=True)
class Problem:
    """A batch to denoise: noisy sample (B, ...), the scheduler's time (B,), the target (B, ...)."""

    noisy: Tensor
    time: Tensor
    target: Tensor


class Objective:
    """Noising and target of a scheduler.

    Raises:
        FittingError: a scheduler that is neither of flow matching nor of DDPM.
    """

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.config
        self.kind = str(getattr(config, "prediction_type", None) or "epsilon")
        self.train_steps = int(getattr(config, "num_train_timesteps", 1000))
        self.flow = (
            "FlowMatch" in type(scheduler).__name__
            or bool(getattr(config, "use_flow_sigmas", False))
            or self.kind == "flow_prediction"
        )
        self.shift = float(getattr(config, "shift", None) or getattr(config, "flow_shift", None) or 1.0)
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if not self.flow and alphas is None:
            raise FittingError(f"{type(scheduler).__name__} is neither a flow-matching nor a DDPM scheduler")
        if not self.flow and self.kind not in ("epsilon", "v_prediction", "sample"):
            raise FittingError(f"{type(scheduler).__name__}: prediction_type {self.kind!r} is not known")
        self.alphas = torch.empty(0) if alphas is None else alphas

    def pose(self, clean: Tensor, noise: BatchNoise) -> Problem:
        """Noise a batch at times drawn uniformly over the scheduler's table; all on the device of `noise`."""
        eps = noise.normal(*clean.shape[1:]).to(clean.dtype)
        clean = clean.to(eps.device)
        step = (noise.uniform() * self.train_steps).floor()  # (B,) 0 .. train_steps - 1
        spread = (-1,) + (1,) * (clean.ndim - 1)
        if self.flow:
            u = (step + 1) / self.train_steps
            sigma = self.shift * u / (1 + (self.shift - 1) * u)
            level = sigma.view(spread).to(clean.dtype)
            return Problem((1 - level) * clean + level * eps, sigma * self.train_steps, eps - clean)
        alpha = self.alphas.to(clean.device)[step.long()].view(spread).to(clean.dtype)
        signal, spoil = alpha.sqrt(), (1 - alpha).sqrt()
        targets = {
            "epsilon": lambda: eps,
            "v_prediction": lambda: signal * eps - spoil * clean,
            "sample": lambda: clean,
        }
        return Problem(signal * clean + spoil * eps, step, targets[self.kind]())


def predict(model: nn.Module, samples: Samples, indices: Tensor, problem: Problem) -> Tensor:
    """The transformer's prediction for a batch, (B, ...) like the target."""
    anatomy = describe(model)
    parameter = next(model.parameters())
    arguments = {name: _moved(value, parameter.device) for name, value in samples.arguments(indices).items()}
    output = model(
        **arguments,
        **{
            anatomy.sample: problem.noisy.to(parameter.device, parameter.dtype),
            anatomy.timestep: (problem.time / samples.divisor).to(parameter.device),
        },
        return_dict=False,
    )
    output = output if isinstance(output, Tensor) else output[0]
    return samples.sign * first_channels(output, problem.noisy.shape)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value
