"""Comparisons, searches and evaluation of pipelines that draw classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from contracts.test_architectures import build
from ditkit.analysis import evaluate_classes as module
from ditkit.analysis.bench import bench, prompts_for
from ditkit.analysis.evaluate_classes import evaluate_classes
from ditkit.analysis.metrics import relative_l2
from ditkit.analysis.sampling import Sampling, sample, some_classes
from ditkit.analysis.tune import split, tune
from ditkit.data.config import DataConfig
from ditkit.models import create
from ditkit.pipelines.class_conditional import ClassConditionalPipeline
from ditkit.pipelines.denoising import scheduler_for
from ditkit.seams.errors import UnsupportedModelError

NAMES = ["ant", "bee", "cat", "dog", "eel"]
SAMPLING = Sampling(steps=8, guidance=2.0, seed=5)


def drawing(network: Any, names: list[str] | None, process: Any = "flow") -> Any:
    learned = network.predicted_channels > network.in_channels
    pipe = ClassConditionalPipeline(network, scheduler_for(process, learned, True), None, names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network(classes: int = 5, learn_sigma: bool = False) -> Any:
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "in_channels": 3}
    torch.manual_seed(0)
    model = create("dit", **sizes, num_classes=classes, learn_sigma=learn_sigma).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def pipe() -> Any:
    return drawing(network(), NAMES)


def by_hand(pipe: Any, labels: list[int], steps: int) -> torch.Tensor:
    """Latents (B, C, H, W) of labels, one call each, from the seeds that the comparisons say they use."""
    parts = [
        pipe(
            label,
            2.0,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(SAMPLING.seed + place),
            output_type="latent",
        ).images
        for place, label in enumerate(labels)
    ]
    return torch.cat(parts)


def test_errors_are_against_dense_sampling_of_the_same_labels_and_seeds(pipe: Any) -> None:
    found = bench(pipe, ["taylorseer:interval=1", "taylorseer:interval=5"], None, sampling=SAMPLING)
    assert found.prompts == ["ant", "bee", "cat", "dog", "eel", "ant", "bee", "cat"]
    rows = {row.kind if row.kind == "dense" else row.label: row for row in found.rows}
    assert rows["taylorseer:interval=1"].latent_error == 0
    assert (rows["taylorseer:interval=5"].latent_error or 0) > 1e-4
    dense = by_hand(pipe, [0, 1, 2, 3, 4, 0, 1, 2], 8)
    (plain,) = [row for row in found.rows if row.kind == "plain"]
    fewer = by_hand(pipe, [0, 1, 2, 3, 4, 0, 1, 2], plain.steps)
    assert plain.latent_error == pytest.approx(relative_l2(fewer, dense), rel=1e-3)
    assert not plain.notes, "this scheduler draws no noise"


def test_other_libraries_caches_run(pipe: Any) -> None:
    found = bench(pipe, ["taylorseer:interval=3"], NAMES[:2], sampling=SAMPLING, repeats=1)
    peers = [row for row in found.rows if row.kind == "peer" and row.label.startswith("diffusers")]
    assert len(peers) == 3 and not any(row.notes for row in peers)
    assert [row.steps_computed for row in peers] == [5, 5, 5]
    again = sample(pipe, NAMES[:2], SAMPLING).latents
    assert again is not None
    torch.testing.assert_close(again, by_hand(pipe, [0, 1], 8), atol=1e-5, rtol=1e-4)


def test_a_scheduler_that_draws_noise_is_told() -> None:
    pipe = drawing(network(learn_sigma=True), NAMES, "gaussian")
    found = bench(pipe, ["taylorseer:interval=5"], NAMES[:2], sampling=SAMPLING, repeats=1, peers=False)
    (plain,) = [row for row in found.rows if row.kind == "plain"]
    assert "DDPMScheduler draws noise at every step" in plain.notes[0]


def test_a_class_that_is_not_there(pipe: Any) -> None:
    with pytest.raises(ValueError, match="no class 'ape'"):
        bench(pipe, [], ["ape"], sampling=SAMPLING)


def test_an_architecture_that_no_method_fits_is_refused_before_any_work(tmp_path: Path) -> None:
    model = build("dico")
    pipe = drawing(model, NAMES, "gaussian")
    with pytest.raises(UnsupportedModelError, match="DiCo is not supported: it has no tokens"):
        tune(pipe, 0.1, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_which_classes_are_drawn(pipe: Any) -> None:
    assert prompts_for(pipe) == some_classes(pipe, 8)
    search, heldout = split(None, pipe)
    assert search == heldout == ["ant", "bee", "cat", "dog", "eel", "ant", "bee", "cat"]
    many = drawing(network(100), None)
    assert some_classes(many, 4) == ["0", "33", "66", "99"]
    search, heldout = split(None, many)
    assert len(set(search) | set(heldout)) == 16 and not set(search) & set(heldout)


def test_a_search(pipe: Any, tmp_path: Path) -> None:
    found = tune(pipe, 0.5, tmp_path, trials=3, sampling=SAMPLING, methods=["taylorseer"], repeats=1)
    assert found.complete and len(found.trials) == 3
    assert found.held is not None and found.held.prompts == split(None, pipe)[1]
    assert (tmp_path / "report.html").is_file() and found.recipe.model.model_class == "DiT"


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes, dark and bright, eight of each."""
    folder = tmp_path_factory.mktemp("colours")
    generator = torch.Generator().manual_seed(0)
    for name, level in (("bright", 200), ("dark", 40)):
        (folder / name).mkdir()
        for number in range(8):
            noise = torch.randint(0, 40, (16, 16, 3), generator=generator)
            Image.fromarray((noise + level).byte().numpy()).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("right", [True, False])
def test_evaluation_knows_the_classes(colours: Path, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that draws the true pictures, or those of the other class."""
    pipe = drawing(network(2), ["bright", "dark"])

    def draw(_: Any, asked: list[str], *__: Any) -> tuple[torch.Tensor, float]:
        levels = {"bright": 0.7, "dark": -0.6}
        other = {"bright": "dark", "dark": "bright"}
        shown = asked if right else [other[name] for name in asked]
        images = torch.tensor([levels[name] for name in shown])[:, None, None, None].expand(-1, 3, 8, 8)
        noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        return images + noise, 1.0

    monkeypatch.setattr(module, "draw", draw)
    data = DataConfig(kind="folder", path=colours)
    found = evaluate_classes(pipe, data, count=12)
    assert found.ceiling == 1.0 and found.recognised == (1.0 if right else 0.0)
    assert found.by_class == {name: (6 if right else 0, 6) for name in ("bright", "dark")}
    assert found.pictures is not None and found.pictures.size == (160, 8)


def test_evaluation_draws(colours: Path) -> None:
    pipe = drawing(network(2), ["bright", "dark"])
    data = DataConfig(kind="folder", path=colours)
    first, again = (evaluate_classes(pipe, data, 6, 2, seed=3) for _ in range(2))
    assert {**first.as_dict(), "seconds": 0} == {**again.as_dict(), "seconds": 0}
    assert sum(asked for _, asked in first.by_class.values()) == 6
    assert evaluate_classes(pipe, data, 3, 1).precision is None


def test_evaluation_refuses(pipe: Any, colours: Path) -> None:
    with pytest.raises(ValueError, match=r"ant, bee, .* give data"):
        evaluate_classes(pipe)
    with pytest.raises(ValueError, match=r"\['bright', 'dark'\] are not among"):
        evaluate_classes(pipe, DataConfig(kind="folder", path=colours))
    with pytest.raises(ValueError, match="count=1"):
        evaluate_classes(pipe, count=1)
