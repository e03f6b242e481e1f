"""Min-SNR: steps with little noise weigh less.

"Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556, section 3.4: the error of a
predicted noise is weighted by min(SNR, k) / SNR, so that on the clean sample it weighs min(SNR, k). The bound
of a learned variance is not weighted, as in the authors' code.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ditkit.data.config import Section
from ditkit.models.dtr import min_snr_weights
from ditkit.registry import Paper, register
from ditkit.training.objectives.base import Objective, Setting, TrainingStep, gaussian


class MinSNROptions(Section):
    """`k`: the signal-to-noise ratio above which steps weigh less."""

    k: float = Field(default=5.0, gt=0)


@register(
    "objective",
    "min-snr",
    summary="steps whose signal-to-noise ratio is above k weigh less",
    paper=Paper("Efficient Diffusion Training via Min-SNR Weighting Strategy", "2303.09556", 2023),
    seam=("error",),
    needs=("process: gaussian",),
)
class MinSNR(Objective):
    Options = MinSNROptions
    without_labels: ClassVar[bool] = True

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__(options, setting)
        self.process = gaussian(setting.process)

    def error_weight(self, step: TrainingStep) -> Tensor:
        return min_snr_weights(self.process, step.timestep, self.options.k)
