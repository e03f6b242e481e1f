"""The teacher of our own: it learns, resumes bit-exact, and teaches a SiT from one file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ditkit.models.teachers import load_teacher
from ditkit.training.config import ConfigError
from ditkit.training.tasks.teacher import moved, words_of
from ditkit.training.trainer import train
from training_recipes import interrupted, open_task, options, records

TINY: dict[str, Any] = {
    "task": "teacher",
    "task_options": {
        "least": 2,
        "model": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                  "num_attention_heads": 2, "patch_size": 16},
    },
}  # fmt: skip


def test_words_of_a_caption() -> None:
    assert words_of("Flag: red & white, of Île") == {"flag", "red", "white"}


def test_pictures_are_moved_by_a_tenth_at_most() -> None:
    picture = torch.zeros(1, 3, 20, 20)
    picture[..., 10, 10] = 1.0
    assert torch.allclose(moved(picture, torch.full((1, 3), 0.5), 0.1), picture, atol=1e-5)
    left = moved(picture, torch.tensor([[1.0, 0.5, 0.5]]), 0.1)[0, 0]
    assert divmod(int(left.argmax()), 20) == (10, 8)


def test_it_resumes_bit_exact_and_is_loaded(training_file, tmp_path, monkeypatch) -> None:
    run = {**TINY, "steps": 4, "heldout_every": 4}
    export = train(training_file("whole", **run))
    interrupted(training_file("broken", **run), monkeypatch, at=3)
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    found = records(tmp_path / "whole")[-1]
    assert 0 <= found["heldout_found"] <= 1 and found["heldout_loss"] > 0
    one, other = (load_file(tmp_path / f / "tiny/export/model.safetensors") for f in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    teacher = load_teacher(str(export))
    seen = teacher(torch.rand(2, 3, 64, 64) * 2 - 1, (4, 4), [2])
    assert seen.tokens.shape == (2, 16, 16) and seen.attention[2].shape == (2, 2, 16, 16)
    assert teacher.mean.flatten().tolist() == [0.5] * 3
    assert torch.equal(load_file(export / "model.safetensors")["layernorm.weight"],
                       teacher.network.layernorm.weight)  # fmt: skip


def test_it_learns(training_file, tmp_path) -> None:
    train(
        training_file(
            **TINY, steps=60, optimizer={"lr": 5e-3}, schedule={"kind": "constant"}, checkpoint_every=1000
        )
    )
    curve = [row["loss"] for row in records(tmp_path / "run")]
    assert sum(curve[-10:]) < 0.7 * sum(curve[:10])


def test_labels_are_the_class_and_the_words(training_file) -> None:
    task, _, _ = open_task(training_file(**TINY))
    row = task.labels[0]
    there = {name for name, value in zip(task.names, row.tolist(), strict=True) if value}
    words = words_of(task.pictures.captions[0])
    assert there == {f"class {task.pictures.rows[0].group}"} | (words & set(task.names))


def test_without_labels_there_is_nothing_to_learn(training_file) -> None:
    with pytest.raises(ConfigError, match="least"):
        open_task(training_file(**{**TINY, "task_options": {**TINY["task_options"], "least": 10_000}}))


def test_one_file_trains_teacher_and_student(training_file, tmp_path) -> None:
    base = yaml.safe_load(training_file(steps=2, checkpoint_every=10).read_text())
    base.pop("output")
    teacher = {**base, **TINY, "name": "teacher"}
    haste = {"teacher": "teacher", "depth": 1, "projector": 8, "attention_layers": [1],
             "teacher_layers": [2], "stop_at": 0.5}  # fmt: skip
    student = {**base, "task_options": options("sit", "flow"), "objective": {"haste": haste}}
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "both"), "stages": [teacher, student]}))
    train(path)
    aligned, stopped = records(tmp_path / "both")
    assert aligned["alignment"] != 0 and aligned["attention_alignment"] > 0
    assert stopped["alignment"] == 0 and "attention_alignment" not in stopped
    exported = load_file(tmp_path / "both/tiny/export/transformer/diffusion_pytorch_model.safetensors")
    assert not any("projector" in name or "teacher" in name for name in exported)
