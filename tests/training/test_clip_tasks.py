"""The tasks of clips at tiny size: they learn, and continue bit for bit where they were stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from ditkit.training import trainer as training
from ditkit.training.config import ConfigError, load
from ditkit.training.tasks.text_to_video import TextToVideoTask
from ditkit.training.tasks.windows import Windows
from ditkit.training.trainer import train

MOTION = {"objects": ["red apple", "banana"], "object_size": 16, "travel": [5, 7], "frames": 5, "cameras": []}
SHARED = {
    "precision": "no",
    "data": {"kind": "emoji-motion", "size": 32, "motion": MOTION},
    "ema": {"decay": 0.5},
    "log_every": 1,
    "checkpoint_every": 2,
    "tracker": None,
}
AUTOENCODER = {
    "name": "autoencoder",
    "task": "video-autoencoder",
    "steps": 2,
    "batch_size": 5,
    "optimizer": {"lr": 3e-3, "clip_grad_norm": 1.0},
    "task_options": {
        "windows": {"lengths": {1: 0.5, 5: 0.5}},
        "measured_clips": 2,
        "model": {
            "base_dim": 16, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1,
            "temperal_downsample": [True], "patch_size": 4, "in_channels": 48, "out_channels": 48,
        },
    },
}  # fmt: skip
TEXT_ENCODER = {
    "name": "text_encoder",
    "task": "video-text-encoder",
    "steps": 2,
    "batch_size": 8,
    "optimizer": {"lr": 1e-2, "clip_grad_norm": 1.0},
    "task_options": {
        "components": 8,
        "umt5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    },
}
CLIPS = {
    "name": "clips",
    "task": "text-to-video",
    "steps": 6,
    "batch_size": 10,
    "optimizer": {"kind": "muon", "lr": 5e-3, "clip_grad_norm": 1.0},
    "task_options": {
        "clips": 4,
        "windows": {"lengths": {1: 0.5, 5: 0.5}},
        "thinned": 0.5,
        "thinned_frames": 2,
        "storage": "float32",
        "transformer": {
            "patch_size": [1, 1, 1], "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48,
            "num_layers": 2, "freq_dim": 16, "rope_max_seq_len": 32,
        },
    },
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path):
    def file(output: str, **changes: dict[str, Any]) -> Path:
        stages = [
            {**SHARED, **stage, **changes.get(stage["name"], {})}
            for stage in (AUTOENCODER, TEXT_ENCODER, CLIPS)
        ]
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / output), "stages": stages}))
        return path

    return file


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("stage", ["autoencoder", "text_encoder", "clips"])
def test_resume_is_bit_exact(write, tmp_path, monkeypatch, stage):
    steps = {stage: {"steps": 5}} | ({} if stage == "clips" else {"clips": {"steps": 1}})
    train(write("whole", **steps))

    class Killed(BaseException):
        pass

    take_step, killed = training.Trainer._train_step, []

    def dies_at_step_five(self):
        if self.run.name == stage and self.step == 4 and not killed:
            killed.append(True)
            raise Killed
        return take_step(self)

    monkeypatch.setattr(training.Trainer, "_train_step", dies_at_step_five)
    path = write("broken", **steps)
    with pytest.raises(Killed):
        train(path)
    torch.rand(7)
    train(path, resume=True)
    assert losses(tmp_path / "broken" / stage) == losses(tmp_path / "whole" / stage)
    one, other = ((tmp_path / run / stage / "export") for run in ("whole", "broken"))
    for file in one.rglob("*.safetensors"):
        mine, theirs = load_file(file), load_file(other / file.relative_to(one))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file


def test_the_losses_fall(write, tmp_path):
    once = {"data": {**SHARED["data"], "motion": {**MOTION, "spread": 0.0, "directions": ["left"]}}}
    changes = {"steps": 50, **once}
    clips = {**changes, "task_options": {**CLIPS["task_options"], "caption_dropout": 0.0}}
    train(write("run", autoencoder=changes, text_encoder=changes, clips=clips))
    for stage, share in (("autoencoder", 0.5), ("text_encoder", 0.1), ("clips", 0.8)):
        seen = losses(tmp_path / "run" / stage)
        first, last = sum(seen[:8]) / 8, sum(seen[-16:]) / 16
        assert last < share * first, (stage, first, last)


def test_latents_are_kept_beside_the_autoencoder(write, tmp_path):
    train(write("run", clips={"steps": 1}))
    (kept,) = (tmp_path / "run" / "autoencoder").glob("latents-*.safetensors")
    latents = load_file(kept)["latents"]
    assert latents.shape == (4, 4, 3, 4, 4) and latents.dtype == torch.bfloat16
    facts = json.loads((tmp_path / "run" / "clips" / "export" / "call.json").read_text())
    assert facts == {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 2.0}


def test_thinned_clips_keep_their_places_in_time(write, tmp_path):
    """Frames far apart, seen alone, have the rotary factors they have in the whole clip."""
    train(write("run", clips={"steps": 1}))
    file = load(write("run", clips={"steps": 1}))
    folders = {name: tmp_path / "run" / name for name in ("autoencoder", "text_encoder")}
    task = TextToVideoTask(file.stages[-1], tmp_path / "run" / "clips", folders)
    whole = task.transformer.rope(torch.zeros(1, 4, 3, 4, 4))
    task._places = [0, 2]
    thin = task.transformer.rope(torch.zeros(1, 4, 2, 4, 4))
    for one, other in zip(whole, thin, strict=True):
        kept = one.unflatten(1, (3, 16))[:, [0, 2]].flatten(1, 2)
        assert torch.equal(other, kept) and not torch.equal(other, one[:, :32])


def test_lengths():
    windows = Windows(lengths={1: 1.0, 5: 3.0})
    assert [windows.length(u) for u in (0.0, 0.24, 0.26, 0.999)] == [1, 1, 5, 5]
    for bad in ({3: 1.0}, {5: 0.0}, {}):
        with pytest.raises(ValidationError):
            Windows(lengths=bad)


def test_a_task_of_clips_needs_clips(write):
    with pytest.raises(ValueError, match="needs clips"):
        train(write("run", autoencoder={"data": {"kind": "emoji"}}))
    with pytest.raises(ConfigError, match="no stage 'nothing'"):
        options = {**CLIPS["task_options"], "start": "nothing"}
        train(write("other", clips={"task_options": options}))
