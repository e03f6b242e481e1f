"""The commands at work, on a tiny pipeline read from a folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

TINY = "--steps 4 --size 16"


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_one_picture(ditkit, folder: Path, tmp_path: Path) -> None:
    result = ditkit(f"generate 'red apple' --model {folder} {TINY} --seed 7 --out deep/apple.png")
    assert result.exit_code == 0, result.output
    assert result.stdout == "deep/apple.png\n"
    assert written(tmp_path) == {"deep/apple.png"}
    with Image.open("deep/apple.png") as image:
        assert image.size == (16, 16)


def test_the_same_seed_gives_the_same_file(ditkit, folder: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert (
            ditkit(f"generate 'red apple' --model {folder} {TINY} --seed {seed} --out {name}.png").exit_code
            == 0
        )
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_several_prompts_are_numbered(ditkit, folder: Path, tmp_path: Path) -> None:
    result = ditkit(f"generate apple rocket fish --model {folder} {TINY} --batch 2 --out p.webp")
    assert result.stdout.split() == ["p-1.webp", "p-2.webp", "p-3.webp"]
    assert written(tmp_path) == {"p-1.webp", "p-2.webp", "p-3.webp"}


def test_a_sheet(ditkit, folder: Path, tmp_path: Path) -> None:
    assert ditkit(f"generate apple rocket --model {folder} {TINY} --sheet --out s.png").stdout == "s.png\n"
    with Image.open("s.png") as image:
        assert image.width > 2 * 112
    assert written(tmp_path) == {"s.png"}


def test_with_methods(ditkit, folder: Path) -> None:
    line = f"generate apple --model {folder} --steps 8 --size 16 --with taylorseer:interval=3,order=1"
    result = ditkit(f"{line} --with local-window:radius=2 --out m.png")
    assert result.exit_code == 0, result.output
    assert Path("m.png").exists()
    assert "forecast" in result.stderr


def test_bench_writes_three_files(ditkit, folder: Path, tmp_path: Path) -> None:
    line = f"bench --model {folder} --steps 6 --size 16 --repeats 1 -p apple -p fish --out b --no-peers"
    result = ditkit(f"{line} --with taylorseer:interval=2 --with local-window:radius=2")
    assert result.exit_code == 0, result.output
    assert written(tmp_path) == {"b/bench.json", "b/bench.csv", "b/bench.html"}
    found = json.loads(Path("b/bench.json").read_text())
    kinds = [row["kind"] for row in found["rows"]]
    assert kinds == ["dense", "method", "method", "plain"]
    assert found["settings"]["model"] == str(folder)
    with Path("b/bench.csv").open(newline="") as stream:
        assert [row["label"] for row in csv.DictReader(stream)] == [row["label"] for row in found["rows"]]
    for row in found["rows"]:
        assert row["label"].split(":")[0] in result.stdout


RECIPE = """
model: {name: tiny, class: FluxTransformer2DModel}
methods:
  - taylorseer: {interval: 3, granularity: last-block}
