"""A toy task on which architectures are compared: the bundled emoji at 16 x 16, their five groups as classes.

Variants of an architecture see the same batches, timesteps and noise of a seed, and are judged by their error
on the same noise of the pictures held out, with weights averaged over training. Differences are therefore
taken seed by seed; one is called seed noise where a paired t-test does not tell it from zero at 5 %.

Dimensions: B batch, C channels, H x W picture.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import ttest_rel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from benchmarks import record
from ditkit.data.emoji import GROUPS, EmojiDataset, Split
from ditkit.processes import GaussianDiffusion

SIDE, CHANNELS, CLASSES = 16, 3, len(GROUPS)
RATE, WARM_UP, AVERAGING = 2e-3, 50, 0.98  # learning rate, steps until it is reached, decay of the average
DRAWS = 4  # timesteps and noises of each held-out picture
PROCESS = GaussianDiffusion.create(1000, variance="fixed_small")

# What the constructors of all architectures share; labels are never dropped, nothing is sampled.
CONFIG: dict[str, Any] = {"in_channels": CHANNELS, "num_classes": CLASSES, "class_dropout_prob": 0.0}
# An isotropic transformer of 8 x 8 tokens.
TRANSFORMER: dict[str, Any] = CONFIG | {
    "input_size": SIDE,
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "learn_sigma": False,
}


@dataclass(frozen=True)
class Batch:
    """Pictures (B, C, H, W) in [-1, 1] with labels (B,), timesteps (B,) and noise (B, C, H, W)."""

    pictures: Tensor
    labels: Tensor
    t: Tensor
    noise: Tensor

    @property
    def state(self) -> Tensor:
        return PROCESS.q_sample(self.pictures, self.t, self.noise)


Objective = Callable[[Any, Batch], Tensor]
"""(network, batch) to the loss, a scalar."""


@dataclass(frozen=True)
class Plan:
    """How the variants of a comparison are trained.

    Args:
        steps: of AdamW.
        seeds: of the start and of the batches; at least two.
        batch: pictures in a step.
        points: how often the held-out error is measured in a training, the last time at its end.
    """

    steps: int
    seeds: tuple[int, ...]
    batch: int = 32
    points: int = 2

    def __str__(self) -> str:
        return f"emoji at {SIDE}x{SIDE}, {self.steps} steps of batch {self.batch}, {len(self.seeds)} seeds"


@functools.cache
def pictures(split: Split) -> tuple[Tensor, Tensor]:
    """All pictures (N, C, H, W) and labels (N,) of a split."""
    found = EmojiDataset(split)
    labels = torch.tensor([GROUPS.index(row.group) for row in found.rows])
    whole = found.images()
    return F.avg_pool2d(whole, whole.shape[-1] // SIDE), labels


def batches(plan: Plan, seed: int) -> Iterator[Batch]:
    """The batches of a seed."""
    images, labels = pictures("train")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(plan.steps):
        picked = torch.randint(len(images), (plan.batch,), generator=generator)
        t = torch.randint(PROCESS.num_steps, (plan.batch,), generator=generator)
        noise = torch.randn(plan.batch, CHANNELS, SIDE, SIDE, generator=generator)
        yield Batch(images[picked], labels[picked], t, noise)


@functools.cache
def held_out() -> Batch:
    """Every held-out picture DRAWS times, with timesteps that are spread evenly over the schedule."""
    images, labels = (part.repeat_interleave(DRAWS, dim=0) for part in pictures("heldout"))
    generator = torch.Generator().manual_seed(0)
    place = torch.randperm(len(images), generator=generator)
    t = (place * PROCESS.num_steps / len(images)).long()
    return Batch(images, labels, t, torch.randn(images.shape, generator=generator))


@torch.no_grad()
def errors(model: Any) -> Tensor:
    """What a network's noise prediction misses on the held-out pictures, (N, C, H, W)."""
    batch = held_out()
    parts = zip(*(whole.split(128) for whole in (batch.state, batch.t, batch.labels)), strict=True)
    found = torch.cat([model(state, t, labels).sample[:, :CHANNELS] for state, t, labels in parts])
    return found - batch.noise


