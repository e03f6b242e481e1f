"""Adapters through the trainer: the tasks go on from a pipeline, and it stays as it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_pipelines
from data.conftest import tree  # noqa: F401  (a fixture)
from ditkit import hub
from ditkit.adapters import store
from ditkit.training.config import ConfigError
from ditkit.training.trainer import train
from training_recipes import interrupted, records

TEXT_OPTIONS = {"train_text_encoders": False, "caption_dropout": 0.2}


def files(folder: Path) -> dict[str, str]:
    """The digest of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    folder = tmp_path / "flux"
    tiny_pipelines.flux().save_pretrained(folder)
    return folder


@pytest.fixture
def classes(training_file, tmp_path: Path) -> Path:
    """A pipeline that draws two classes of 8 x 8 pixels."""
    return train(training_file("start"))


def section(kind: str, **options: Any) -> dict[str, Any]:
    return {"adapter": {"kind": kind, "options": {"rank": 2, **options}}}


def on_classes(start: Path, tree: Path, **changes: Any) -> dict[str, Any]:  # noqa: F811
    options = {"start_from": str(start), "process": "flow", "pixels": 8}
    data = {"kind": "folder", "path": str(tree), "size": 16, "split": "all"}
    return {"task_options": options, "data": data, **changes}


@pytest.mark.parametrize("kind", ["diffscaler", "td-lora", "lora"])
def test_text_to_image(training_file, tmp_path: Path, flux: Path, tree: Path, kind: str) -> None:  # noqa: F811
    before = files(flux)
    changes: dict[str, Any] = {
        "task": "text-to-image",
        "task_options": {"start_from": str(flux), **TEXT_OPTIONS},
        "data": {"kind": "folder", "path": str(tree), "size": 16, "split": "all"},
        "steps": 4,
        **section(kind),
    }
    export = train(training_file("whole", **changes))
    assert files(flux) == before
    assert sorted(files(export)) == ["adapter.json", "adapter_config.json", "adapter_model.safetensors"]
    interrupted(training_file("broken", **changes), at=2, monkeypatch=pytest.MonkeyPatch())
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    one, other = (
        load_file(tmp_path / run / "tiny/export/adapter_model.safetensors") for run in ("whole", "broken")
    )
    assert one and all(torch.equal(one[name], other[name]) for name in one)

    transformer = hub.load(flux).transformer
    plain = dict(transformer.named_parameters())
    store.load(transformer, export)
    inside = {name.replace(".base_layer", ""): value for name, value in transformer.named_parameters()}
    fresh = hub.load(flux).transformer.state_dict()
    assert all(inside[name] is value and torch.equal(value, fresh[name]) for name, value in plain.items())


