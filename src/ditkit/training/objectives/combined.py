"""Several objectives as one: the loss of a step, by the formula in `base`.

They are taken in the order of their names, so that the order in a file changes no bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ditkit.seams.taps import Reading
from ditkit.training.objectives.base import Objective, TrainingStep
from ditkit.training.optimizers import OwnRate
from ditkit.training.order import BatchNoise


class Objectives(nn.Module):
    """The objectives of a run, by name.

    Raises:
        ValueError: two of them claim the same.
    """

    def __init__(self, made: Mapping[str, Objective]) -> None:
        super().__init__()
        self.made = nn.ModuleDict(made)
        owners: dict[str, str] = {}
        for name, objective in made.items():
            for claim in objective.claims:
                if claim in owners:
                    raise ValueError(f"{owners[claim]} and {name} both set the {claim}: choose one of them")
                owners[claim] = name
        self.owners = owners

    def __len__(self) -> int:
        return len(self.made)

    def _items(self) -> list[tuple[str, Objective]]:
        return sorted(self.made.items())  # type: ignore[arg-type]

    def own_rates(self) -> list[OwnRate]:
        """Parameters that do not follow the run's learning rate."""
        rates = []
        for _, objective in self._items():
            parameters = [p for p in objective.parameters() if p.requires_grad]
            if objective.learning_rate is not None and parameters:
                rates.append(OwnRate(parameters, objective.learning_rate))
        return rates

    def reads(self, step: int, progress: float) -> Reading:
        """What all of them together read inside the network."""
        wanted = Reading()
        for _, objective in self._items():
            wanted = wanted | objective.reads(step, progress)
        return wanted

    @contextlib.contextmanager
    def around(self, model: nn.Module, draws: BatchNoise) -> Iterator[None]:
        """What the forward of the network, `model`, runs in."""
        with contextlib.ExitStack() as stack:
            for _, objective in self._items():
                stack.enter_context(objective.around(model, draws))
            yield

    def times(self, uniform: Tensor, draws: BatchNoise) -> Tensor:
        """Where in the schedule the samples lie, (B,) in [0, 1)."""
        owner = self.owners.get("times")
        return uniform if owner is None else dict(self._items())[owner].times(uniform, draws)

    def forward(self, step: TrainingStep) -> dict[str, Tensor]:
        """The loss of the step and all that has a name in it, scalars.

        What the process gives is logged as it is; an objective's error or weighted loss under its name.
        """
        losses, items = step.losses, self._items()
        if not items:
            return {name: value.mean() for name, value in losses.items()}
        named = {name: value.mean() for name, value in losses.items() if name != "loss"}
        split = "mse" in losses
        error, bound = losses["mse" if split else "loss"], losses.get("vb") if split else None
        if owner := self.owners.get("error"):
            error = dict(items)[owner].error(step)
            named[owner] = error.mean()
        weighted = error
        for name, objective in items:
            weight = objective.error_weight(step)
            if weight is not None:
                weighted = weight * weighted
                named[name] = (weight * error).mean()
        sample = weighted if bound is None else weighted + bound
        whole = sample
        for name, objective in items:
            weight = objective.sample_weight(step)
            if weight is not None:
                whole = weight * whole
                named[name] = (weight * sample).mean()
        loss = whole.mean()
        for _, objective in items:
            for name, (value, weight) in objective.terms(step).items():
                named[name] = value.mean()
                loss = loss + weight * named[name]
        return {"loss": loss, **{name: torch.as_tensor(value) for name, value in named.items()}}
