"""Fine-tuning for SLA: the model learns to work with sparse attention, and Proj what the linear part adds.

Section 6.1: attention is replaced and the model trained on with the loss it was pre-trained with (there:
2,000 steps of 64 clips, all parameters). Learning rate and weight decay are not stated; AdamW with 1e-5 is
ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit import artifact
from ditkit.fitting.errors import FittingError
from ditkit.fitting.loop import Settings, optimise, trainable
from ditkit.fitting.objective import Objective, predict
from ditkit.fitting.recording import transformer_of
from ditkit.fitting.run import FitData, Progress
from ditkit.fitting.samples import prepare
from ditkit.methods.sla import SLA, FeatureMap, Variant
from ditkit.registry import register
from ditkit.seams.apply import apply
from ditkit.seams.attention import attention_modules
from ditkit.training.order import BatchNoise

METHOD_OPTIONS = ("topk", "variant", "k_low", "feature_map", "block_q", "block_kv", "tile")


@register(
    "fitter",
    "sla",
    summary="fine-tune the model with sparse-linear attention in place, with its own training loss",
    needs=("training",),
)
@dataclass(frozen=True)
class FitSLA:
    """Fine-tune with SLA.

    Args:
        train: `"all"` parameters (the authors'), `"attention"`: those of the attention modules, or `"proj"`
            alone, which the authors found to be too little.
        steps, batch, lr, weight_decay, seed: of the training.
        samples: pictures that are learned from.
        sampling_steps: denoising steps of the pictures that the pipeline draws itself.
        others: as in the method.

    Raises:
        ValueError: an option out of range.
    """

    topk: float = 0.2
    variant: Variant = "v2"
    k_low: float | None = None
    feature_map: FeatureMap = "softmax"
    block_q: int = 64
    block_kv: int = 64
    tile: str | None = None
    train: Literal["all", "attention", "proj"] = "all"
    steps: int = 500
    batch: int = 8
    lr: float = 1e-5
    weight_decay: float = 0.0
    seed: int = 0
    samples: int = 128
    sampling_steps: int = 28

    def __post_init__(self) -> None:
        self.method()
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0; got {self.lr}")
        if min(self.samples, self.steps, self.batch, self.sampling_steps) < 1:
            raise ValueError("samples, steps, batch and sampling_steps must be at least 1")

    def method(self) -> SLA:
        """The method as it is trained."""
        return SLA(**{name: getattr(self, name) for name in METHOD_OPTIONS})

    def fit(self, pipe: Any, data: FitData, folder: Path, progress: Progress) -> None:
        """Fine-tune and save what changed."""
        model = transformer_of(pipe)
        objective = Objective(pipe.scheduler)
        samples = prepare(
            pipe, data, self.samples, folder, progress, steps=self.sampling_steps, seed=self.seed
        )

        def loss(indices: Tensor, noise: BatchNoise) -> dict[str, Tensor]:
            problem = objective.pose(samples.latents[indices], noise)
            return {
                "loss": F.mse_loss(predict(model, samples, indices, problem).float(), problem.target.float())
            }

        settings = Settings(self.steps, self.batch, self._optimizer, seed=self.seed)
        with apply(model, self.method(), count_flops=False), trainable(model, self._names(model)) as trained:
            optimise("fine-tuning", trained.parameters, loss, len(samples), settings, folder, progress)
            options = {name: getattr(self, name) for name in METHOD_OPTIONS}
            artifact.save(folder, "sla", options, artifact.model_facts(model), trained.changed())

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def _names(self, model: nn.Module) -> list[str]:
        """Of the parameters to train, Proj among them."""
        every = [name for name, _ in model.named_parameters()]
        if self.train == "all":
            return every
        if self.train == "proj":
            return [name for name in every if ".proj_l." in name]
        inside = tuple(f"{name}." for name, _, _ in attention_modules(model))
        chosen = [name for name in every if name.startswith(inside)]
        if not chosen:
            raise FittingError(f"{type(model).__name__} has no attention parameters to train")
        return chosen
