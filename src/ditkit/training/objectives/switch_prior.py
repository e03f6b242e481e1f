"""The prior loss of Switch-DiT: experts over time are pulled towards sliding windows.

"Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts", arXiv 2403.09176;
the loss itself is `SwitchDiT.prior_loss`. It is computed in float32 whatever the precision of the run.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ditkit.data.config import Section
from ditkit.models.switch_dit import SwitchDiT
from ditkit.registry import Paper, register
from ditkit.training.objectives.base import (
    Objective,
    Setting,
    Term,
    TrainingStep,
    gaussian,
    without_autocast,
)


class SwitchPriorOptions(Section):
    """`weight` of the loss; the authors' is 1."""

    weight: float = Field(default=1.0, ge=0)


@register(
    "objective",
    "switch-prior",
    summary="pulls the experts that each timestep takes towards sliding windows",
    paper=Paper(
        "Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts",
        "2403.09176",
        2024,
    ),
    seam=("terms",),
    needs=("a switch-dit", "process: gaussian"),
)
class SwitchPrior(Objective):
    Options = SwitchPriorOptions

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__(options, setting)
        if not isinstance(setting.model, SwitchDiT):
            raise ValueError(f"a {type(setting.model).__name__} has no experts; train a switch-dit")
        steps, known = gaussian(setting.process).num_steps, setting.model.config["num_timesteps"]
        if steps != known:
            raise ValueError(f"the model's num_timesteps={known} must be the process's {steps}")

    def terms(self, step: TrainingStep) -> dict[str, Term]:
        generator = step.draws.shared_generator()
        with without_autocast(step.clean):
            loss = step.model.prior_loss(step.timestep, generator)
        return {"switch_prior": Term(loss, self.options.weight)}
