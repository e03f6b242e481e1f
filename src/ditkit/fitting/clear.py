"""Distillation for CLEAR: the attention projections learn to do with a local window what they did with all.

Section 3.3 and the authors' distill.py: only q, k, v and output projections (and the pooling weights) are
trained, on pictures that the model drew itself, with L = ||v - (eps - x0)||^2 + 0.5 ||v - v_teacher||^2 + 0.5
L_attn. L_attn compares attention outputs, heads merged and before the output projection, in every fourth
layer of the single-stream blocks (of all blocks where a model has only one kind). The authors took 10,000
steps of 32 pictures with Prodigy.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit import artifact
from ditkit.fitting.errors import FittingError
from ditkit.fitting.loop import Settings, optimise, trainable
from ditkit.fitting.objective import Objective, predict
from ditkit.fitting.recording import transformer_of
from ditkit.fitting.run import FitData, Progress
from ditkit.fitting.samples import Samples, prepare
from ditkit.methods.clear import POOLING, LocalWindow
from ditkit.registry import register
from ditkit.seams.anatomy import describe
from ditkit.seams.apply import Host, apply
from ditkit.seams.attention import AttentionCall, AttentionStrategy, Dense, attention_modules
from ditkit.training.order import BatchNoise
from ditkit.training.prodigy import Prodigy

METHOD_OPTIONS = ("radius", "down_factor", "frame_radius")
# Projections of the image stream inside an attention module, by the names diffusers gives them, and ours.
PROJECTIONS = {
    *("to_q", "to_k", "to_v", "to_out", "to_qkv", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("to_query", "to_key", "to_value", "out_layer", "qkv", "proj", "img_attn_qkv", "img_attn_proj"),
}


@register(
    "fitter",
    "local-window",
    summary="distil q, k, v and output projections so that the model draws with a local window as before",
    needs=("training",),
)
@dataclass(frozen=True)
class FitLocalWindow:
    """Distil for a local window.

    Args:
        radius, down_factor, frame_radius: as in the method.
        steps, batch, seed: of the training.
        optimizer: `"prodigy"` (the authors' choice; lr 1 is its own estimate) or `"adamw"`.
        lr: None: 1 for Prodigy, 1e-4 for AdamW.
        weight_decay: decoupled.
        teacher: weight of the distance to the teacher's prediction; 0 leaves it out.
        attention: weight of the distance of attention outputs; 0 leaves it out.
        every: which layers are compared: those whose number it divides.
        samples: pictures that are learned from.
        sampling_steps: denoising steps of the pictures that the pipeline draws itself.

    Raises:
        ValueError: an option out of range.
    """

    radius: float = 8.0
    down_factor: int = 1
    frame_radius: float = float("inf")
    steps: int = 500
    batch: int = 8
    optimizer: Literal["prodigy", "adamw"] = "prodigy"
    lr: float | None = None
    weight_decay: float = 1e-4
    seed: int = 0
    teacher: float = 0.5
    attention: float = 0.5
    every: int = 4
    samples: int = 128
    sampling_steps: int = 28

    def __post_init__(self) -> None:
        self.method()
        if min(self.samples, self.steps, self.batch, self.sampling_steps, self.every) < 1:
            raise ValueError("samples, steps, batch, sampling_steps and every must be at least 1")
        if min(self.teacher, self.attention, self.weight_decay) < 0 or (self.lr is not None and self.lr <= 0):
            raise ValueError("teacher, attention and weight_decay must not be negative, lr must be above 0")

    def method(self) -> LocalWindow:
        """The method as it is trained."""
        return LocalWindow(**{name: getattr(self, name) for name in METHOD_OPTIONS})

    def fit(self, pipe: Any, data: FitData, folder: Path, progress: Progress) -> None:
        """Distil and save what changed."""
        samples = prepare(
            pipe, data, self.samples, folder, progress, steps=self.sampling_steps, seed=self.seed
        )
        with distilling(self, transformer_of(pipe), samples, Objective(pipe.scheduler)) as work:
            settings = Settings(self.steps, self.batch, self._optimizer, seed=self.seed)
            parameters = work.trained.parameters
            optimise("distilling", parameters, work.losses, len(samples), settings, folder, progress)
            pooling = {name: value for name, value in parameters.items() if f".{POOLING}." in name}
            tensors = {
                _authors_name(name): value for name, value in {**pooling, **work.trained.changed()}.items()
            }
            facts = artifact.model_facts(work.model)
            options = {name: getattr(self, name) for name in METHOD_OPTIONS}
            options = {name: value for name, value in options.items() if math.isfinite(value)}
            artifact.save(folder, "local-window", options, facts, tensors)

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "prodigy":
            return Prodigy(parameters, lr=self.lr or 1.0, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, lr=self.lr or 1e-4, weight_decay=self.weight_decay)


def _authors_name(name: str) -> str:
    return name.replace(f".{POOLING}.", ".processor.")


def projections(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained: q, k, v and output of every self- and joint attention."""
    found = []
    for path, kind, module in attention_modules(model):
        if kind != "cross":
            names = [name for name, _ in module.named_parameters() if name.split(".")[0] in PROJECTIONS]
            found += [f"{path}.{name}" for name in names]
    if not found:
        raise FittingError(f"{type(model).__name__} has no attention projections of a known name")
    return found


def tapped_layers(model: nn.Module, every: int) -> list[int]:
    """Which attention layers are compared: among the blocks of the last kind, those that `every` divides; the
    last layer where there is none."""
    own = [name for name, kind, _ in attention_modules(model) if kind != "cross"]
    last = describe(model).stacks[-1].path
    chosen = [i for i, name in enumerate(own) if name.startswith(f"{last}.") and i % every == 0]
    return chosen or [len(own) - 1]


class Taps:
    """A strategy that keeps what another one gives in some layers; each forward replaces the last one's."""

    def __init__(self, inner: AttentionStrategy, layers: list[int]) -> None:
        self.inner = inner
        self.layers = frozenset(layers)
        self.outputs: dict[int, Tensor] = {}

    def plan(self, *arguments: Any) -> Any:
        return self.inner.plan(*arguments)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any, call: AttentionCall, plan: Any
    ) -> Tensor:
        out = self.inner.attend(q, k, v, mask, scale, call, plan)
        if call.layer in self.layers:
            self.outputs[call.layer] = out
        return out


