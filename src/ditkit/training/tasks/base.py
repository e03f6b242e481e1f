"""The interface between the trainer and what it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from ditkit import hub
from ditkit.data.config import Section
from ditkit.models import autoencoder_class, model_folder
from ditkit.models.dydit import dynamic
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
    # The classes of the data where they are not those of the pipeline that it starts from.
    new_classes: list[str] | None = None
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
    def adaptable(self) -> nn.Module:
        """What an adapter can be put on.

        Raises:
            ConfigError: this task trains nothing of that kind.
        """
        raise ConfigError(f"{self.run.name}.adapter: task {self.run.task!r} has no network to adapt")

    @property
    def sample_count(self) -> int:
        """Number of training samples."""
        raise NotImplementedError

    def sample_periods(self) -> list[int] | None:
        """In how many epochs each sample comes once; None: in each."""
        return None

    def train(self, mode: bool = True) -> Task:
        """What is not trained stays as it is in use, without dropout; objectives see to their own parts."""
        super().train(mode)
        for name, part in self.named_children():
            if name == "objectives":
                continue
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
        return self

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

    def made_dynamic(self, network: Any) -> Any:
        """The network in the form that the option `dynamic` asks for.

        Raises:
            ConfigError: it has no such form.
        """
        if self.options.dynamic is None:
            return network
        try:
            return dynamic(network, **self.options.dynamic)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.run.name}.task_options.dynamic: {error}") from error

    def started(self, *classes: Any) -> Any:
        """The pipeline of one of these classes that the option `start_from` names, an earlier stage, a
        folder, a bundled one or one of the hub, in float32; None when it names none.

        Raises:
            ConfigError: there is none, or it is of another class.
        """
        name = self.options.start_from
        if name is None:
            return None
        where = f"{self.run.name}.task_options.start_from"
        try:
            pipe = hub.load(self.stage_folder(name) if name in self.earlier else name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error
        if not isinstance(pipe, classes):
            known = " or a ".join(cls.__name__ for cls in classes)
            raise ConfigError(f"{where}: {name} is a {type(pipe).__name__}, this task trains a {known}")
        for part in (pipe, pipe.transformer, pipe.vae):
            if part is not None:
                part.register_to_config(_name_or_path="")  # no folder of a run in what it exports
        return pipe


def load_frozen(cls: Any, folder: Path) -> Any:
    """The model of that class in a folder, not to be trained."""
    model = cls.from_pretrained(folder).requires_grad_(False).eval()
    model.register_to_config(_name_or_path="")  # no folder of a run in what it exports
    return model
