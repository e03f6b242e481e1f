"""Training on pictures from elsewhere: damaged ones are left out, shards and folders train alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.conftest import tree, write_tar  # noqa: F401  (a fixture)
from ditkit.data.records import PictureError
from ditkit.training.trainer import train


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]


def test_the_rest_trains(tree: Path, training_file, tmp_path: Path) -> None:  # noqa: F811
    (tree / "red" / "cut.png").write_bytes((tree / "red" / "red_square-0.png").read_bytes()[:60])
    data = {"kind": "folder", "path": str(tree), "size": 16, "split": "all"}
    export = train(training_file(data=data, steps=2))
    assert json.loads((export / "process.json").read_text())["classes"] == ["blue", "green", "red"]
    with pytest.raises(PictureError, match=r"red/cut\.png"):
        train(training_file("other", data={**data, "on_error": "raise"}, steps=2))


def test_shards_train_as_folders_do(tree: Path, training_file, tmp_path: Path) -> None:  # noqa: F811
    files = sorted(tree.rglob("*.png"))
    members = {f"{file.stem}.png": file.read_bytes() for file in files}
    members |= {f"{file.stem}.cls": file.parent.name.encode() for file in files}
    shard = write_tar(tmp_path / "a.tar", members)
    for kind, path in (("folder", tree), ("webdataset", shard)):
        data = {"kind": kind, "path": str(path), "size": 16, "split": "all"}
        train(training_file(kind, data=data, steps=3))
    assert losses(tmp_path / "folder") == losses(tmp_path / "webdataset")
