"""REPA and HASTE: early tokens follow a frozen vision transformer's, and early attention its attention.

REPA, "Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think",
arXiv 2410.06940: L_proj = -mean cos(P(h), z) of the tokens h behind a block, through a perceptron P, and the
teacher's patch tokens z of the clean picture. HASTE, "REPA Works Until It Doesn't: Early-Stopped, Holistic
Alignment Supercharges Diffusion Training", arXiv 2505.16792, adds L_attn, the cross-entropy of attention maps
with the teacher's, and stops both for good at a step; from there on the gradient is the plain one.
Beyond the authors' code: any grid and number of heads, softmax and norms in float32, and after the stop
neither the teacher nor the student's attention maps are computed. Beside text only the image's own tokens
are aligned, and their attention among themselves, as in the authors' code for text. Of a clip each frame of
tokens follows what the teacher sees in one picture, the first of those that the frame covers; its attention
is that among its own tokens (ours: the papers have pictures only).

Dimensions: B samples of F frames (pictures: 1), T tokens of a frame, D width, D_z the teacher's, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ditkit.data.config import Section
from ditkit.models.teachers import Seen, load_teacher, resize
from ditkit.registry import Paper, register
from ditkit.seams.taps import Reading
from ditkit.training.objectives.base import (
    Objective,
    Setting,
    Term,
    TrainingStep,
    readable,
    width_behind,
    without_autocast,
)


def projector(width: int, hidden: int, teacher_width: int) -> nn.Sequential:
    """P: three linear layers with SiLU between, Xavier weights and zero biases; (B, T, D) -> (B, T, D_z)."""
    made = nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
        nn.Linear(hidden, teacher_width),
    )  # fmt: skip
    for layer in made:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return made


def projection_loss(projected: Tensor, tokens: Tensor) -> Tensor:
    """L_proj of projected and teacher's tokens, both (B, T, D_z): (B,)."""
    cosines = F.normalize(projected.float(), dim=-1) * F.normalize(tokens.float(), dim=-1)
    return -cosines.sum(-1).mean(-1)


def attention_loss(logits: Sequence[Tensor], attention: Sequence[Tensor]) -> Tensor:
    """L_attn over pairs of layers: (B,).

    Args:
        logits: the student's before the softmax over keys, (B, h, T, T) each.
        attention: the teacher's after it, (B, h', T, T) each. Heads are paired by index, as many as both
            have.
    """
    losses = []
    for ours, theirs in zip(logits, attention, strict=True):
        heads = min(ours.shape[1], theirs.shape[1])
        entropy = -(theirs[:, :heads].float() * ours[:, :heads].float().log_softmax(-1)).sum(-1)  # (B, h, T)
        losses.append(entropy.mean((1, 2)))
    return torch.stack(losses).mean(0)


def one_for_each_frame(pictures: Tensor, frames: int) -> Tensor:
    """Pictures (B, 3, H', W'), or those of clips (B, 3, F', H', W'), as (B F, 3, H', W').

    Where a frame of tokens covers several of them it is the first.

    Raises:
        ValueError: there are not as many for each frame.
    """
    clips = pictures if pictures.ndim == 5 else pictures.unsqueeze(2)
    each, left = divmod(clips.shape[2], frames)
    if left or not each:
        raise ValueError(f"{clips.shape[2]} pictures of a clip can't be shared by {frames} frames of tokens")
    return clips[:, :, ::each].transpose(1, 2).flatten(0, 1)


class REPAOptions(Section):
    """`teacher`: an earlier stage, a folder, or a repository of the hub; of several the mean is taken.
    `depth`: blocks before the tokens that follow it. `projector`: its hidden width. `weight`: of L_proj.
    `stop_at`: when the alignment ends, as a share of the run, or, above 1, after so many updates; None:
    never. `teacher_pixels`: side of the pictures that the teacher sees, whose tokens are then resized; None:
    chosen so that it has a patch for each token."""

    teacher: str | list[str] = Field(min_length=1)
    depth: int = Field(default=8, ge=1)
    projector: int = Field(default=2048, ge=1)
    weight: float = Field(default=0.5, ge=0)
    stop_at: float | None = Field(default=None, gt=0)
    teacher_pixels: int | None = Field(default=None, ge=1)


class HASTEOptions(REPAOptions):
    """As of `repa`, and: `attention_weight`: of L_attn; 0 leaves it out. `attention_layers`: of the student,
    paired with `teacher_layers`, of the first teacher; all counted from 1."""

    stop_at: float | None = Field(default=250_000, gt=0)
    attention_weight: float = Field(default=0.5, ge=0)
    attention_layers: list[int] = Field(default=[5, 6, 7, 8], min_length=1)
    teacher_layers: list[int] = Field(default=[9, 10, 11, 12], min_length=1)

    @model_validator(mode="after")
    def _pairs(self) -> HASTEOptions:
        if len(self.attention_layers) != len(self.teacher_layers):
            raise ValueError(
                f"attention_layers={self.attention_layers} and teacher_layers={self.teacher_layers} are not "
                "as many"
            )
        if self.attention_weight and self.teacher_pixels:
            raise ValueError("teacher_pixels: attention maps need the same grid; leave it out")
        return self


