"""The interface between the trainer and what it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from ditkit.data.config import Section
from ditkit.models import autoencoder_class, model_folder
from ditkit.training.config import ConfigError, RunConfig
from ditkit.training.optimizers import OwnRate
from ditkit.training.order import BatchNoise


class TaskOptions(Section):
    """A task's own keys (`task_options` in the file)."""


class Task(nn.Module):
    """What is trained: its modules, its data and its loss.

    Parameters with `requires_grad` are trained, averaged (EMA) and checkpointed; whatever the data and the
    options determine is rebuilt at the start instead. `forward` gives the loss of some samples, so that
    wrapping the task for several processes wraps everything that has gradients.
    """

    Options: type[TaskOptions] = TaskOptions
    # Gives the run's averaged parameters by name; the trainer puts its own here when it keeps an average.
    averaged: Callable[[], dict[str, torch.Tensor]] = dict
    takes_objectives: ClassVar[bool] = False

    def __init__(self, run: RunConfig, folder: Path, earlier: dict[str, Path]) -> None:
        """`folder`: this stage's folder. `earlier`: the folders of the stages before it, by name."""
        super().__init__()
        self.run = run
        self.folder = folder
        self.earlier = earlier
        if run.objective and not self.takes_objectives:
            raise ConfigError(
                f"{run.name}.objective: task {run.task!r} has its own loss and takes none "
                f"(got {', '.join(run.objective)})"
            )
        try:
            self.options: Any = self.Options.model_validate(run.task_options)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{run.name}.task_options.{where}: {first['msg']}") from error

    def stage_folder(self, name: str) -> Path:
        """Where an earlier stage exported to.

        Raises:
            ConfigError: there is no such stage before this one.
        """
        if name not in self.earlier:
            raise ConfigError(
                f"{self.run.name}: no stage {name!r} before it (there are: {', '.join(self.earlier)})"
            )
        return self.earlier[name] / "export"

    def model_folder(self, name: str) -> Path:
        """The export of the earlier stage of that name, or the folder at that path.

        Raises:
            ValueError: there is neither.
        """
        folder = self.stage_folder(name) if name in self.earlier else Path(name)
        if not (model_folder(folder) / "config.json").is_file():
            raise ValueError(f"no stage before this one and no model folder (config.json) is called {name!r}")
        return folder

    @property
    def sample_count(self) -> int:
        """Number of training samples."""
        raise NotImplementedError

    def sample_periods(self) -> list[int] | None:
        """In how many epochs each sample comes once; None: in each."""
        return None

    def forward(self, indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
        """Losses of the samples `indices` (B,): scalars, means over the samples; `"loss"` is minimised."""
        raise NotImplementedError

    def own_rates(self) -> list[OwnRate]:
        """Parameters that do not follow the run's learning rate."""
        return []

    def heldout_loss(self) -> dict[str, float]:
        """Losses on samples that are never trained on, with fixed noise; empty when the task has none."""
        return {}

    def draw(self) -> Image.Image | None:
        """A picture that shows the state of the training; None when there is nothing to see."""
        return None

    def export(self, folder: Path) -> None:
        """Save what was trained in its public format (called with the averaged weights in place)."""
        raise NotImplementedError

    def frozen(self, cls: Any, key: str) -> Any:
        """The model that the option `key` names, a stage or a folder, not to be trained.

        Args:
            cls: its class; None: that of an autoencoder of pictures, which its folder names.

        Raises:
            ConfigError: there is neither, or no autoencoder.
        """
        try:
            folder = self.model_folder(getattr(self.options, key))
            return load_frozen(cls or autoencoder_class(folder), folder)
        except ValueError as error:
            raise ConfigError(f"{self.run.name}.task_options.{key}: {error}") from error


def load_frozen(cls: Any, folder: Path) -> Any:
    """The model of that class in a folder, not to be trained."""
    model = cls.from_pretrained(folder).requires_grad_(False).eval()
    model.register_to_config(_name_or_path="")  # no folder of a run in what it exports
    return model
