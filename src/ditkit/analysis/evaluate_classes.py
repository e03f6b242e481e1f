"""How near a class-conditional pipeline's pictures are to the true ones, and to those of the class asked for.

The measures are those of `quality`, as during training: drawn pictures are as frequent by class as true ones.
`recognised` is the share whose nearest true picture is of the class asked for; `ceiling` what true pictures
score, each against all others.

Dimensions: B drawn pictures, N true ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ditkit.analysis.drawing import frequent_labels, resized
from ditkit.analysis.evaluate import draw
from ditkit.analysis.quality import Yardstick
from ditkit.data.config import DataConfig
from ditkit.data.emoji import GROUPS
from ditkit.data.pictures import class_labels, grid, open_pictures


@dataclass
class ClassEvaluation:
    """What was drawn for the classes of a pipeline.

    Args:
        recognised: share of pictures whose nearest true one is of the class asked for.
        ceiling: the same of the true pictures, each against the others.
        distance: Frechet distance by small features over the true pictures' variance; never called FID.
        precision, recall: shares of drawn pictures near a true one, and the other way round; None of too few.
        by_class: class -> (recognised, asked).
        seconds: of all generations together.
        pictures: what was drawn, class after class.
    """

    recognised: float
    ceiling: float
    distance: float
    precision: float | None
    recall: float | None
    by_class: dict[str, tuple[int, int]]
    count: int
    steps: int
    guidance: float | None
    seconds: float
    pictures: Image.Image | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "pictures"}


def evaluate_classes(
    pipe: Any,
    data: DataConfig | None = None,
    count: int = 200,
    steps: int = 28,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 20,
) -> ClassEvaluation:
    """Draw `count` pictures of a pipeline's classes and compare them with true ones.

    Args:
        pipe: a class-conditional pipeline of ours.
        data: the true pictures, of the pipeline's classes; None: the bundled emoji, where they are those.
        count: pictures, at least 2.
        steps, guidance: of the sampling; guidance None is the pipeline's own.
        batch: pictures in one call.

    Raises:
        ValueError: too small a count, or pictures of other classes.
    """
    if count < 2:
        raise ValueError(f"count={count}: at least 2 pictures have a spread to compare")
    classes = pipe.classes
    data = _emoji_of(classes) if data is None else data
    sides = [side * pipe.scale for side in pipe.transformer.latent_size]
    if data.kind != "emoji":  # those have one size
        data = data.model_copy(update={"size": max(8, *sides)})
    pictures = open_pictures(data, "all")
    labels = class_labels(pictures, classes)[0]  # (N,)
    yardstick = Yardstick(resized(pictures.images(), (sides[0], sides[1])), labels)
    asked = frequent_labels(labels, count)  # (B,)
    drawn, seconds = draw(pipe, [classes[label] for label in asked.tolist()], steps, guidance, seed, batch)
    right = yardstick.recognises(drawn, asked)
    enough = min(count, len(labels)) > NEIGHBOURS
    near = yardstick.precision_and_recall(drawn, NEIGHBOURS) if enough else (None, None)
    found = {
        name: (int(right[asked == label].sum()), int((asked == label).sum()))
        for label, name in enumerate(classes)
        if (asked == label).any()
    }
    return ClassEvaluation(
        recognised=float(right.float().mean()),
        ceiling=yardstick.recognisable(),
        distance=yardstick.distance(drawn),
        precision=near[0],
        recall=near[1],
        by_class=found,
        count=count,
        steps=steps,
        guidance=guidance,
        seconds=seconds,
        pictures=grid(drawn, columns=20),
    )


NEIGHBOURS = 3
"""By whose distance a picture reaches, of precision and recall."""


def _emoji_of(classes: list[str]) -> DataConfig:
    """The bundled pictures, where a pipeline's classes are groups of them.

    Raises:
        ValueError: they are not.
    """
    if not set(classes) <= set(GROUPS):
        some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise ValueError(
            f"its classes are {some}, no groups of the bundled emoji: give data (--data), the folder of "
            "pictures that it was trained on"
        )
    return DataConfig(kind="emoji", split="all", groups=list(classes))
