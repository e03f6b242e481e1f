"""SRA: early tokens follow the run's own average, looking at less noise, in a later block.

"No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation Guidance by
Themselves", arXiv 2505.02831. The teacher is the averaged network on the same samples with the same noise at
an earlier time t' = t - t_max U(0, 1), under the same conditions, with the same of them dropped; the
student's tokens behind block k_s go through a head and follow the teacher's behind block k_t > k_s. The
authors' code has the paper's smooth L1 with a weight that falls over epochs, and as default the cosine with
weight 0.5, taken along the axis of the tokens (`cosine_over: tokens`); ours is taken of each token's
channels. The teacher's blocks behind k_t do not run.

Times of a flow run from noise (0) to data (1) here, so less noise is a later time.

Dimensions: B samples, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from ditkit.data.config import Section
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.noising import Process, noised
from ditkit.registry import Paper, register
from ditkit.seams.taps import Reading, hidden_after
from ditkit.training.objectives.base import (
    Objective,
    Setting,
    Term,
    TrainingStep,
    readable,
    width_behind,
)

Distance = Literal["cosine", "smooth-l1", "l2", "l1"]


def head(width: int) -> nn.Sequential:
    """The student's head: D to 2 D, SiLU, back to D; Xavier weights and zero biases."""
    made = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
    for layer in made:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return made


def distances(
    student: Tensor, teacher: Tensor, distance: Distance, cosine_over: Literal["features", "tokens"]
) -> Tensor:
    """How far tokens (B, T, D) are from the teacher's: of each number (B, T, D); with the cosine of each
    token (B, T), or of each feature over the tokens (B, D)."""
    student, teacher = student.float(), teacher.float()
    if distance == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=1 if cosine_over == "tokens" else -1)
    if distance == "smooth-l1":
        return F.smooth_l1_loss(student, teacher, beta=0.05, reduction="none")
    difference = student - teacher
    return difference.abs() if distance == "l1" else difference.square()


def falling_weight(first: float, epoch: float, until: float = 149, over: float = 1000) -> float:
    """`first` x 0.1^p; p is 1 up to the epoch `until`, then grows by 1 in `over` epochs."""
    return first * 0.1 ** (1 + max(0.0, epoch - until) / over)


def less_noise(process: Process, times: Tensor, uniform: Tensor, most: float) -> Tensor:
    """The teacher's times, (B,).

    Args:
        times: the student's, steps of the process or times of a flow, (B,).
        uniform: in [0, 1), (B,).
        most: t_max, of the whole schedule.
    """
    if isinstance(process, GaussianDiffusion):
        back = (uniform * round(most * process.num_steps)).long()
        # The authors' bound: the first step has the second as its teacher.
        return (times - back).clamp(1, process.num_steps - 1)
    return (times + most * uniform).clamp(0, 1)


class SRAOptions(Section):
    """`student_block`, `teacher_block`: k_s and k_t, counted from 1. `t_max`: share of the schedule.
    `cosine_over`: each token's `features`, or, as released, the `tokens` of each feature. `weight`: None: 0.5
    for the cosine, for the others 2 (flow) or 0.4 (gaussian) times 0.1^p; p is 1 up to the epoch
    `decay_after` and then grows by 1 in `decay_epochs`."""

    student_block: int = Field(default=4, ge=1)
    teacher_block: int = Field(default=8, ge=1)
    t_max: float = Field(default=0.2, ge=0, le=1)
    distance: Distance = "cosine"
    cosine_over: Literal["features", "tokens"] = "features"
    weight: float | None = Field(default=None, ge=0)
    decay_after: float = Field(default=149, ge=0)
    decay_epochs: float = Field(default=1000, gt=0)

    @model_validator(mode="after")
    def _later(self) -> SRAOptions:
        if self.teacher_block <= self.student_block:
            raise ValueError(
                f"teacher_block={self.teacher_block} must be behind student_block={self.student_block}"
            )
        return self


@register(
    "objective",
    "sra",
    summary="early tokens follow those of the run's average, further on and at less noise",
    paper=Paper(
        "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation "
        "Guidance by Themselves",
        "2505.02831",
        2025,
    ),
    seam=("terms",),
    needs=("ema",),
)
class SRA(Objective):
    Options = SRAOptions
    without_labels: ClassVar[bool] = True

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__(options, setting)
        if not setting.averages:
            raise ValueError("its teacher is the average of the run's parameters: set ema")
        readable(setting.model, Reading(frozenset({options.student_block, options.teacher_block})))
        width = width_behind(setting, options.student_block)
        self.head = head(width)
        self.samples = setting.facts.get("samples", 1)
        self.first_weight = 0.4 if isinstance(setting.process, GaussianDiffusion) else 2.0

    def reads(self, step: int, progress: float) -> Reading:
        return Reading(hidden=frozenset({self.options.student_block}))

    def weight(self, step: TrainingStep) -> float:
        """Of the term in this step."""
        options = self.options
        if options.weight is not None:
            return options.weight
        if options.distance == "cosine":
            return 0.5
        epoch = step.step * step.draws.batch_size // self.samples
        return falling_weight(self.first_weight, epoch, options.decay_after, options.decay_epochs)

    def terms(self, step: TrainingStep) -> dict[str, Term]:
        options = self.options
        student = self.head(step.inside.hidden[options.student_block])
        apart = distances(student, self.teacher_tokens(step), options.distance, options.cosine_over)
        return {"self_alignment": Term(apart.flatten(1).mean(1), self.weight(step))}

    @torch.no_grad()
    def teacher_tokens(self, step: TrainingStep) -> Tensor:
        """What the averaged network has behind its block, (B, T, D)."""
        times = less_noise(step.process, step.timestep, step.draws.uniform(), self.options.t_max)
        at = noised(step.process, step.clean, step.noise, times)
        averaged = {f"model.{name}": value for name, value in step.averaged().items()}
        called, training = _Called(step.model, step.network), step.model.training
        step.model.eval()
        try:
            return hidden_after(
                step.model, self.options.teacher_block, lambda: functional_call(called, averaged, at)
            )
        finally:
            step.model.train(training)


class _Called(nn.Module):
    """A model behind the function that calls it, so that `functional_call` lends it other parameters."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *arguments: Tensor) -> Any:
        return self.call(*arguments)
