"""Uncertainty weighting: groups of timesteps with a learned weight each.

"Addressing Negative Transfer in Diffusion Models", arXiv 2306.00354, in the form in which DTR reports it
(`models.dtr.UncertaintyWeighting`): the i-th part of the whole batch lies in the i-th part of the schedule,
least noise first; the loss is `sum_i (exp(-s_i) l_i + s_i) / 2`, `s` learned at its own rate.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ditkit.data.config import Section
from ditkit.models import dtr
from ditkit.registry import Paper, register
from ditkit.training.objectives.base import Objective, Setting, Term, TrainingStep, gaussian
from ditkit.training.order import BatchNoise


class UncertaintyWeightingOptions(Section):
    """`groups` of timesteps, a divisor of the batch and of the schedule; `lr`: of their weights."""

    groups: int = Field(default=8, ge=1)
    lr: float = Field(default=0.025, gt=0)


@register(
    "objective",
    "uncertainty-weighting",
    summary="groups of timesteps share the batch evenly and have a learned weight each",
    paper=Paper("Addressing Negative Transfer in Diffusion Models", "2306.00354", 2023),
    seam=("times", "sample"),
    needs=("process: gaussian",),
)
class UncertaintyWeighting(Objective):
    Options = UncertaintyWeightingOptions
    claims: ClassVar[frozenset[str]] = frozenset({"times"})
    without_labels: ClassVar[bool] = True

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__(options, setting)
        steps = gaussian(setting.process).num_steps
        if setting.batch_size % options.groups or steps % options.groups:
            raise ValueError(
                f"groups={options.groups} must divide batch_size={setting.batch_size} and the "
                f"{steps} timesteps"
            )
        self.weighting = dtr.UncertaintyWeighting(options.groups)
        self.learning_rate = options.lr

    def times(self, uniform: Tensor, draws: BatchNoise) -> Tensor:
        # In float64: in float32 a number close to 1 would round into the next group.
        return (self._groups(draws, uniform.device) + uniform.double()) / self.options.groups

    def _groups(self, draws: BatchNoise, device: torch.device) -> Tensor:
        """The group of each sample, (B,): that of its row in the whole batch."""
        return (draws.rows * self.options.groups // draws.batch_size).to(device)

    def sample_weight(self, step: TrainingStep) -> Tensor:
        return self.weighting.weights(self._groups(step.draws, step.timestep.device))

    def terms(self, step: TrainingStep) -> dict[str, Term]:
        return {"uncertainty_penalty": Term(self.weighting.penalty())}
