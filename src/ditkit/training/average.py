"""The average of the trained weights: diffusers' `EMAModel` with an update in one pass over the memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class WeightAverage(EMAModel):
    """`average <- average + (1 - decay) (weights - average)`, with diffusers' schedule of the decay."""

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move the average towards the weights, which are all trained."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        # EMAModel makes three passes and two temporaries of each tensor, on a CPU six times the time.
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)
