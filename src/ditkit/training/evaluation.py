"""Evaluation during training: pictures drawn with the averaged weights against the data's, by small features.

`evaluation:` in a training file turns it on for tasks that draw classes. Figures, beside the held-out loss in
`metrics.jsonl`: `evaluation_distance`, `evaluation_precision`, `evaluation_recall` and
`evaluation_recognised` of `ditkit.analysis.quality`, whose features are hand-made ones or those of a frozen
vision transformer (the mean of its patches' last tokens); `fid` and `inception_score` where the Inception
network's weights are at hand. The noise is the same every time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditkit.analysis.drawing import draw, frequent_labels, resized
from ditkit.analysis.inception import Inception, inception_score
from ditkit.analysis.quality import Yardstick, features, frechet_distance, seen_by
from ditkit.data.config import DataConfig
from ditkit.data.latents import LatentSet
from ditkit.data.pictures import class_labels, open_pictures
from ditkit.models.teachers import load_teacher
from ditkit.training.config import ConfigError, EvaluationConfig
from ditkit.training.order import mix
from ditkit.training.tasks import Task


class Evaluation:
    """Draws and measures; call it with the task in evaluation.

    Args:
        config: what is asked for.
        task: that draws; what it is trained on is compared with. Where that is cached latents, which hold no
            pictures, those they came from (`config.data`); what is drawn is decoded by their autoencoder.

    Raises:
        ConfigError: the task draws no classes, its data are no pictures, or a network is not at hand.
    """

    def __init__(self, config: EvaluationConfig, task: Task) -> None:
        self.config = config
        where = f"{task.run.name}.evaluation"
        if not hasattr(task, "sample"):
            raise ConfigError(f"{where}: task {task.run.task!r} draws no pictures of classes; leave it out")
        source = _true_pictures(config, task, where)
        try:
            self._inception = Inception(config.inception) if config.inception else None
            teacher = load_teacher(config.teacher, task.model_folder) if config.teacher else None
        except (ValueError, OSError) as error:
            raise ConfigError(f"{where}: {error}") from error
        self._look = features if teacher is None else seen_by(teacher)
        pictures = open_pictures(source, "all")
        self._images = pictures.images()
        self._labels = class_labels(pictures, getattr(task, "classes", None))[0]
        self._asked = frequent_labels(self._labels, config.pictures)
        self._yardstick: Yardstick | None = None
        self._true: Tensor | None = None  # Inception's features of the true pictures

    def __call__(self, task: Any) -> dict[str, float]:
        drawn = draw(task, self._asked, mix(task.run.seed, 11), self.config.steps)
        truth = resized(self._images, (drawn.shape[2], drawn.shape[3]))
        if self._yardstick is None:
            self._yardstick = Yardstick(truth, self._labels, self._look)
        precision, recall = self._yardstick.precision_and_recall(drawn, self.config.neighbours)
        figures = {
            "evaluation_distance": self._yardstick.distance(drawn),
            "evaluation_precision": precision,
            "evaluation_recall": recall,
            "evaluation_recognised": self._yardstick.recognised(drawn, self._asked),
        }
        if self._inception is not None:
            if self._true is None:
                self._true = self._inception(truth)[0]
            found, logits = self._inception(drawn)
            figures["fid"] = frechet_distance(found, self._true)
            figures["inception_score"] = inception_score(logits)
        return figures


def _true_pictures(config: EvaluationConfig, task: Task, where: str) -> DataConfig:
    """Where the pictures are that the task is trained on, itself or in latents."""
    latents = getattr(task, "pictures", None)
    if not isinstance(latents, LatentSet):
        if config.data is not None:
            raise ConfigError(f"{where}.data: the run's own data are pictures already; leave it out")
        return task.run.data
    if config.data is None:
        raise ConfigError(
            f"{where}: cached latents have no pictures to compare with: name those that they came from, "
            "evaluation.data: {kind: folder, path: ...}"
        )
    try:
        same = latents.are_of(config.data)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}.data: {error}") from error
    if not same:
        raise ConfigError(
            f"{where}.data: the latents in {latents.folder} came from other pictures "
            f"({latents.facts['pictures']['count']} of kind {latents.facts['pictures']['kind']})"
        )
    return config.data.model_copy(update={"size": latents.facts["pictures"]["size"]})
