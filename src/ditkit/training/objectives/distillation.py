"""Distillation: the student's prediction follows that of a frozen teacher.

"LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation", arXiv 2501.12976: the
student's loss and lambda_1 times the distance of the noise and lambda_2 times that of the raw variance, which
a flow does not have. Any two networks of ours do that take and give the same channels under the same process.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from pydantic import Field

from ditkit import models
from ditkit.data.config import Section
from ditkit.models.base import ClassConditionalModel
from ditkit.models.lit import distillation_losses
from ditkit.registry import Paper, register
from ditkit.training.objectives.base import Objective, Setting, Term, TrainingStep


class DistillationOptions(Section):
    """`teacher`: an earlier stage or a model's folder. Weights: lambda_1 and lambda_2."""

    teacher: str
    noise_weight: float = Field(default=0.5, ge=0)
    variance_weight: float = Field(default=0.05, ge=0)


@register(
    "objective",
    "distillation",
    summary="follows the prediction of a frozen, trained network",
    paper=Paper(
        "LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation", "2501.12976", 2025
    ),
    seam=("terms",),
    needs=("a trained teacher",),
)
class Distillation(Objective):
    Options = DistillationOptions

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__(options, setting)
        folder = setting.find(options.teacher)
        teacher: Any = models.load(folder)
        if not isinstance(teacher, ClassConditionalModel):
            raise ValueError(f"teacher: a {type(teacher).__name__} predicts nothing from noisy samples")
        notes = folder / "process.json"
        _same_training(setting, teacher, json.loads(notes.read_text()) if notes.is_file() else {})
        self.teacher = teacher.requires_grad_(False).eval()
        self.channels = setting.model.in_channels

    def train(self, mode: bool = True) -> Distillation:
        """The teacher stays as it is used."""
        super().train(mode)
        self.teacher.eval()
        return self

    def terms(self, step: TrainingStep) -> dict[str, Term]:
        with torch.no_grad():
            predicted = self.teacher(
                step.noisy, step.model_timestep, step.labels, force_drop_ids=step.dropped, return_dict=False
            )[0].float()
        losses = distillation_losses(step.output, predicted, self.channels)
        terms = {"distilled_noise": Term(losses["distilled_noise"], self.options.noise_weight)}
        if "distilled_variance" in losses:
            terms["distilled_variance"] = Term(losses["distilled_variance"], self.options.variance_weight)
        return terms


def _same_training(setting: Setting, teacher: ClassConditionalModel, notes: dict[str, Any]) -> None:
    """Refuse a teacher that predicts something else than the student is to.

    Args:
        notes: what stands beside the teacher's weights about its training.
    """
    student = setting.model
    pairs = {
        "channels": (teacher.in_channels, student.in_channels),
        "predicted channels": (teacher.predicted_channels, student.predicted_channels),
        "classes": (teacher.y_embedder.num_classes, student.y_embedder.num_classes),
        "null class": (teacher.y_embedder.dropout > 0, student.y_embedder.dropout > 0),
    }
    pairs |= {
        name: (notes[name], value)
        for name, value in setting.facts.items()
        if name in ("process", "classes") and name in notes
    }
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(f"teacher: its {name} are {theirs}, the student's {ours}; they must be the same")
