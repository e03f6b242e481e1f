"""Evaluation of runs on cached latents: against the pictures that the latents came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.conftest import autoencoder, picture, tree  # noqa: F401  (fixtures)
from ditkit.data.config import DataConfig
from ditkit.data.latent_cache import cache_latents
from ditkit.training.config import ConfigError
from ditkit.training.trainer import train

MODEL = {"arch": "dit", "process": "flow",
         "model": {"patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2}}  # fmt: skip


@pytest.fixture
def changes(tree: Path, autoencoder: Path, tmp_path: Path) -> dict[str, object]:  # noqa: F811
    """What a run on the latents of a folder has in its file."""
    data = DataConfig(kind="folder", path=tree, size=16, split="all")
    latents = cache_latents(data, autoencoder, tmp_path / "latents")
    return {
        "data": {"kind": "latents", "path": str(latents), "split": "all"},
        "task_options": MODEL,
        "steps": 2,
    }


def asked(**more: object) -> dict[str, object]:
    return {"every": 2, "pictures": 6, "steps": 2, **more}


def test_what_is_drawn_is_decoded_and_compared_with_the_pictures(changes, tree, training_file, tmp_path):  # noqa: F811
    evaluation = asked(data={"kind": "folder", "path": str(tree)})  # their size is that of the latents
    train(training_file(evaluation=evaluation, **changes))
    row = json.loads((tmp_path / "run/tiny/metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 2 and row["evaluation_distance"] > 0 and 0 <= row["evaluation_precision"] <= 1


def test_without_them_the_error_says_what_to_name(changes, training_file):
    with pytest.raises(ConfigError, match=r"tiny\.evaluation: cached latents .*evaluation\.data: \{kind"):
        train(training_file(evaluation=asked(), **changes))


def test_other_pictures_are_refused(changes, tree, training_file, tmp_path):  # noqa: F811
    picture("red").save(tree / "red" / "one_more.png")
    with pytest.raises(ConfigError, match=r"evaluation\.data: .* other pictures \(12 of kind folder"):
        train(training_file(evaluation=asked(data={"kind": "folder", "path": str(tree)}), **changes))
    with pytest.raises(ConfigError, match=r"evaluation\.data: no folder of pictures"):
        train(training_file("none", evaluation=asked(data={"kind": "folder", "path": "nowhere"}), **changes))


def test_where_the_data_are_pictures_none_are_to_be_named(training_file):
    with pytest.raises(ConfigError, match=r"evaluation\.data: the run's own data are pictures"):
        train(training_file(evaluation=asked(data={"kind": "emoji"})))