settings: {steps: 6, size: [16, 16]}
"""


def test_generate_with_a_recipe(ditkit, folder: Path) -> None:
    """Steps and size come from the recipe where the command does not say."""
    Path("recipe.yaml").write_text(RECIPE)
    line = f"generate apple --model {folder}"
    assert ditkit(f"{line} --recipe recipe.yaml --out a.png").exit_code == 0
    told = "--steps 6 --size 16 --with taylorseer:interval=3,granularity=last-block"
    assert ditkit(f"{line} {told} --out b.png").exit_code == 0
    Path("fewer.yaml").write_text(RECIPE + "steps: 4\n")
    assert "3 computed + 1 forecast = 4" in ditkit(f"{line} --recipe fewer.yaml --out c.png").stderr
    assert ditkit(f"{line} --recipe fewer.yaml --steps 6 --out d.png").exit_code == 0
    a, b, c, d = (Path(f"{name}.png").read_bytes() for name in "abcd")
    assert a == b == d
    assert c != a


def test_a_recipe_for_another_model(ditkit, folder: Path, tmp_path: Path) -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("FluxTransformer2DModel", "WanTransformer3DModel"))
    for command in ("generate apple", "bench -p apple"):
        result = ditkit(f"{command} --model {folder} --recipe recipe.yaml --out out/x.png")
        assert result.exit_code == 2
        assert "WanTransformer3DModel" in result.stderr
        assert "FluxTransformer2DModel" in result.stderr
    assert written(tmp_path) == {"recipe.yaml"}


def test_bench_with_a_recipe(ditkit, folder: Path) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    line = f"bench --model {folder} --repeats 1 -p apple --recipe recipe.yaml --no-peers --out b"
    assert ditkit(line).exit_code == 0
    found = json.loads(Path("b/bench.json").read_text())
    assert [row["label"] for row in found["rows"]][:2] == [
        "dense",
        "taylorseer:interval=3,granularity=last-block",
    ]
    assert found["settings"]["steps"] == 6
    assert found["settings"]["size"] == [16, 16]


def test_bench_explains_first(ditkit, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.seams.cost.LITTLE", 1.2)
    line = f"bench --model {folder} --steps 6 --size 16 --repeats 1 -p apple --out b --no-peers --no-plain"
    result = ditkit(f"{line} --explain --with taylorseer:interval=2 --with local-window:radius=2")
    assert result.exit_code == 0, result.output
    assert "too little for sparse attention to pay" in " ".join(result.stdout.split())
    rows = {row["label"]: row for row in json.loads(Path("b/bench.json").read_text())["rows"]}
    taylor = rows["taylorseer:interval=2"]
    assert taylor["flops_ratio"] >= 1 / taylor["ceiling"] - 1e-6
    assert 0 < taylor["predicted"] < 1.5
    assert rows["dense"]["ceiling"] is None


@pytest.mark.slow
def test_tune(ditkit, folder: Path, tmp_path: Path) -> None:
    Path("prompts.txt").write_text("apple\nfish\n")
    line = f"tune --model {folder} --steps 4 --size 16 --prompts prompts.txt --method taylorseer --repeats 1"
    result = ditkit(f"{line} --max-error 0.5 --trials 2 --out t")
    assert result.exit_code == 0, result.output
    files = written(tmp_path)
    assert {"t/recipe.yaml", "t/report.html", "t/tune.json", "t/study.jsonl", "t/front/01.yaml"} <= files
    assert "t/recipe.yaml" in result.stdout.splitlines()
    generated = ditkit(f"generate apple --model {folder} --recipe t/recipe.yaml --out a.png")
    assert generated.exit_code == 0, generated.output
    refused = ditkit(f"{line} --max-error 0.5 --trials 2 --out t --seed 5")
    assert refused.exit_code == 2
    assert "its seed is 0, now it is 5" in refused.stderr


def test_demo(ditkit, folder: Path, tmp_path: Path) -> None:
    """The tiny model's own size would be FLUX's 1024 pixels; the demo takes the model's."""
    result = ditkit(f"demo --model {folder} --steps 5 --repeats 1 --size 16 --no-clips --out show")
    assert result.exit_code == 0, result.output
    files = written(tmp_path)
    assert {"show/report.html", "show/demo.png", "show/demo.json", "show/demo.csv"} <= files
    assert sum(name.startswith("show/pictures/") for name in files) == 8 * 5
    assert result.stdout.splitlines()[-2:] == ["show/demo.png", "show/report.html"]


def test_methods(ditkit) -> None:
    listed = ditkit("methods").stdout
    assert "taylorseer" in listed
    assert "2503.06923" in listed
    assert "local-window" in listed
    detail = ditkit("methods taylorseer").stdout
    assert "interval" in detail
    assert "https://arxiv.org/abs/2503.06923" in detail
    assert "2 to 10" in detail
    assert "where order is 2" in " ".join(detail.split())


def test_models(ditkit) -> None:
    assert "micro-flux" in ditkit("models").stdout
    listed = ditkit("models --classes").stdout
    assert "WanTransformer3DModel" in listed and "PriorTransformer" in listed


def test_emoji(ditkit, tmp_path: Path) -> None:
    result = ditkit("data emoji --preview sheet.png --count 9")
    assert result.exit_code == 0, result.output
    assert "single" in result.stdout
    with Image.open("sheet.png") as image:
        assert image.size == (3 * 64, 3 * 64)
    assert written(tmp_path) == {"sheet.png"}


@pytest.mark.parametrize("option", ["--out", "-o"])
def test_short_names(ditkit, folder: Path, option: str) -> None:
    assert ditkit(f"generate apple -m {folder} {TINY} {option} short.png").exit_code == 0


def test_eval(ditkit, folder: Path, tmp_path: Path) -> None:
    result = ditkit(f"eval {folder} --count 3 --steps 2 --out found")
    assert result.exit_code == 0, result.output
    assert written(tmp_path) == {"found/eval.json", "found/pictures.png", "found/unseen.png"}
    found = json.loads(Path("found/eval.json").read_text())
    assert len(found["captions"]) == 3
    assert sum(asked for _, asked in found["by_group"].values()) == 3
    assert f"{100 * found['accuracy']:.1f} %" in result.stdout


def test_convert(ditkit, tmp_path: Path) -> None:
    from ditkit.models.dit import DiT

    sizes = {"input_size": 4, "hidden_size": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    torch.save(DiT(**sizes).state_dict(), "authors.pt")
    refused = ditkit("convert authors.pt --out converted")
    assert refused.exit_code == 2
    assert "num_heads" in refused.stderr
    assert written(tmp_path) == {"authors.pt"}
    torch.save(DiT.from_pretrained, "unsafe.pt")
    assert "can't be loaded safely" in ditkit("convert unsafe.pt --out converted").stderr
    assert written(tmp_path) == {"authors.pt", "unsafe.pt"}