def noise_error(model: Any, batch: Batch) -> Tensor:
    """The squared error of the predicted noise."""
    return (model(batch.state, batch.t, batch.labels).sample - batch.noise).square().mean()


@dataclass(frozen=True)
class Trained:
    """A network with averaged weights, its held-out squared error, and that error after some steps."""

    model: Any
    loss: float
    curve: dict[int, float]


def train(model: nn.Module, plan: Plan, seed: int, objective: Objective = noise_error) -> Trained:
    """Train a network in place, where its parameters want gradients, on the batches of a seed."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanting, lr=RATE, weight_decay=0.0, fused=True)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING)).eval()
    curve = {}
    for step, batch in enumerate(batches(plan, seed), start=1):
        loss = objective(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm.step()
        averaged.update_parameters(model)
        if step * plan.points // plan.steps > (step - 1) * plan.points // plan.steps:
            curve[step] = errors(averaged.module).square().mean().item()
    return Trained(averaged.module, curve[plan.steps], curve)


def study(
    variants: Mapping[str, Callable[[], nn.Module]], plan: Plan, objective: Objective = noise_error
) -> dict[str, list[Trained]]:
    """Every variant trained from every seed."""
    found: dict[str, list[Trained]] = {name: [] for name in variants}
    with tqdm(total=len(variants) * len(plan.seeds)) as bar:
        for seed in plan.seeds:
            for name, make in variants.items():
                bar.set_description(f"{name}, seed {seed}")
                torch.manual_seed(seed)
                found[name].append(train(make(), plan, seed, objective))
                bar.update()
                bar.write(f"{name}, seed {seed}: {found[name][-1].loss:.4f}")
    return found


class Nothing(nn.Module):
    """What is put in place of a part that is left out: zeros of its first input's shape."""

    def forward(self, hidden_states: Tensor, *more: Any, **options: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


# --- what is told of the results ----------------------------------------------------------------------


def losses(runs: Sequence[Trained]) -> list[float]:
    return [run.loss for run in runs]


def told(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def compare(
    less: tuple[str, Sequence[float]], more: tuple[str, Sequence[float]], digits: int = 4
) -> tuple[bool, str]:
    """Whether the first values are below the second ones in the mean, and the sentence that tells it."""
    (name, low), (other, high) = less, more
    differences = [b - a for a, b in zip(low, high, strict=True)]
    holds = statistics.mean(differences) > 0
    text = f"{name} {told(low, digits)}, {other} {told(high, digits)}; difference {told(differences, digits)}"
    return holds, f"{text}, {len(low)} seeds{'' if differs(low, high) else ': within seed noise'}"


def differs(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether a paired t-test tells the two apart at 5 %."""
    return bool(ttest_rel(first, second).pvalue < 0.05)


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def arguments(script: str, description: str | None, plan: Plan) -> argparse.ArgumentParser:
    """A parser with the options of all comparisons; `plan_of` reads them."""
    parser = record.arguments(script, description)
    parser.add_argument("--steps", type=int, default=plan.steps, help="of every training")
    parser.add_argument("--seeds", type=int, nargs="+", default=plan.seeds, help="at least two")
    parser.add_argument("--batch", type=int, default=plan.batch, help="pictures in a step")
    parser.set_defaults(points=plan.points)
    return parser


def plan_of(options: argparse.Namespace) -> Plan:
    return Plan(options.steps, tuple(options.seeds), options.batch, options.points)


def write(
    path: Path, claims: list[record.Claim], plan: Plan, found: Mapping[str, Sequence[Trained]], **more: Any
) -> None:
    """Write a result: claims, plan, the errors of every seed and their course, and more figures."""
    figures = {
        name: {"losses": losses(runs), "curves": [run.curve for run in runs]} for name, runs in found.items()
    }
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    record.write(path, claims, machine, plan=asdict(plan), figures=figures, **more)
