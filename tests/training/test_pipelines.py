"""The pipelines that people run, adapted and compressed: FLUX.1-dev's form, Stable Diffusion 3's, Wan's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_pipelines
from data.conftest import tree  # noqa: F401  (a fixture)
from ditkit import hub
from ditkit.adapters import store
from ditkit.analysis.sampling import Sampling, sample
from ditkit.data.config import DataConfig
from ditkit.data.latent_cache import cache_latents
from ditkit.models.dydit_flux import DyFluxTransformer2DModel
from ditkit.training import compress
from ditkit.training.adapt import adapt, run_for
from ditkit.training.config import AdapterConfig, ConfigError, RunConfig
from ditkit.training.order import BatchNoise
from ditkit.training.tasks import find
from ditkit.training.tasks.forms import FORMS, time_shift
from ditkit.training.tasks.kept import Kept, KeptSamples
from training.test_adapt import files
from training_recipes import stopped_after

CALL = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 2.0}
MOTION = {"objects": ["red apple"], "object_size": 16, "travel": [5, 7], "frames": 5, "cameras": []}
PIPELINES = {"flux": tiny_pipelines.flux_dev, "sd3": tiny_pipelines.sd3, "wan": tiny_pipelines.wan}


@pytest.fixture
def saved(tmp_path: Path):
    """Saves one of `PIPELINES` and returns its folder."""

    def save(name: str) -> Path:
        folder = tmp_path / name
        PIPELINES[name]().save_pretrained(folder)
        if name == "wan":
            (folder / "call.json").write_text(json.dumps(CALL))
        return folder

    return save


def data_for(name: str, tree: Path) -> dict[str, Any]:  # noqa: F811
    if name == "wan":
        return {"kind": "emoji", "motion": MOTION}
    return {"kind": "folder", "path": str(tree), "size": 16, "split": "all"}


def run_on(folder: Path, data: dict[str, Any], **changes: Any) -> RunConfig:
    adapter = AdapterConfig(kind="lora", options={"rank": 2})
    quick = {"steps": 4, "batch_size": 2, "tracker": None, "log_every": 1, "checkpoint_every": 1}
    return RunConfig.model_validate(
        run_for(str(folder), hub.load(folder), adapter, data, {**quick, **changes})
    )


def opened(run: RunConfig) -> Any:
    return find(run.task)(run.model_copy(update={"adapter": None}), Path("."), {})


@pytest.mark.parametrize("name", PIPELINES)
def test_adapted(saved, tmp_path: Path, tree: Path, name: str) -> None:  # noqa: F811
    """Stopped and continued, it is the same bit for bit; the model stays as it was; the adapter loads."""
    folder = saved(name)
    before = files(folder)
    run = run_on(folder, data_for(name, tree), optimizer={"lr": 0.1})
    adapt(run, tmp_path / "whole")
    with stopped_after(2), pytest.raises(KeyboardInterrupt):
        adapt(run, tmp_path / "broken")
    adapt(run, tmp_path / "broken", resume=True)
    one, other = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "broken"))
    assert one and all(torch.equal(one[key], other[key]) for key in one)
    assert any(bool(value.any()) for key, value in one.items() if "lora_B" in key)
    assert files(folder) == before

    pipe = hub.load(folder)
    sampling = Sampling(2, size=None if name == "wan" else (16, 16))
    dense = sample(pipe, ["red apple"], sampling).latents
    store.load(pipe, tmp_path / "whole")
    adapted = sample(pipe, ["red apple"], sampling).latents
    store.remove(pipe)
    assert dense is not None and adapted is not None and adapted.isfinite().all()
    assert not torch.equal(adapted, dense)
    assert torch.equal(sample(pipe, ["red apple"], sampling).latents, dense)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_step_calls_the_transformer_as_the_pipeline_does(saved, tree: Path, name: str) -> None:  # noqa: F811
    run = run_on(saved(name), data_for(name, tree))
    task = opened(run)
    seen: list[dict[str, Any]] = []
    task.transformer.register_forward_pre_hook(
        lambda _, __, arguments: seen.append(dict(arguments)), with_kwargs=True
    )
    pipe = task.pipeline()
    size = {} if name == "wan" else {"height": 16, "width": 16}
    pipe(["red apple"], num_inference_steps=1, guidance_scale=3.5 if name == "flux" else 1.0, **size)
    number = task.captions.numbers(["red apple"])
    with torch.no_grad():
        task.velocity(task.latents[:1], torch.ones(1), number)
    used, trained = seen
    missing = {name for name, value in used.items() if value is not None} - set(trained)
    assert missing <= {"joint_attention_kwargs"}
    for key in set(trained) - {"hidden_states", "return_dict"}:
        torch.testing.assert_close(trained[key], used[key])
    assert trained["hidden_states"].shape == used["hidden_states"].shape


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_latents_are_those_that_the_pipeline_decodes(saved, tree: Path, name: str) -> None:  # noqa: F811
    task = opened(run_on(saved(name), data_for(name, tree)))
    pipe, images = task.pipeline(), task.pictures.images([3])
    config = pipe.vae.config
    with torch.no_grad():
        expected = (pipe.vae.encode(images).latent_dist.mean - config.shift_factor) * config.scaling_factor
    found = task.latents[torch.tensor([3])]
    if name == "flux":
        found = pipe._unpack_latents(found, 16, 16, pipe.vae_scale_factor)
    torch.testing.assert_close(found, expected)


def test_pictures_are_encoded_when_they_are_seen(saved, tmp_path: Path, tree: Path, monkeypatch) -> None:  # noqa: F811
    from ditkit.training.tasks import text_to_image

    encode, seen = text_to_image.encode_pictures, []

    def counted(autoencoder: Any, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return encode(autoencoder, images)

    monkeypatch.setattr(text_to_image, "encode_pictures", counted)
    run = run_on(saved("flux"), data_for("flux", tree), steps=2, batch_size=2, heldout_every=0)
    adapt(run, tmp_path / "out")
    assert seen == [1] * 4  # of twelve pictures
    task = opened(run)
    before = task.latents[torch.tensor([5, 0])]
    alone = torch.cat([task.latents[5:6], opened(run).latents[torch.tensor([0])]])
    assert torch.equal(before, alone)


def test_cached_latents(saved, tmp_path: Path, tree: Path) -> None:  # noqa: F811
    """Those of the pipeline's own autoencoder serve as pictures do; others are refused."""
    folder, pictures = saved("flux"), data_for("flux", tree)
    cached = {}
    for name, other in (("flux", folder), ("sd3", saved("sd3"))):
        source = DataConfig.model_validate(pictures)
        cached[name] = cache_latents(source, other / "vae", tmp_path / f"{name}-latents")
    data = {"kind": "latents", "path": str(cached["flux"]), "split": "all"}
    run = run_on(folder, data)
    assert run.data.size == 16
    task, seen = opened(run), opened(run_on(folder, pictures))
    assert task.sample_count == 12 and task.pictures.captions == seen.pictures.captions
    torch.testing.assert_close(task.latents[:4], seen.latents[:4], atol=1e-5, rtol=1e-5)
    adapt(run, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with pytest.raises(ConfigError, match="latents of another autoencoder"):
        opened(run_on(folder, {**data, "path": str(cached["sd3"])}))
    with pytest.raises(ConfigError, match=r"data.size: the latents are of 16 pixels"):
        opened(run_on(folder, {**data, "size": 32}))


@pytest.mark.parametrize("name", PIPELINES)
def test_text_encoders_may_train(saved, tree: Path, name: str) -> None:  # noqa: F811
    """Then captions are read anew in each step, with gradients, as the frozen ones read them."""
    run = run_on(saved(name), data_for(name, tree))
    frozen = opened(run)
    task = opened(run.model_copy(update={"task_options": {**run.task_options, "train_text_encoders": True}}))
    noise = BatchNoise(0, 0, 2, torch.arange(2), torch.device("cpu"))
    loss = task.flow_loss(task.latents[:2], task.tokens[:2], noise)
    loss.backward()
    encoders = [(key, part) for key, part in task.named_children() if key.startswith("text_encoder")]
    assert len(encoders) == {"flux": 2, "sd3": 3, "wan": 1}[name]
    for key, part in encoders:
        assert any(p.grad is not None and bool(p.grad.any()) for p in part.parameters()), key
    again = BatchNoise(0, 0, 2, torch.arange(2), torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(
            frozen.flow_loss(frozen.latents[:2], frozen.tokens[:2], again), loss.detach()
        )


def test_kept() -> None:
    made: list[int] = []

    def compute(index: int) -> torch.Tensor:
        made.append(index)
        return torch.full((1, 2), float(index))

    rows = KeptSamples(compute, 5, lambda: torch.device("cpu"), "making", most=2 * 8)
    assert rows[torch.tensor([3, 1, 3])].tolist() == [[3, 3], [1, 1], [3, 3]] and made == [3, 1]
    assert rows[torch.tensor([1, 4])].tolist() == [[1, 1], [4, 4]]
    assert rows[torch.tensor([4, 3])].tolist() == [[4, 4], [3, 3]]
    assert made == [3, 1, 4, 4], "what does not fit is made again"
    assert len(rows) == 5 and rows[:2].tolist() == [[0, 0], [1, 1]]
    with torch.autocast("cpu", torch.bfloat16):
        kept = Kept(lambda _: {"x": torch.ones(1, 4) @ torch.ones(4, 4)}, lambda: torch.device("cpu"), "")
        assert kept.rows(["a"])["x"].dtype == torch.float32


def test_times_follow_the_scheduler(saved, tree: Path) -> None:  # noqa: F811
    run = run_on(saved("sd3"), data_for("sd3", tree))
    assert opened(run).options.sigma_mean == pytest.approx(math.log(3.0))
    given = run.model_copy(update={"task_options": {**run.task_options, "sigma_mean": 0.25}})
    assert opened(given).options.sigma_mean == 0.25
    pipe = tiny_pipelines.flux_dev()
    mean = time_shift(pipe.scheduler, 256)
    assert mean == pytest.approx(0.5) and time_shift(pipe.scheduler, 4096) == pytest.approx(1.15)
    for scheduler, mu in ((pipe.scheduler, mean), (tiny_pipelines.sd3().scheduler, None)):
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2], **({} if mu is None else {"mu": mu}))
        moved = torch.sigmoid(torch.logit(torch.tensor([0.9, 0.5, 0.2])) + time_shift(scheduler, 256))
        torch.testing.assert_close(scheduler.sigmas[:3], moved)


