"""The average of the trained weights: diffusers' `EMAModel` with an update in one pass over the memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

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


@contextlib.contextmanager
def in_place(
    module: nn.Module, average: WeightAverage | None, parameters: list[nn.Parameter]
) -> Iterator[None]:
    """`module` in evaluation, with the average, if there is one, in place of its trained parameters."""
    training = module.training
    module.eval()
    if average:
        average.store(parameters)
        average.copy_to(parameters)
    try:
        yield
    finally:
        if average:
            average.restore(parameters)
        module.train(training)