def test_new_classes_come_with_the_adapter(training_file, classes: Path, tree: Path) -> None:  # noqa: F811
    export = train(training_file("new", **on_classes(classes, tree), **section("diffscaler"), ema=None))
    assert json.loads((export / "adapter.json").read_text())["classes"] == ["blue", "green", "red"]
    saved = load_file(export / "adapter_model.safetensors")
    table = next(value for name, value in saved.items() if "y_embedder" in name)
    assert table.shape == (4, 32)
    pipe = hub.load(classes)
    pipe.set_progress_bar_config(disable=True)

    def drawn(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe([name], num_inference_steps=2, generator=generator, output_type="latent").images

    before = drawn("flag")
    store.load(pipe, export, "colours")
    assert pipe.find("red") == 2
    with pytest.raises(ValueError, match="no class 'flag': there are blue, green, red"):
        pipe.find("flag")
    assert not torch.equal(drawn("red"), before)
    store.use(pipe)
    assert torch.equal(drawn("flag"), before)
    store.load(pipe, export, "again")
    with pytest.raises(store.AdapterError, match="colours and again each have classes of their own"):
        store.use(pipe, "colours", "again")
    store.remove(pipe)
    assert torch.equal(drawn("flag"), before)


def test_known_classes_keep_the_model_s_table(training_file, classes: Path) -> None:
    options = {"start_from": str(classes), "process": "flow", "pixels": 8}
    export = train(training_file("same", task_options=options, **section("lora")))
    assert json.loads((export / "adapter.json").read_text())["classes"] is None
    assert not any("y_embedder" in name for name in load_file(export / "adapter_model.safetensors"))


def test_vectors_have_their_own_rate(training_file, classes: Path, tree: Path) -> None:  # noqa: F811
    """One plain step of AdamW moves a parameter with a gradient by its rate."""
    changes = on_classes(classes, tree, steps=1, ema=None, schedule={"kind": "constant"})
    changes["optimizer"] = {"lr": 1e-4}
    export = train(training_file("rates", **changes, **section("diffscaler", vector_lr=1e-2)))
    saved = load_file(export / "adapter_model.safetensors")
    moved = {
        part: max(float(value.abs().max()) for name, value in saved.items() if f"diffscaler_{part}" in name)
        for part in ("a", "b", "up")
    }
    assert moved["b"] == pytest.approx(1e-2, rel=1e-2)
    assert moved["up"] == pytest.approx(1e-4, rel=1e-2)


def test_the_whole_network_goes_on_too(training_file, classes: Path, tree: Path) -> None:  # noqa: F811
    export = train(training_file("full", **on_classes(classes, tree)))
    pipe = hub.load(export)
    assert pipe.class_names == ["blue", "green", "red"]
    assert pipe.transformer.config.num_classes == 3
    old = hub.load(classes).transformer.state_dict()
    assert not torch.equal(
        pipe.transformer.state_dict()["blocks.0.attn.qkv.weight"], old["blocks.0.attn.qkv.weight"]
    )


@pytest.mark.parametrize(
    "objective", [{}, {"sra": {"student_block": 1, "teacher_block": 2}}], ids=["plain", "sra"]
)
def test_it_learns(training_file, tmp_path: Path, classes: Path, tree: Path, objective) -> None:  # noqa: F811
    """The first layer, a convolution, and the head are adapted too: the pipeline was hardly trained."""
    changes = on_classes(classes, tree, steps=60, checkpoint_every=60, objective=objective)
    changes |= {"optimizer": {"lr": 1e-2}, "schedule": {"kind": "constant"}}
    adapter = section("diffscaler", vector_lr=1e-2)
    adapter["adapter"]["layers"] = ["qkv", "proj", "fc1", "fc2", "final_layer.linear"]
    train(training_file("learn", **changes, **adapter))
    curve = [row["loss"] for row in records(tmp_path / "learn")]
    assert sum(curve[-10:]) < 0.85 * sum(curve[:10])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (section("lorra"), ["adapter", "unknown adapter 'lorra'", "lora"]),
        (section("diffscaler", size=3), ["no option 'size'", "vector_lr"]),
        ({"adapter": {"kind": "lora", "layers": ["query"]}}, ["no layer 'query'", "qkv"]),
        ({**section("lora"), "task_options": {"arch": "dit", "pixels": 8}}, ["start_from"]),
        ({"task_options": {"pixels": 8}}, ["give arch", "start_from"]),
        ({"task_options": {"arch": "dit", "start_from": "x"}}, ["give arch", "start_from"]),
        ({"task_options": {"start_from": "nowhere"}}, ["start_from", "nowhere"]),
        ({"process": "gaussian"}, ["process", "gaussian does not go on from a flow network"]),
        ({"pixels": 16}, ["3 x 8 x 8", "3 x 16 x 16"]),
    ],
)
def test_refuses(training_file, classes: Path, tree: Path, changes, words) -> None:  # noqa: F811
    merged = on_classes(classes, tree)
    for key in ("process", "pixels"):
        if key in changes:
            merged["task_options"][key] = changes[key]
    merged |= {key: value for key, value in changes.items() if key not in ("process", "pixels")}
    with pytest.raises(ConfigError) as error:
        train(training_file("wrong", **merged))
    assert all(word in str(error.value) for word in words), error.value


def test_refuses_pipelines_that_it_would_call_otherwise(training_file, tmp_path: Path, tree: Path) -> None:  # noqa: F811
    changes = {"task": "text-to-image", "data": {"kind": "folder", "path": str(tree), "size": 16}}
    wan = tmp_path / "wan"
    tiny_pipelines.wan().save_pretrained(wan)
    with pytest.raises(ConfigError, match="is a WanPipeline, this task trains a FluxPipeline or a Stable"):
        train(training_file("b", **changes, task_options={"start_from": str(wan)}))