def test_compressed(saved, tmp_path: Path, tree: Path) -> None:  # noqa: F811
    """FLUX.1-dev's form keeps its scheduler, autoencoder, tokenizers and guidance."""
    folder = saved("flux")
    quick = {"steps": 2, "batch_size": 4, "tracker": None, "ema": None, "log_every": 1}
    raw = compress.run_for(str(folder), hub.load(folder), "dydit", 0.7, data_for("flux", tree), quick)
    out = compress.compress(RunConfig.model_validate(raw), tmp_path / "less")
    pipe, before = hub.load(out), hub.load(folder)
    assert (
        isinstance(pipe.transformer, DyFluxTransformer2DModel) and pipe.transformer.config["guidance_embeds"]
    )
    for part in ("scheduler", "vae"):
        one, other = (
            {k: v for k, v in getattr(p, part).config.items() if k[0] != "_"} for p in (before, pipe)
        )
        assert one == other
    assert pipe.tokenizer.get_vocab() != pipe.tokenizer_2.get_vocab()
    assert compress.spent(pipe, ["red apple"], steps=1).flops <= 1.01
    parts = [path for path in out.rglob("*.json") if "run" not in path.relative_to(out).parts]
    assert not any(str(tmp_path) in path.read_text() for path in parts), "no folder of a machine"
    fresh = f"import ditkit; print(type(ditkit.load({str(out)!r}).transformer).__name__)"
    told = subprocess.run([sys.executable, "-c", fresh], capture_output=True, text=True, check=False)
    assert told.stdout.strip() == "DyFluxTransformer2DModel", told.stderr
    lines = (out / "run" / "metrics.jsonl").read_text()
    assert '"budget"' in lines and '"flops"' in lines


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_what_is_not_compressed_is_told(saved, tree: Path, name: str) -> None:  # noqa: F811
    folder = saved(name)
    pipe = hub.load(folder)
    with pytest.raises(ConfigError, match=rf"is a {type(pipe).__name__}; what dydit compresses is a Flux"):
        compress.run_for(str(folder), pipe, "dydit", 0.5, data_for(name, tree))


def test_what_is_not_adapted_is_told(saved, tmp_path: Path, tree: Path) -> None:  # noqa: F811
    folder = saved("wan")
    with pytest.raises(ConfigError, match=r"trained on clips; there are the bundled ones, --data emoji"):
        run_on(folder, data_for("flux", tree))
    two = tiny_pipelines.wan()
    two.register_modules(transformer_2=tiny_pipelines.wan(1).transformer)
    two.save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "call.json").write_text(json.dumps(CALL))
    with pytest.raises(ConfigError, match=r"another transformer for little noise; Wan 2.1's"):
        opened(run_on(tmp_path / "two", data_for("wan", tree)))
    odd = run_on(saved("flux"), {**data_for("flux", tree), "size": 18})
    with pytest.raises(ConfigError, match=r"data.size: 18 is not a multiple of 4, a token's side"):
        opened(odd)


def test_forms_are_of_classes_of_diffusers() -> None:
    import diffusers

    assert all(hasattr(diffusers, name) for name in FORMS)
