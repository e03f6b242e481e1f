"""Fitting: what is recorded of a pipeline, what lies on disk, stopping and going on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

import tiny_pipelines
from ditkit import artifact, registry
from ditkit.data.emoji import EmojiDataset
from ditkit.fitting import loop, run
from ditkit.fitting.errors import FittingError
from ditkit.fitting.objective import Objective, predict
from ditkit.fitting.recording import first_step
from ditkit.fitting.run import PROGRESS, FitData
from ditkit.fitting.samples import encode_emoji, prepare
from ditkit.seams.errors import SeamError
from ditkit.training.order import BatchNoise
from tiny_models import TINY

PROMPTS = ("red apple", "green rocket", "blue fish")


def silent(what: str, done: int, total: int) -> None:
    pass


def test_artifact_round_trip(tmp_path: Path) -> None:
    model = TINY["FluxTransformer2DModel"].model()
    facts = artifact.model_facts(model)
    assert facts == {
        "class": "FluxTransformer2DModel", "blocks": 4, "attention": 4, "width": [32], "heads": [2],
    }  # fmt: skip
    artifact.save(tmp_path / "a", "sla", {"topk": 0.1}, facts, {"x": torch.arange(3.0)})
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "weights.safetensors"]
    found = artifact.load(tmp_path / "a", "sla")
    assert found.options == {"topk": 0.1} and torch.equal(found.tensors["x"], torch.arange(3.0))
    found.check(model)
    with pytest.raises(SeamError, match=r"FluxTransformer2DModel.*WanTransformer3DModel"):
        found.check(TINY["WanTransformer3DModel"].model())


def test_artifact_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no fit of sla"):
        artifact.load(tmp_path, "sla")
    artifact.save(tmp_path / "a", "sla", {}, {}, {"x": torch.zeros(1)})
    with pytest.raises(artifact.ArtifactError, match="is a fit of sla, not of harmonica"):
        artifact.load(tmp_path / "a", "harmonica")
    weights = tmp_path / "a" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(artifact.ArtifactError, match="is not the file"):
        artifact.load(tmp_path / "a", "sla")


@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())
def test_facts_of_every_class(tiny: Any) -> None:
    facts = artifact.model_facts(tiny.model())
    assert facts["heads"][0] >= 1 and facts["width"][0] >= 8 and facts["attention"] >= facts["blocks"] >= 1


def test_the_pipeline_is_recorded() -> None:
    pipe = tiny_pipelines.flux()
    seen = first_step(pipe, ["red apple"])
    assert seen.divisor == 1000 and seen.sign == 1 and seen.shape == (16, 16)
    assert {"encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids"} <= set(seen.arguments)
    assert "step" not in vars(pipe.scheduler)


def test_samples_are_those_of_the_pipeline_and_kept(tmp_path: Path) -> None:
    pipe = tiny_pipelines.flux()
    samples = prepare(pipe, FitData(PROMPTS), 5, tmp_path, silent, steps=2)
    assert samples.latents.shape == (5, 16, 16)
    expected = pipe(
        ["green rocket"], num_inference_steps=2, generator=[torch.Generator().manual_seed(1)],
        output_type="latent", max_sequence_length=8,
    ).images  # fmt: skip
    torch.testing.assert_close(samples.latents[1:2], expected, atol=1e-5, rtol=1e-5)
    batch = samples.arguments(torch.tensor([0, 4, 1]))
    assert batch["encoder_hidden_states"].shape == (3, 8, 24) and batch["img_ids"].shape == (16, 3)
    assert torch.equal(batch["pooled_projections"][1], batch["pooled_projections"][2])
    again = prepare(None, FitData(PROMPTS), 5, tmp_path, silent)  # read, not drawn
    assert torch.equal(again.latents, samples.latents)
    for name, value in again.arguments(torch.tensor([2])).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, samples.arguments(torch.tensor([2]))[name])


def test_prediction_is_what_the_pipeline_computes(tmp_path: Path) -> None:
    """A denoising step by hand from recorded arguments equals the transformer's in the pipeline."""
    pipe = tiny_pipelines.flux()
    samples = prepare(pipe, FitData(PROMPTS), 2, tmp_path, silent, steps=2)
    objective = Objective(pipe.scheduler)
    noise = BatchNoise(0, 0, 2, torch.arange(2), torch.device("cpu"))
    problem = objective.pose(samples.latents, noise)
    sigma = (problem.time / 1000)[:, None, None]
    torch.testing.assert_close(problem.noisy - sigma * problem.target, samples.latents)
    with torch.no_grad():
        found = predict(pipe.transformer, samples, torch.tensor([0, 1]), problem)
        rows = samples.arguments(torch.tensor([0, 1]))
        expected = pipe.transformer(hidden_states=problem.noisy, timestep=problem.time / 1000, **rows).sample
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddpm_targets(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    clean = torch.randn(3, 2, 4, 4)
    noise = BatchNoise(1, 0, 3, torch.arange(3), torch.device("cpu"))
    problem = Objective(scheduler).pose(clean, noise)
    for row in range(3):
        t = int(problem.time[row])
        # the scheduler's own idea of the clean sample given a perfect prediction
        found = scheduler.step(problem.target[row : row + 1], t, problem.noisy[row : row + 1])
        torch.testing.assert_close(
            found.pred_original_sample.clamp(-1, 1), clean[row : row + 1].clamp(-1, 1), atol=2e-3, rtol=1e-3
        )


def test_shifted_flow_times_are_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noise = BatchNoise(0, 0, 64, torch.arange(64), torch.device("cpu"))
    problem = Objective(scheduler).pose(torch.randn(64, 2, 2), noise)
    table = scheduler.timesteps
    assert all(float((table - time).abs().min()) < 0.1 for time in problem.time)


@dataclasses.dataclass
class Count:
    """A fit of four numbers, that may be stopped after a step."""

    steps: int = 12
    lr: float = 0.1
    stop_at: int | None = None

    def optimise(self, folder: Path, progress: Callable[..., None]) -> torch.Tensor:
        x = torch.nn.Parameter(torch.zeros(4))

        def loss(indices: torch.Tensor, noise: BatchNoise) -> dict[str, torch.Tensor]:
            return {"loss": ((x - indices.float()[:, None] - noise.normal(4)) ** 2).mean()}

        def watch(what: str, done: int, total: int) -> None:
            progress(what, done, total)
            if done == self.stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        settings = loop.Settings(
            self.steps, 2, lambda p: torch.optim.AdamW(p, lr=self.lr), checkpoint_every=3
        )
        loop.optimise("count", {"x": x}, loss, 7, settings, folder, watch)
        return x.detach()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_a_stopped_loop_goes_on_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    whole = Count().optimise(tmp_path / "a", silent)
    with pytest.raises(KeyboardInterrupt):
        Count(stop_at=stop_at).optimise(tmp_path / "b", silent)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    steps: list[int] = []
    assert torch.equal(Count().optimise(tmp_path / "b", lambda what, done, total: steps.append(done)), whole)
    assert steps[0] == stop_at + 1


def test_a_killed_loop_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = Count().optimise(tmp_path / "a", silent)

    def kill(what: str, done: int, total: int) -> None:
        if done == 8:
            raise SystemExit

    with pytest.raises(SystemExit):
        Count().optimise(tmp_path / "b", kill)
    steps: list[int] = []
    assert torch.equal(Count().optimise(tmp_path / "b", lambda what, done, total: steps.append(done)), whole)
    assert steps[0] == 7


def test_loop_refuses_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    x = torch.nn.Parameter(torch.zeros(1))
    settings = loop.Settings(2, 1, torch.optim.AdamW)
    with pytest.raises(FittingError, match="loss at step 0 is nan"):
        loop.optimise("bad", {"x": x}, lambda i, n: {"loss": (x / 0).sum()}, 1, settings, tmp_path, silent)


def test_trainable_gives_the_model_back() -> None:
    model = torch.nn.Linear(2, 2).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with loop.trainable(model, ["weight"]) as trained:
        assert not model.bias.requires_grad and not trained.changed()
        trained.parameters["weight"].data.add_(1)
        assert list(trained.changed()) == ["weight"]
    assert model.bias.requires_grad and model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@dataclasses.dataclass
class Fake:
    """A fitter that may fail midway."""

    lr: float = 0.1
    broken: ClassVar[bool] = False

    def fit(self, pipe: Any, data: FitData, folder: Path, progress: Any) -> None:
        if Fake.broken:
            raise KeyboardInterrupt
        artifact.save(folder, "sla", {}, {}, {"x": torch.zeros(1)})


def test_run_checks_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, data = tiny_pipelines.flux(), FitData(PROMPTS)
    monkeypatch.setattr(Fake, "broken", True)
    with pytest.raises(KeyboardInterrupt):
        run.run(pipe, "sla", Fake(), data, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="not finished"):
        artifact.load(tmp_path / "a", "sla")
    monkeypatch.setattr(Fake, "broken", False)
    with pytest.raises(
        FileExistsError, match=r"unfinished fit with options.lr=0.1; asked for now: options.lr=0.2"
    ):
        run.run(pipe, "sla", Fake(lr=0.2), data, tmp_path / "a")
    run.run(pipe, "sla", Fake(), data, tmp_path / "a")
    assert not (tmp_path / "a" / PROGRESS).exists()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["method"] == "sla"
    with pytest.raises(FileExistsError, match="finished fit"):
        run.run(pipe, "sla", Fake(), data, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        run.run(pipe, "sla", Fake(), data, tmp_path / "b")


def test_a_fitter_is_named_as_its_method() -> None:
    method, fitter = registry.get("method", "clear"), registry.get("fitter", "clear")
    assert method.name == fitter.name == "local-window" and method.paper is fitter.paper
    assert set(registry.entries("fitter")) <= set(registry.entries("method"))
    with pytest.raises(registry.UnknownNameError, match="taylorseer"):
        registry.get("fitter", "taylorseer")
    with pytest.raises(registry.OptionError, match="no option 'speed'; it has topk"):
        registry.build("fitter", "sla", ["speed=3"])


def test_emoji_pictures_become_latents() -> None:
    pipe = tiny_pipelines.flux()
    found = encode_emoji(pipe, ["red apple", "rocket"], (256, 16))
    pixels = EmojiDataset().images([EmojiDataset().find("rocket")])
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(found[1:], pipe._pack_latents(latents, *latents.shape), atol=1e-5, rtol=1e-5)
    with pytest.raises(FittingError, match=r"\(256, 16\), the transformer draws \(16, 16\)"):
        encode_emoji(pipe, ["rocket"], (16, 16))
    with pytest.raises(FittingError, match="no emoji is called"):
        encode_emoji(pipe, ["a purple spoon"], (256, 16))
