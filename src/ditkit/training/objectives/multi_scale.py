"""The loss of a network that predicts at several resolutions: each against the noise at its own.

"Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models and Time-Dependent Layer
Normalization", arXiv 2406.09416; the loss itself is `models.dimr.multi_scale_loss`. A DiMR is always trained
with it; naming it in a file changes its options.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ditkit.data.config import Section
from ditkit.models.dimr import multi_scale_loss
from ditkit.registry import Paper, register
from ditkit.training.objectives.base import Objective, Setting, TrainingStep, gaussian


class MultiScaleOptions(Section):
    """`coefficients`: of each resolution, lowest first (None: the model's); `scale_correction`: whether noise
    at a lower resolution keeps the variance 1."""

    coefficients: list[float] | None = None
    scale_correction: bool = True


@register(
    "objective",
    "multi-scale",
    summary="errors at all resolutions of a network that predicts at several; a dimr's own loss",
    paper=Paper(
        "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models and Time-Dependent "
        "Layer Normalization",
        "2406.09416",
        2024,
    ),
    seam=("error",),
    needs=("a dimr", "process: gaussian"),
)
class MultiScale(Objective):
    Options = MultiScaleOptions
    claims: ClassVar[frozenset[str]] = frozenset({"error"})

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__(options, setting)
        gaussian(setting.process)
        known = getattr(setting.model, "loss_weights", None)
        if known is None:
            raise ValueError(f"a {type(setting.model).__name__} predicts at one resolution; train a dimr")
        self.coefficients = known if options.coefficients is None else options.coefficients
        if len(self.coefficients) != len(known):
            raise ValueError(
                f"coefficients={self.coefficients}: expected one for each of {len(known)} resolutions"
            )

    def error(self, step: TrainingStep) -> Tensor:
        return multi_scale_loss(step.outputs, step.noise, self.coefficients, self.options.scale_correction)
