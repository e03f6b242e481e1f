"""`ditkit adapt`, then `ditkit generate --adapter` with what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.conftest import tree  # noqa: F401  (a fixture)
from training_recipes import stopped_after


def adapt(ditkit, folder: Path, tree: Path, out: str, more: str = ""):  # noqa: F811
    line = f"adapt --model {folder} --data {tree} --out {out} --steps 3 --batch-size 4"
    return ditkit(f"{line} data.split=all tracker=null {more}")


@pytest.mark.parametrize("method", ["diffscaler", "td-lora", "lora"])
def test_train_and_draw(ditkit, folder: Path, tree: Path, method: str) -> None:  # noqa: F811
    done = adapt(ditkit, folder, tree, "a", f"--method {method} --set rank=2 --lr 0.05")
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == ["a"] and "--adapter a" in done.stderr
    assert sorted(path.name for path in Path("a").iterdir()) == [
        "adapter.json", "adapter_config.json", "adapter_model.safetensors", "run",
    ]  # fmt: skip
    draw = f"generate 'red apple' --model {folder} --steps 2"
    for name, how in (
        ("plain", ""),
        ("all", "--adapter a"),
        ("none", "--adapter a:0"),
        ("two", "--adapter a --adapter a"),
    ):
        drawn = ditkit(f"{draw} {how} --out {name}.png")
        assert drawn.exit_code == 0, drawn.output
    plain, whole, none, two = (Path(f"{name}.png").read_bytes() for name in ("plain", "all", "none", "two"))
    assert plain == none and len({plain, whole, two}) == 3


def test_stopped_and_continued(ditkit, folder: Path, tree: Path) -> None:  # noqa: F811
    whole = adapt(ditkit, folder, tree, "whole", "checkpoint_every=1")
    assert whole.exit_code == 0, whole.output
    with stopped_after(2):
        assert adapt(ditkit, folder, tree, "broken", "checkpoint_every=1").exit_code != 0
    assert not Path("broken/adapter_config.json").exists()
    again = adapt(ditkit, folder, tree, "broken", "checkpoint_every=1")
    assert again.exit_code == 2 and "--resume" in again.stderr
    assert adapt(ditkit, folder, tree, "broken", "checkpoint_every=1 --resume").exit_code == 0
    one, other = (load_file(Path(name, "adapter_model.safetensors")) for name in ("whole", "broken"))
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--method loora", "unknown adapter 'loora'. Did you mean 'lora'"),
        ("--set ranks=2", "lora: no option 'ranks'"),
        ("--set rank", "'rank' is not of the form key=value"),
        ("--layers query", "no layer 'query'"),
        ("--lr 0", "a learning rate is above 0"),
        ("stepps=3", "stepps: no such key"),
    ],
)
def test_wrong_use(ditkit, folder: Path, tree: Path, more: str, words: str) -> None:  # noqa: F811
    result = adapt(ditkit, folder, tree, "a", more)
    assert result.exit_code == 2 and words in " ".join(result.stderr.split()), result.output
    assert not Path("a/adapter_config.json").exists()


def test_wrong_models_and_data(ditkit, folder: Path, clips_folder: Path, tree: Path) -> None:  # noqa: F811
    result = adapt(ditkit, clips_folder, tree, "a")
    words = "a WanPipeline is trained on clips; there are the bundled ones, --data emoji"
    assert result.exit_code == 2 and words in result.stderr
    result = adapt(ditkit, folder, Path("nowhere"), "a")
    assert result.exit_code == 2 and "no such folder of pictures" in result.stderr
    Path("empty").mkdir()
    for how, words in (
        ("nowhere", "no folder nowhere"),
        ("empty", "no adapter at empty"),
        ("empty:x", "not a number"),
    ):
        result = ditkit(f"generate 'red apple' --model {folder} --adapter {how} --out x.png")
        assert result.exit_code == 2 and words in result.stderr, result.output
