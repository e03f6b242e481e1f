"""Figures of drawn pictures along a run: best for true pictures, and of the same noise every time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ditkit.analysis.drawing import resized
from ditkit.analysis.inception import WEIGHTS, Inception, InceptionError, inception_score
from ditkit.training.config import ConfigError, EvaluationConfig, load
from ditkit.training.evaluation import Evaluation
from ditkit.training.tasks import find
from ditkit.training.trainer import train

NAMES = {f"evaluation_{name}" for name in ("distance", "precision", "recall", "recognised")}


def rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "evaluation_distance" in row]


def open_task(path: Path) -> Any:
    run = load(path).stages[0]
    torch.manual_seed(0)
    return find(run.task)(run, path.parent, {}).eval()


class Copies:
    """Draws the data's own pictures of the classes asked for, in their order."""

    def __init__(self, task: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.run, self.images, self.labels = task.run, images, labels
        self.drawn = 0

    def sample(self, classes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        places = [(self.labels == label).nonzero()[:, 0] for label in classes]
        self.drawn += len(classes)
        return torch.stack([self.images[place[n % len(place)]] for n, place in enumerate(places)])


def test_along_a_run(training_file, tmp_path):
    train(training_file(evaluation={"every": 4, "pictures": 12, "steps": 3}))
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [4, 6] and set(found[0]) == {"step"} | NAMES
    assert all(row["evaluation_distance"] > 0 for row in found)
    train(training_file("again", evaluation={"every": 4, "pictures": 12, "steps": 3}))
    assert rows(tmp_path / "again") == found


@pytest.mark.parametrize("with_teacher", [False, True])
def test_true_pictures_are_perfect_and_noise_is_not(training_file, vision, with_teacher):
    options = {"every": 1, "pictures": 200, **({"teacher": vision} if with_teacher else {})}
    task = open_task(training_file(evaluation=options))
    evaluation = Evaluation(task.run.evaluation, task)
    images = resized(evaluation._images, (8, 8))
    perfect = evaluation(Copies(task, images, evaluation._labels))
    assert perfect["evaluation_precision"] == 1.0 and perfect["evaluation_distance"] < 0.2
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    poor = evaluation(Copies(task, noise, evaluation._labels))
    assert poor["evaluation_distance"] > 2 * perfect["evaluation_distance"] + 0.2
    assert poor["evaluation_recall"] < perfect["evaluation_recall"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"evaluation": {"every": 1, "teacher": "nowhere"}}, r"evaluation: teacher: .*nowhere"),
        (
            {"evaluation": {"every": 1, "inception": "nowhere"}},
            r"evaluation: no Inception weights at nowhere",
        ),
        ({"evaluation": {"every": 0}}, r"evaluation\.every"),
        ({"evaluation": {"every": 1, "pictures": 3}}, r"pictures=3: more than neighbours=3"),
    ],
)
def test_what_can_not_be_evaluated_is_refused_before_training(training_file, change, reason):
    with pytest.raises(ConfigError, match=reason):
        train(training_file(**change))


def test_what_draws_nothing_is_refused(training_file):
    task: Any = SimpleNamespace(run=open_task(training_file()).run)
    with pytest.raises(ConfigError, match="task 'class-to-image' draws no pictures of classes"):
        Evaluation(EvaluationConfig(every=1), task)


def test_without_the_library_the_error_tells_what_to_install(tmp_path, monkeypatch):
    (tmp_path / WEIGHTS).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InceptionError, match=r"pip install 'ditkit\[fid\]'"):
        Inception(tmp_path)


class Extractor(torch.nn.Module):
    """In the place of torch-fidelity's network: it loads a file by itself and gives outputs of its kind."""

    def __init__(self, name: str, wanted: list[str], weights: Any) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.load(weights, weights_only=True)["scale"])

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert pixels.dtype == torch.uint8
        flat = pixels.float().flatten(1) * self.scale
        return flat[:, :16], flat[:, 16:20]


def in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_fid_and_inception_score_where_network_and_weights_are_at_hand(training_file, tmp_path, monkeypatch):
    torch.save({"scale": torch.tensor(0.01)}, tmp_path / WEIGHTS)
    in_its_place(monkeypatch)
    train(training_file(evaluation={"every": 6, "pictures": 12, "steps": 2, "inception": str(tmp_path)}))
    row = rows(tmp_path / "run")[0]
    assert row["fid"] > 0 and 1 <= row["inception_score"] <= 4


def test_weights_that_are_no_tensors_are_refused(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "canary",)

    torch.save({"scale": Evil()}, tmp_path / WEIGHTS)
    in_its_place(monkeypatch)
    with pytest.raises(InceptionError, match="more than tensors"):
        Inception(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_inception_score_by_hand():
    """Sure and evenly spread over Y classes: Y. The same for all pictures: 1."""
    assert inception_score(torch.eye(4) * 100) == pytest.approx(4.0)
    assert inception_score(torch.zeros(5, 4)) == pytest.approx(1.0)
