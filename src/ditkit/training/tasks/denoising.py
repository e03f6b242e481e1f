"""What the tasks share that train a network to take noise away: the file's objectives, and a step with them.

Dimensions: B samples; samples are (B, ...) as the network takes them: pictures, clips or packed tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from ditkit.data.latents import LatentSet
from ditkit.processes.noising import Process, training_losses
from ditkit.seams.taps import reading
from ditkit.training import objectives
from ditkit.training.config import ConfigError
from ditkit.training.objectives import Setting, TrainingStep
from ditkit.training.objectives.base import no_pictures
from ditkit.training.optimizers import OwnRate
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.base import Task

Network = Callable[[Tensor, Tensor], list[Tensor]]
"""`(noised samples, times) -> predictions`, float32: that of the network, behind those at lower resolutions
where it has them. The conditions are those of the step."""


class DenoisingTask(Task):
    """A subclass has the network under `denoiser_name` and sets `process` and `objectives`.

    Attributes:
        denoiser_name: of the attribute that holds the network.
        process: how samples are noised, and what the network predicts.
        objectives: see `_objectives`.
        pictures: the data, or their cached latents; a task of clips has none.
    """

    takes_objectives = True
    denoiser_name: ClassVar[str] = "model"
    process: Process
    objectives: objectives.Objectives
    pictures: Any = None

    @property
    def denoiser(self) -> Any:
        """The network that takes noise away."""
        return getattr(self, self.denoiser_name)

    def own_rates(self) -> list[OwnRate]:
        return self.objectives.own_rates()

    def _objectives(self, facts: Mapping[str, Any] | None = None, **more: Any) -> objectives.Objectives:
        """What the network is always trained with, and what the file asks for.

        Args:
            facts: of the training, beside how many samples it has.
            **more: of the `Setting`.

        Raises:
            ConfigError: one that does not fit.
        """
        setting = Setting(
            self.denoiser,
            self.process,
            self.run.batch_size,
            {"samples": self.sample_count, **(facts or {})},
            self.model_folder,
            averages=self.run.ema is not None,
            pictures=not isinstance(self.pictures, LatentSet),
            **more,
        )
        always = getattr(self.denoiser, "objectives", {})
        try:
            return objectives.create({**always, **self.run.objective}, setting)
        except ValueError as error:
            raise ConfigError(f"{self.run.name}.objective: {error}") from error

    def clean_pictures(self, indices: Tensor) -> Callable[[], Tensor]:
        """Gives the pictures of the samples `indices` (B,); of cached latents there are none."""
        return lambda: self.pictures.images(indices.cpu().numpy()).to(indices.device)

    def trained(
        self,
        network: Network,
        clean: Tensor,
        epsilon: Tensor,
        times: Tensor,
        noise: BatchNoise,
        pictures: Callable[[], Tensor] = no_pictures,
        **labels: Any,
    ) -> dict[str, Tensor]:
        """The loss of a step of training, with the objectives, and what has a name in it.

        Args:
            pictures: what `TrainingStep.pictures` is.
            network, clean, epsilon, times, noise, **labels: see `step`.
        """
        wanted = self.objectives.reads(noise.step, noise.step / self.run.steps)
        with self.objectives.around(self.denoiser, noise), reading(self.denoiser, wanted) as inside:
            step = self.step(network, clean, epsilon, times, noise, **labels)
        seen = {"inside": inside, "pictures": pictures, "averaged": self._averaged_denoiser}
        return self.objectives(dataclasses.replace(step, **seen))

    def step(
        self,
        network: Network,
        clean: Tensor,
        epsilon: Tensor,
        times: Tensor,
        noise: BatchNoise,
        **labels: Any,
    ) -> TrainingStep:
        """The network's prediction and the process's losses.

        Args:
            network: the denoiser under the step's conditions.
            clean, epsilon: samples, and noise like them.
            times: steps of the process, or times of a flow, (B,).
            noise: the draws of the batch, and which rows of it these samples are.
            **labels: `labels` (B,) and those `dropped` (B,), where the conditions are classes.
        """
        seen: list[Any] = []

        def prediction(state: Tensor, t: Tensor) -> Tensor:
            seen[:] = state, t, network(state, t)
            return seen[2][-1]

        def losses() -> dict[str, Tensor]:
            return training_losses(self.process, prediction, clean, epsilon, times)

        first = losses()
        noisy, model_timestep, outputs = seen
        return TrainingStep(
            model=self.denoiser,
            process=self.process,
            step=noise.step,
            progress=noise.step / self.run.steps,
            clean=clean,
            noise=epsilon,
            noisy=noisy,
            timestep=times,
            model_timestep=model_timestep,
            output=outputs[-1],
            outputs=outputs,
            losses=first,
            draws=noise,
            again=losses,
            network=network,
            **labels,
        )

    def _averaged_denoiser(self) -> dict[str, Tensor]:
        """The average of the network's trained parameters, by their names in it; empty without one."""
        prefix = f"{self.denoiser_name}."
        return {
            name.removeprefix(prefix): value
            for name, value in self.averaged().items()
            if name.startswith(prefix)
        }
