"""One run of a comparison: what it will cost, the training with its measurements, what it left behind."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.analysis.compare.config import CompareFile, Contender
from ditkit.analysis.compare.result import Point
from ditkit.analysis.drawing import draw, frequent_labels, resized
from ditkit.analysis.meter import count
from ditkit.analysis.quality import Yardstick
from ditkit.data.pictures import class_labels, grid, open_pictures
from ditkit.files import whole_file, write_text
from ditkit.training.config import ConfigError, RunConfig
from ditkit.training.order import BatchNoise, mix
from ditkit.training.tasks import find
from ditkit.training.trainer import run_stage

SETTINGS = "compare.json"


@dataclass(frozen=True)
class Cost:
    """Parameters of a model, and floating-point operations of one training step of its run."""

    parameters: int
    flops_per_step: int


def training_cost(file: CompareFile, contender: Contender) -> Cost:
    """Build a model and count one training step at the run's batch size: forward, loss and backward pass.

    Not counted are the optimizer, the average of the weights and, as in `ditkit.analysis.meter`, all that is
    no matrix product or convolution. What an architecture computes otherwise it tells itself
    (`hidden_multiply_adds`, of a forward); its backward pass is taken for twice as much.
    """
    run = file.training_run(contender, file.seeds[0], 1)
    torch.manual_seed(run.seed)
    with tempfile.TemporaryDirectory() as folder:
        task: Any = find(run.task)(run, Path(folder), {})
    task.train()
    rows = torch.arange(run.batch_size // run.accumulation)
    noise = BatchNoise(run.seed, 0, len(rows), rows, torch.device("cpu"))
    with count(task) as spent:
        task(rows % task.sample_count, noise)["loss"].backward()
    model = task.model
    hidden = model.hidden_multiply_adds() if hasattr(model, "hidden_multiply_adds") else 0
    flops = spent.flops_everywhere + 3 * 2 * hidden * len(rows)
    return Cost(sum(p.numel() for p in model.parameters()), flops * run.accumulation)


class Measure:
    """Held-out loss and sample quality of a task at a step, with the same noise for every model and seed.

    Figures are prefixed `compared_`; the sample grid is written to `grid-{step}.png` in the task's folder.
    """

    def __init__(self, file: CompareFile) -> None:
        self.evaluation = file.evaluation
        self._yardsticks: dict[tuple[int, ...], Yardstick] = {}
        data = file.training_run(file.models[0], file.seeds[0], 1).data
        labels, self.classes = class_labels(open_pictures(data))
        pictures = open_pictures(data, "all")
        self._images, self._labels = pictures.images(), class_labels(pictures, self.classes)[0]
        self.drawn = frequent_labels(labels, self.evaluation.pictures)  # (pictures,)
        self.shown = torch.arange(len(self.classes)).repeat_interleave(self.evaluation.per_class)

    def true_pictures(self, size: tuple[int, int]) -> Tensor:
        """All pictures of the data, held-out ones too, at the size that is drawn: (N, 3, H, W)."""
        return resized(self._images, size)

    def yardstick(self, size: tuple[int, int]) -> Yardstick:
        """What pictures of that size are compared with."""
        if size not in self._yardsticks:
            self._yardsticks[size] = Yardstick(self.true_pictures(size), self._labels)
        return self._yardsticks[size]

    def __call__(self, task: Any, step: int) -> dict[str, float]:
        evaluation = self.evaluation
        losses = [task.heldout_loss(seed=mix(evaluation.seed, k)) for k in range(evaluation.draws)]
        if evaluation.loss not in losses[0]:
            raise ConfigError(
                f"evaluation.loss: {task.run.name} has no held-out {evaluation.loss!r}, only "
                f"{', '.join(losses[0])}"
            )
        samples = draw(task, torch.cat([self.shown, self.drawn]), mix(evaluation.seed, 1))
        shown, drawn = samples[: len(self.shown)], samples[len(self.shown) :]
        yardstick = self.yardstick((drawn.shape[2], drawn.shape[3]))
        with whole_file(task.folder / f"grid-{step:08d}.png") as part:
            grid(shown, columns=len(shown)).save(part)
        return {
            "compared_loss": sum(loss[evaluation.loss] for loss in losses) / len(losses),
            "compared_distance": yardstick.distance(drawn),
            "compared_recognised": yardstick.recognised(drawn, self.drawn),
        }

    def truth(self, size: tuple[int, int], file: Path) -> dict[str, float]:
        """What true pictures score, of which as many are picked at random as are drawn; some go to `file`."""
        images, generator = self.true_pictures(size), torch.Generator().manual_seed(self.evaluation.seed)
        order = torch.randperm(len(images), generator=generator)
        per_class = self.evaluation.per_class
        shown = [order[self._labels[order] == label][:per_class] for label in range(len(self.classes))]
        with whole_file(file) as part:
            grid(images[torch.cat(shown)], columns=len(self.shown)).save(part)
        yardstick = self.yardstick(size)
        return {
            "distance": yardstick.distance(images[order[: self.evaluation.pictures]]),
            "recognised": yardstick.recognisable(),
        }


def folder_of(file: CompareFile, name: str, seed: int) -> Path:
    """Where a run lives."""
    return file.output / "runs" / name / f"seed-{seed}"


def settings_of(file: CompareFile, run: RunConfig) -> dict[str, Any]:
    """All that a run's figures depend on, as JSON."""
    return {"run": run.model_dump(mode="json"), "evaluation": file.evaluation.model_dump(mode="json")}


def check_settings(file: CompareFile, run: RunConfig, folder: Path) -> None:
    """Refuse to continue a run that was begun with other settings.

    Raises:
        FileExistsError: naming the run and the parts that differ.
    """
    if not (folder / SETTINGS).is_file():
        return
    there, here = json.loads((folder / SETTINGS).read_text(encoding="utf-8")), settings_of(file, run)
    if there != here:
        unlike = [
            f"{part}.{key}"
            for part, keys in here.items()
            for key in keys
            if there[part].get(key) != keys[key]
        ]
        raise FileExistsError(
            f"{folder} holds a run with other settings ({', '.join(unlike)}): choose another output, or "
            "delete that folder"
        )


def execute(file: CompareFile, run: RunConfig, folder: Path, measure: Measure) -> None:
    """Train and measure one run, from where it was left; nothing happens when it is finished."""
    if (folder / "export").is_dir():
        return
    write_text(folder / SETTINGS, json.dumps(settings_of(file, run), indent=1) + "\n")
    run_stage(run, folder, {}, measure)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the export stays


def outcome(folder: Path, flops_per_step: float) -> tuple[list[Point], list[tuple[int, float]]]:
    """What the records of a run say, finished or not: its points, and (step, training loss)."""
    points, losses, seconds = [], [], 0.0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        step = record["step"]
        if "seconds_per_step" in record:
            seconds += record["seconds_per_step"] * (step - (losses[-1][0] if losses else 0))
            losses.append((step, record["loss"]))
        if "compared_loss" in record:
            figures = {name: record[f"compared_{name}"] for name in ("loss", "distance", "recognised")}
            points.append(Point(step, seconds, step * flops_per_step, **figures))
    return points, losses