@dataclass(frozen=True)
class _Tapped:
    """A method with taps on its attention strategy; dense attention where there is no method."""

    claims: ClassVar[frozenset[str]] = frozenset({"attention"})

    layers: list[int]
    method: LocalWindow | None
    taps: list[Taps] = field(default_factory=list)

    def attach(self, host: Host) -> None:
        if self.method is None:
            host.attention.use(Dense())
        else:
            self.method.attach(host)
        self.taps.append(Taps(host.attention.strategy, self.layers))
        host.attention.strategy = self.taps[-1]


@dataclass(frozen=True)
class Distillation:
    """A student with a local window and the full-attention teacher that it starts as."""

    options: FitLocalWindow
    model: nn.Module
    teacher: nn.Module
    taps: tuple[Taps, Taps]
    samples: Samples
    objective: Objective
    trained: Any

    def losses(self, indices: Tensor, noise: BatchNoise) -> dict[str, Tensor]:
        """The three terms for a batch, and their sum."""
        problem = self.objective.pose(self.samples.latents[indices], noise)
        velocity = predict(self.model, self.samples, indices, problem).float()
        losses = {"flow": F.mse_loss(velocity, problem.target.float())}
        total = losses["flow"]
        if self.options.teacher or self.options.attention:
            with torch.no_grad():
                wanted = predict(self.teacher, self.samples, indices, problem).float()
            student, teacher = (taps.outputs for taps in self.taps)
            losses["teacher"] = F.mse_loss(velocity, wanted)
            apart = [F.mse_loss(student[layer].float(), teacher[layer].float()) for layer in sorted(teacher)]
            losses["attention"] = torch.stack(apart).mean()
            total = total + self.options.teacher * losses["teacher"]
            total = total + self.options.attention * losses["attention"]
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}


@contextlib.contextmanager
def distilling(
    options: FitLocalWindow,
    model: nn.Module,
    samples: Samples,
    objective: Objective,
    method: LocalWindow | None = None,
) -> Iterator[Distillation]:
    """Student and teacher at work; afterwards the model is as it was.

    Args:
        method: the student's; None: that of the options, at its start.
    """
    layers = tapped_layers(model, options.every)
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    student, full = _Tapped(layers, method or options.method()), _Tapped(layers, None)
    with apply(teacher, full, count_flops=False), apply(model, student, count_flops=False):
        pooling = [name for name, _ in model.named_parameters() if f".{POOLING}." in name]
        with trainable(model, [*projections(model), *pooling]) as trained:
            taps = (student.taps[0], full.taps[0])
            yield Distillation(options, model, teacher, taps, samples, objective, trained)
