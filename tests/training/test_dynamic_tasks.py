"""The tasks of two grains at tiny size: they learn, continue bit for bit where they were stopped, and leave a
pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ditkit.data.pictures import open_pictures
from ditkit.models.d2it_autoencoder import DualGrainAutoencoder
from ditkit.pipelines.dynamic_grain import DynamicGrainPipeline
from ditkit.training import trainer as training
from ditkit.training.config import ConfigError, load
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.dynamic_content import DynamicContentTask
from ditkit.training.trainer import train

SHARED = {
    "precision": "no",
    "data": {"kind": "emoji", "split": "heldout", "groups": ["flag", "joined"]},
    "ema": {"decay": 0.5},
    "log_every": 1,
    "checkpoint_every": 2,
    "tracker": None,
    "batch_size": 4,
    "optimizer": {"lr": 3e-3, "clip_grad_norm": 1.0},
}
AUTOENCODER = {
    "name": "autoencoder",
    "task": "dynamic-autoencoder",
    "steps": 1,
    "task_options": {
        "fine_ratio": 0.3,
        "model": {
            "ch": 4, "ch_mult": [1, 1, 2, 2, 2], "decoder_ch_mult": None, "num_res_blocks": 1,
            "attn_resolutions": [], "z_channels": 3,
        },
    },
}  # fmt: skip
GRAIN = {
    "name": "grain",
    "task": "grain",
    "steps": 1,
    "task_options": {"model": {"hidden_size": 16, "depth": 1, "num_heads": 2}},
}
CONTENT = {
    "name": "content",
    "task": "dynamic-content",
    "steps": 1,
    "task_options": {
        "grain": "grain",
        "model": {"hidden_size": 16, "depth": 1, "refine_depth": 1, "num_heads": 2},
        "preview_steps": 2,
    },
}
STAGES = ("autoencoder", "grain", "content")


@pytest.fixture
def write(tmp_path: Path):
    def file(output: str, **changes: dict[str, Any]) -> Path:
        stages = [
            {**SHARED, **stage, **changes.get(stage["name"], {})} for stage in (AUTOENCODER, GRAIN, CONTENT)
        ]
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / output), "stages": stages}))
        return path

    return file


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def fall(seen: list[float]) -> float:
    """The last losses over the first ones."""
    return sum(seen[-16:]) / 16 / (sum(seen[:8]) / 8)


def content(file: Path, folder: Path) -> DynamicContentTask:
    folders = {name: folder / name for name in STAGES[:2]}
    return DynamicContentTask(load(file).stages[-1], folder / "content", folders)


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_exact(write, tmp_path, monkeypatch, stage):
    path = write("whole", **{stage: {"steps": 5}})
    train(path)

    class Killed(BaseException):
        pass

    take_step, killed = training.Trainer._train_step, []

    def dies_at_step_five(self):
        if self.run.name == stage and self.step == 4 and not killed:
            killed.append(True)
            raise Killed
        return take_step(self)

    monkeypatch.setattr(training.Trainer, "_train_step", dies_at_step_five)
    path = write("broken", **{stage: {"steps": 5}})
    with pytest.raises(Killed):
        train(path)
    torch.rand(7)
    train(path, resume=True)
    assert losses(tmp_path / "broken" / stage) == losses(tmp_path / "whole" / stage)
    one, other = ((tmp_path / run / stage / "export") for run in ("whole", "broken"))
    for file in one.rglob("*.safetensors"):
        mine, theirs = load_file(file), load_file(other / file.relative_to(one))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file


FEW = {"data": {**SHARED["data"], "groups": ["flag"]}}  # ten pictures
WIDER = {"hidden_size": 64, "depth": 2, "num_heads": 4}


@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_the_contents_loss_falls(write, tmp_path, process):
    options = {**CONTENT["task_options"], "process": process, "model": {**WIDER, "refine_depth": 1}}
    content = {**FEW, "steps": 80, "batch_size": 20, "task_options": options}
    train(write("run", autoencoder=FEW, grain=FEW, content=content))
    assert fall(losses(tmp_path / "run" / "content")) < 0.7


def test_the_other_losses_fall(write, tmp_path):
    grain = {**FEW, "steps": 80, "batch_size": 20, "task_options": {"model": WIDER}}
    train(write("run", autoencoder={**FEW, "steps": 40}, grain=grain, content=FEW))
    assert fall(losses(tmp_path / "run" / "autoencoder")) < 0.7
    assert fall(losses(tmp_path / "run" / "grain")) < 0.5


def test_what_a_run_shows_and_leaves(write, tmp_path):
    every = {name: {"sample_every": 1, "heldout_every": 1} for name in STAGES}
    export = train(write("run", **every))
    seen = {name: {key for row in rows(tmp_path / "run" / name) for key in row} for name in STAGES}
    assert {"kl", "reconstruction", "heldout_psnr", "heldout_fine_ratio"} <= seen["autoencoder"]
    assert "heldout_loss" in seen["grain"] and {"vb", "heldout_mse"} <= seen["content"]
    for name in STAGES:
        assert list((tmp_path / "run" / name / "samples").glob("*.png"))
    facts = json.loads((export / "process.json").read_text())
    assert facts == {"process": "gaussian", "classes": ["flag", "joined"]}
    assert not [file for file in export.rglob("*.json") if str(tmp_path) in file.read_text()]
    pipe = DynamicGrainPipeline.from_pretrained(export)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe([0, 1], num_inference_steps=2)
    assert [image.size for image in drawn.images] == [(64, 64)] * 2 and drawn.grain.shape == (2, 4, 4)


def test_the_ratio_and_the_scale_are_those_of_the_data(write, tmp_path):
    file = write("run")
    train(file)
    pictures = open_pictures(load(file).stages[0].data)
    vae = DualGrainAutoencoder.from_pretrained(tmp_path / "run" / "autoencoder" / "export")
    fine = vae.grain(pictures.images()).float().mean().item()
    assert fine == pytest.approx(0.3, abs=0.01)  # the entropies of these pictures are all different
    task = content(file, tmp_path / "run")
    assert task.pipeline().config["fine_ratio"] == pytest.approx(fine)
    latents = task.latents
    assert latents.mean().item() == pytest.approx(0, abs=1e-4)
    assert latents.std().item() == pytest.approx(1, abs=1e-4)


def test_a_threshold_may_be_given(write, tmp_path):
    options = AUTOENCODER["task_options"]
    model = {**options["model"], "threshold": 1.25}
    train(write("run", autoencoder={"task_options": {**options, "model": model}}))
    config = json.loads((tmp_path / "run" / "autoencoder" / "export" / "config.json").read_text())
    assert config["threshold"] == 1.25


@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_a_coarse_region_has_one_noise(write, tmp_path, process):
    options = {**CONTENT["task_options"], "process": process}
    file = write("run", content={"task_options": options})
    train(file)
    task, states = content(file, tmp_path / "run"), []
    task.transformer.register_forward_pre_hook(lambda module, given: states.append(given[0]))
    indices = torch.arange(8)
    task(indices, BatchNoise(0, 0, 8, indices, torch.device("cpu")))
    cells = states[0].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (B, C, h, w, 4)
    alike = (cells == cells[..., :1]).all(-1).all(1)
    assert torch.equal(alike, ~task.maps[:8]) and alike.any() and not alike.all()


def test_without_a_grain_transformer(write, tmp_path):
    options = {**CONTENT["task_options"], "grain": None}
    export = train(write("run", content={"task_options": options, "sample_every": 1}))
    assert list((tmp_path / "run" / "content" / "samples").glob("*.png"))
    pipe = DynamicGrainPipeline.from_pretrained(export)
    with pytest.raises(ValueError, match="no grain_transformer"):
        pipe([0])


def test_a_stage_that_is_not_there(write):
    options = {**GRAIN["task_options"], "autoencoder": "nothing"}
    with pytest.raises(ConfigError, match=r"grain\.task_options\.autoencoder: no stage .*'nothing'"):
        train(write("run", grain={"task_options": options}))
