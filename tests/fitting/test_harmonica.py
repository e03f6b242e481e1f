"""The fit of HarmoniCa's table: what it learns, guidance, resuming, and what it leaves behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import ditkit
import tiny_pipelines
from ditkit import artifact
from ditkit.fitting import run
from ditkit.fitting.errors import FittingError
from ditkit.fitting.harmonica import HarmoniCaFitter, Router, _Course, image_error_proxy, learn
from ditkit.fitting.run import FitData
from ditkit.methods.harmonica import HarmoniCa
from ditkit.pipelines.class_conditional import ClassConditionalPipeline
from tiny_models import TINY

DATA = FitData(("red apple", "green rocket", "blue fish"))


def silent(what: str, done: int, total: int) -> None:
    pass


def fit(pipe: Any, folder: Path, data: FitData = DATA, progress: Any = silent, **options: Any) -> Tensor:
    given = {"steps": 3, "epochs": 2, "batch": 2, "lambda_every": 2, **options}
    run.run(pipe, "harmonica", HarmoniCaFitter(**given), data, folder, progress)
    return artifact.load(folder, "harmonica").tensors["logits"]


def test_what_computing_costs_is_what_is_left_out(tmp_path: Path) -> None:
    """At a price that no error outweighs all is reused, without one nothing more than before."""
    pipe = tiny_pipelines.flux()
    dear = fit(pipe, tmp_path / "dear", epochs=4, lr=3.0, beta=1e3)
    assert bool((dear[1:] == -5).all()) and bool((dear[0] == 5).all())
    method = HarmoniCa(weights=str(tmp_path / "dear"))
    assert method.computed_steps(3) == 1
    with ditkit.apply(pipe, method) as ran:
        pipe("red apple", num_inference_steps=3, output_type="latent")
    assert ran.report().computed_at == [0]
    # Without a price the error alone moves every logit that is learned.
    free = fit(pipe, tmp_path / "free", epochs=2, lr=0.1, beta=0.0)
    assert bool((free != Router.random(3, free.shape[1], 0).logits)[1:].all())
    assert all("_diffusers_hook" not in vars(module) for module in pipe.transformer.modules())
    assert "step" not in vars(pipe.scheduler)
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())


@pytest.mark.usefixtures("interruptible")
def test_a_stopped_fit_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    pipe = tiny_pipelines.flux()
    whole = fit(pipe, tmp_path / "whole", epochs=3, lr=0.1)

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("loss") and done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(pipe, tmp_path / "stopped", epochs=3, lr=0.1, progress=interrupt)
    with pytest.raises(FileNotFoundError, match="not finished"):
        artifact.load(tmp_path / "stopped", "harmonica")
    assert torch.equal(fit(pipe, tmp_path / "stopped", epochs=3, lr=0.1), whole)
    files = sorted(path.name for path in (tmp_path / "stopped").iterdir())
    assert files == ["config.json", "weights.safetensors"]


def test_guidance_by_two_forwards_and_by_a_doubled_batch(tmp_path: Path) -> None:
    pipe = tiny_pipelines.flux()
    logits = [fit(pipe, tmp_path / str(scale), guidance=scale, lr=0.5) for scale in (1.0, 3.0)]
    assert not torch.equal(*logits)
    model = TINY["DiT"].model().requires_grad_(True)
    classes = ClassConditionalPipeline(model, DDIMScheduler(), None)
    classes.set_progress_bar_config(disable=True)
    labels = FitData(("1", "2", "3"))
    found = fit(classes, tmp_path / "classes", labels, guidance=1.5)
    assert found.shape == (3, 6) and bool(found.isfinite().all())
    with pytest.raises(FittingError, match="the prompts must be numbers; got"):
        fit(classes, tmp_path / "words", DATA)


def test_guided_differences() -> None:
    """Guidance is linear: the difference of guided predictions is the guided difference."""
    given, free = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    for pipe, batched in (
        (tiny_pipelines.flux(), torch.cat([free, given])),
        (ClassConditionalPipeline(TINY["DiT"].model(), DDIMScheduler(), None), torch.cat([given, free])),
    ):
        course = object.__new__(_Course)
        course.options, course.pipe = HarmoniCaFitter(batch=2, guidance=3.0), pipe
        for differences in ([given, free], [batched]):
            torch.testing.assert_close(course._guided(differences), free + 3 * (given - free))


def test_the_image_error_proxy_adds_up_one_step_at_a_time() -> None:
    seen: list[Tensor] = []

    def final(scores: Any) -> Tensor:
        seen.append(torch.stack(list(scores)).clone())
        return torch.stack(list(scores)).sum(0)

    scores = torch.tensor([[0.9, 0.9], [0.5, 0.25], [0.0, 1.0]])
    found = image_error_proxy(final, scores)
    assert [int((row < 1).any(1).sum()) for row in seen] == [0, 1, 2]
    assert found == [0.0, pytest.approx((0.5**2 + 0.75**2) / 2), 0.5]


def test_only_the_step_at_hand_moves() -> None:
    router = Router.random(4, 5, seed=1)
    optimizer, before = router.optimizer(0.5), router.logits
    for index in (1, 2, 1):
        student = (router.rows[index].sigmoid() * torch.ones(5)).sum()
        learn(router, optimizer, index, student.expand(3), 1.0, 0.0)
    moved = (router.logits != before).any(1).tolist()
    assert moved == [False, True, True, False]
    assert float(router.logits.abs().max()) <= 5


@pytest.mark.parametrize("options", [{"ablation": "path"}, {"ablation": "lambda"}, {"repeat_batches": True}])
def test_variants_run_and_differ(tmp_path: Path, options: dict[str, Any]) -> None:
    pipe = tiny_pipelines.flux()
    common = {"lr": 0.5, "lambda_every": 1}
    usual = fit(pipe, tmp_path / "usual", **common)
    assert not torch.equal(fit(pipe, tmp_path / "other", **common, **options), usual)


def test_bad_options() -> None:
    for options, words in (
        ({"steps": 1}, "steps must be at least 2; got 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"threshold": 1.0}, "threshold must be in"),
        ({"ablation": "all"}, "ablation must be none, lambda or path; got 'all'"),
    ):
        with pytest.raises(FittingError, match=words):
            HarmoniCaFitter(**options)  # type: ignore[arg-type]
    assert isinstance(Router.random(2, 3, 0), nn.Module)
