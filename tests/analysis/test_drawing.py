"""Pictures that a task draws: the same each time, of classes as frequent as asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ditkit.analysis.drawing import draw, frequent_labels, resized
from ditkit.training.config import RunConfig
from ditkit.training.tasks import find


@pytest.fixture
def task(tmp_path: Path) -> Any:
    """A small one that draws two classes."""
    network = {"patch_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2}
    options = {"arch": "dit", "process": "flow", "pixels": 8, "model": network}
    data = {"groups": ["keycap", "flag"]}
    run = RunConfig.model_validate(
        {"name": "tiny", "task": "class-to-image", "steps": 1, "data": data, "task_options": options}
    )
    torch.manual_seed(0)
    made: Any = find(run.task)(run, tmp_path, {}).eval()
    torch.nn.init.normal_(made.model.final_layer.linear.weight)  # a fresh network predicts nothing
    return made


def test_drawing_is_the_same_each_time_and_takes_the_steps_asked_for(task: Any) -> None:
    labels = torch.tensor([0, 1, 1])
    with torch.no_grad():
        first, second, other = (draw(task, labels, seed, 3) for seed in (1, 1, 2))
        longer = draw(task, labels, 1, 9)
    assert first.shape == (3, 3, 8, 8)
    assert torch.equal(first, second) and not torch.equal(first, other) and not torch.equal(first, longer)


def test_classes_are_as_frequent_as_in_the_data() -> None:
    labels = torch.tensor([2] * 60 + [0] * 30 + [1] * 10)
    assert frequent_labels(labels, 20).bincount().tolist() == [6, 2, 12]


def test_resizing_averages() -> None:
    images = torch.arange(32.0).reshape(1, 2, 4, 4)
    assert resized(images, (2, 2))[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert resized(images, (4, 4)) is images