@register(
    "objective",
    "repa",
    summary="tokens behind an early block follow a frozen vision transformer's",
    paper=Paper(
        "Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think",
        "2410.06940",
        2024,
    ),
    seam=("terms",),
    needs=("a vision transformer as teacher",),
)
class REPA(Objective):
    Options = REPAOptions
    claims: ClassVar[frozenset[str]] = frozenset({"alignment"})
    without_labels: ClassVar[bool] = True

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__(options, setting)
        if not setting.pictures:
            raise ValueError("its teacher looks at the pictures, but the data are cached latents")
        names = [options.teacher] if isinstance(options.teacher, str) else options.teacher
        width = width_behind(setting, options.depth)
        self.teachers = nn.ModuleList(load_teacher(name, setting.find) for name in names)
        made = (projector(width, options.projector, teacher.width) for teacher in self._teachers())
        self.projectors = nn.ModuleList(made)

    def _teachers(self) -> list[Any]:
        return list(self.teachers)

    def aligns(self, step: int, progress: float) -> bool:
        """Whether the alignment goes on after `step` updates, `progress` of the run."""
        stop = self.options.stop_at
        return stop is None or (step < stop if stop > 1 else progress < stop)

    def reads(self, step: int, progress: float) -> Reading:
        return self._wanted() if self.aligns(step, progress) else Reading()

    def _wanted(self) -> Reading:
        return Reading(hidden=frozenset({self.options.depth}))

    def _layers(self) -> list[int]:
        """Of the first teacher, whose attention is wanted."""
        return []

    def terms(self, step: TrainingStep) -> dict[str, Term]:
        if not self.aligns(step.step, step.progress):
            # Processes wait for a gradient of every parameter: these get zero, and the loss does not change.
            idle = 0 * torch.stack([p.sum() for p in self.projectors.parameters()]).sum()
            return {"alignment": Term(idle)}
        frames, rows, columns = step.inside.grid
        pictures = one_for_each_frame(step.pictures(), frames)  # (B F, 3, H', W')
        hidden = step.inside.hidden[self.options.depth]  # (B, F T, D)
        hidden = hidden.unflatten(1, (frames, -1)).flatten(0, 1)  # (B F, T, D)
        losses, seen = [], None
        for index, (teacher, project) in enumerate(zip(self._teachers(), self.projectors, strict=True)):
            view = self._look(teacher, pictures, (rows, columns), [] if index else self._layers())
            tokens = resize(view.tokens, view.grid, (rows, columns))
            losses.append(projection_loss(project(hidden), tokens))  # (B F,)
            seen = seen or view
        assert seen is not None
        alignment = Term(torch.stack(losses).mean(), self.options.weight)
        return {"alignment": alignment, **self._attention_terms(step, seen)}

    def _look(self, teacher: Any, pictures: Tensor, grid: tuple[int, int], layers: list[int]) -> Seen:
        if side := self.options.teacher_pixels:
            grid = (max(side // teacher.patch[0], 1), max(side // teacher.patch[1], 1))
        return teacher(pictures, grid, layers)

    def _attention_terms(self, step: TrainingStep, seen: Seen) -> dict[str, Term]:
        return {}


@register(
    "objective",
    "haste",
    summary="early tokens and attention maps follow a frozen vision transformer's, up to a step",
    paper=Paper(
        "REPA Works Until It Doesn't: Early-Stopped, Holistic Alignment Supercharges Diffusion Training",
        "2505.16792",
        2025,
    ),
    seam=("terms",),
    needs=("a vision transformer as teacher", "softmax attention"),
)
class HASTE(REPA):
    Options = HASTEOptions

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__(options, setting)
        readable(setting.model, self._wanted())
        there = self._teachers()[0].layers
        if wrong := [layer for layer in self._layers() if not 1 <= layer <= there]:
            raise ValueError(
                f"teacher_layers: the teacher has {there} layers, counted from 1; got {wrong[0]}"
            )

    def _layers(self) -> list[int]:
        return self.options.teacher_layers if self.options.attention_weight else []

    def _wanted(self) -> Reading:
        layers = self.options.attention_layers if self.options.attention_weight else []
        return super()._wanted() | Reading(attention=frozenset(layers))

    def _attention_terms(self, step: TrainingStep, seen: Seen) -> dict[str, Term]:
        if not self._layers():
            return {}
        theirs = [seen.attention[layer] for layer in self._layers()]
        frames = step.inside.grid[0]
        maps = [step.inside.attention[layer].of_frames(frames) for layer in self.options.attention_layers]
        with without_autocast(step.clean):
            loss = attention_loss([each.logits() for each in maps], theirs)  # (B F,)
        return {"attention_alignment": Term(loss.mean(), self.options.attention_weight)}
