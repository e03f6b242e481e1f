"""A task of which an adapter of its network is trained in place of the network."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn

from ditkit import registry
from ditkit.adapters import store
from ditkit.training.config import AdapterConfig, ConfigError
from ditkit.training.optimizers import OwnRate
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.base import Task


class Adapted(Task):
    """A task of which an adapter of its network is trained, and exported, alone.

    Parameters of the run's objectives are trained too.

    Raises:
        ConfigError: a task without a network, or an adapter that does not fit it.
    """

    def __init__(self, task: Task, section: AdapterConfig) -> None:
        nn.Module.__init__(self)  # the options are the inner task's
        self.run, self.folder, self.earlier = task.run, task.folder, task.earlier
        self.task = task
        if getattr(task.options, "start_from", None) is None:
            raise ConfigError(f"{self.run.name}.adapter: name the pipeline to adapt, task_options.start_from")
        try:
            self.adapter = registry.construct("adapter", section.kind, section.options)
            store.add(task.adaptable, self.adapter, layers=section.layers, classes=task.new_classes)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{self.run.name}.adapter: {error}") from error
        wanted = {id(parameter) for parameter in task.adaptable.parameters() if parameter.requires_grad}
        for name, parameter in task.named_parameters():
            if id(parameter) not in wanted and not name.startswith("objectives."):
                parameter.requires_grad_(False)
        task.averaged = self._average

    def _average(self) -> dict[str, torch.Tensor]:
        return {name.removeprefix("task."): value for name, value in self.averaged().items()}

    def train(self, mode: bool = True) -> Adapted:
        """What is frozen stays as it is in use, without dropout."""
        super().train(False)
        self.training = mode
        for part in self.task.modules():
            if isinstance(part, BaseTunerLayer):
                part.train(mode)  # pyright: ignore[reportAttributeAccessIssue]
                part.get_base_layer().train(False)
        return self

    @property
    def adaptable(self) -> nn.Module:
        return self.task.adaptable

    @property
    def sample_count(self) -> int:
        return self.task.sample_count

    def sample_periods(self) -> list[int] | None:
        return self.task.sample_periods()

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        return self.task(indices, noise)

    def own_rates(self) -> list[OwnRate]:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.adaptable.named_parameters():
            for part, rate in self.adapter.rates().items():
                if parameter.requires_grad and f".{part}." in name:
                    groups.setdefault(rate, []).append(parameter)
        decay = self.run.optimizer.weight_decay
        return [*self.task.own_rates(), *(OwnRate(group, rate, decay) for rate, group in groups.items())]

    def heldout_loss(self) -> dict[str, float]:
        return self.task.heldout_loss()

    def draw(self) -> Image.Image | None:
        return self.task.draw()

    def export(self, folder: Path) -> None:
        store.save(self.adaptable, folder)
