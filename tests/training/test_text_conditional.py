"""Text-conditional training: both architectures, both processes, pixels and cached latents, exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ditkit
from data.conftest import autoencoder, tree  # noqa: F401  (fixtures)
from ditkit.data.config import DataConfig
from ditkit.data.latent_cache import cache_latents
from ditkit.pipelines.text_conditional import TextConditionalPipeline
from ditkit.training.config import ConfigError
from ditkit.training.trainer import train

COMMON: dict[str, Any] = {
    "batch_size": 8, "precision": "no", "ema": {"decay": 0.9}, "log_every": 1, "checkpoint_every": 2,
    "tracker": None, "seed": 3,
}  # fmt: skip
TEXTS = {
    "max_length": 8, "components": 4, "feature_size": 8,
    "clip": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": 16,
    },
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "pt-dit": {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 2, "compress_ratios": [1, 2, 2]},
    "dico": {"hidden_size": 8, "depth": [1, 1, 1, 1, 1]},
}


@pytest.fixture
def text_file(tmp_path: Path, tree: Path):  # noqa: F811
    """Writes a training file of both stages with the given changes to the second one."""

    def write(output: str = "run", arch: str = "pt-dit", options: Any = None, **changes: Any) -> Path:
        pictures = {"kind": "folder", "path": str(tree), "size": 16, "split": "all"}
        stages = [
            {
                **COMMON, "name": "text_encoders", "task": "text-encoders", "steps": 2, "data": pictures,
                "task_options": TEXTS,
            },
            {
                **COMMON, "name": "tiny", "task": "text-conditional", "steps": 4, "data": pictures,
                "optimizer": {"lr": 1e-3},
                "task_options": {
                    "arch": arch, "model": MODELS[arch], "pixels": 8, "preview": ["red square 0"],
                    "preview_steps": 2, **(options or {}),
                },
                **changes,
            },
        ]  # fmt: skip
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / output), "stages": stages}))
        return path

    return write


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize(("process", "encoder"), [("flow", "t5"), ("gaussian", "clip")])
def test_trains_and_exports_a_pipeline(
    text_file, tmp_path: Path, arch: str, process: str, encoder: str
) -> None:
    export = train(text_file(arch=arch, options={"process": process, "encoder": encoder}, sample_every=4))
    assert list((tmp_path / "run/tiny/samples").glob("*.png"))
    pipe = ditkit.load(export)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is TextConditionalPipeline
    assert pipe("blue square 1", num_inference_steps=2).images[0].size == (8, 8)
    texts = [file.read_text(encoding="utf-8") for file in export.rglob("*.json")]
    assert not any(str(tmp_path) in text for text in texts)


@pytest.mark.parametrize("arch", MODELS)
def test_overfits_a_few_captions(text_file, tmp_path: Path, arch: str) -> None:
    train(text_file(arch=arch, steps=150, checkpoint_every=1000, optimizer={"lr": 3e-3}))
    curve = [loss for _, loss in losses(tmp_path / "run")]
    assert sum(curve[-20:]) < 0.5 * sum(curve[:20])


def test_resume_is_bit_exact(text_file, tmp_path: Path, monkeypatch) -> None:
    from ditkit.training import trainer

    train(text_file("whole"))
    take_step, killed = trainer.Trainer._train_step, []

    class Killed(BaseException):
        pass

    def dies(self):
        if self.run.name == "tiny" and self.step == 3 and not killed:
            killed.append(True)
            raise Killed
        return take_step(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", dies)
    path = text_file("broken")
    with pytest.raises(Killed):
        train(path)
    torch.rand(5)
    train(path, resume=True)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_trains_on_cached_latents(text_file, tree: Path, autoencoder: Path, tmp_path: Path) -> None:  # noqa: F811
    """From the cache no picture is read, and the losses are those of encoding on the way."""
    folder = cache_latents(DataConfig(kind="folder", path=tree, size=16), autoencoder, tmp_path / "latents")
    options = {"pixels": None}
    train(text_file("encoded", options={**options, "autoencoder": str(autoencoder)}))
    data = {"kind": "latents", "path": str(folder), "split": "all"}
    export = train(text_file("cached", options=options, data=data))
    for (_, a), (_, b) in zip(losses(tmp_path / "encoded"), losses(tmp_path / "cached"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    pipe = ditkit.load(export)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red square 0", num_inference_steps=1).images[0].size == (16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "dit", "model": {}}, "dit reads no text; dico, pt-dit do"),
        ({"arch": "pt-ditt"}, "pt-dit"),
        ({"model": {"hidden_size": 30}}, "hidden_size=30"),
        ({"model": {"widht": 30}}, "widht"),
        ({"text_encoders": "nowhere"}, "no stage and no folder 'nowhere'.*text_encoders"),
        ({"pixels": 8, "autoencoder": "vae"}, "exclude each other"),
        ({"pixels": None, "autoencoder": "vae"}, "no stage and no folder 'vae'"),
        ({"process": "diffusion"}, "process"),
    ],
)
def test_bad_options_are_named(text_file, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(text_file(options=changes))


def test_the_bundled_configuration(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """configs/pt_dit_text_emoji.yaml, two steps of each stage."""
    recipe = request.config.rootpath / "configs" / "pt_dit_text_emoji.yaml"
    quick = [
        "steps=2",
        "batch_size=4",
        "data.groups=[keycap]",
        "data.every={}",
        "tracker=null",
        "precision='no'",
    ]
    changes = [f"{stage}.{change}" for stage in ("text_encoders", "transformer") for change in quick]
    changes += ["text_encoders.task_options.components=4", "transformer.task_options.preview=[]"]
    export = train(recipe, [f"output={tmp_path / 'run'}", *changes])
    assert type(ditkit.load(export)) is TextConditionalPipeline
