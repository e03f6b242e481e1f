"""`ditkit train`, then `ditkit generate` with the folder that it exported; `ditkit data cache-latents`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import ditkit as package
from data.conftest import autoencoder, tree  # noqa: F401  (fixtures)
from ditkit.pipelines.class_conditional import ClassConditionalPipeline
from ditkit.seams.facts.ours import REFUSED
from pipelines.test_text_conditional import pipeline as text_pipeline
from training.conftest import TINY_DIT


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that tiny trainings of both processes exported."""
    from ditkit.training.trainer import train

    folders = {}
    for process in ("gaussian", "flow"):
        folder = tmp_path_factory.mktemp(process)
        options: dict[str, Any] = {**TINY_DIT["task_options"], "process": process}
        path = folder / "run.yaml"
        changes: dict[str, Any] = {"output": str(folder / "run"), "steps": 40, "task_options": options}
        changes |= {"checkpoint_every": 40, "optimizer": {"lr": 1e-2}}  # fast: classes have to show
        path.write_text(yaml.safe_dump({**TINY_DIT, **changes}))
        folders[process] = train(path)
    return folders


@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_a_class_by_name_and_by_number(ditkit, exported: dict[str, Path], process: str) -> None:
    model = exported[process]
    for name, asked in (("a", "Keycap"), ("b", "1"), ("c", "flag")):
        result = ditkit(f"generate '{asked}' --model {model} --steps 3 --out {name}.png")
        assert result.exit_code == 0, result.output
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    with Image.open("a.png") as image:
        assert image.size == (8, 8)


def test_classes_that_are_not_there(ditkit, exported: dict[str, Path], tmp_path: Path) -> None:
    for asked, message in (
        ("keycaps", "no class 'keycaps': did you mean 'keycap'?"),
        ("zebra", "no class 'zebra': there are flag, keycap."),
        ("2", "A number from 0 to 1 does too"),
    ):
        result = ditkit(f"generate flag {asked} --model {exported['flow']} --out x.png")
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_with_a_method(ditkit, exported: dict[str, Path]) -> None:
    line = f"generate flag keycap --model {exported['flow']} --steps 8"
    dense = ditkit(f"{line} --out a.png")
    fast = ditkit(f"{line} --with taylorseer:interval=3,order=1 --out b.png")
    assert dense.exit_code == fast.exit_code == 0, fast.output
    assert "forecast" in fast.stderr
    assert Path("a-1.png").read_bytes() != Path("b-1.png").read_bytes()


def test_bench_of_classes(ditkit, exported: dict[str, Path]) -> None:
    line = f"bench --model {exported['flow']} --steps 4 --repeats 1 --no-peers --with taylorseer:interval=2"
    for options, drawn in (("", ["flag", "keycap"] * 4), ("-p Flag -p 1", ["Flag", "1"])):
        result = ditkit(f"{line} {options} --out bench")
        assert result.exit_code == 0, result.output
        found = json.loads(Path("bench/bench.json").read_text())
        assert found["prompts"] == drawn
        kinds = {row["kind"]: row for row in found["rows"]}
        assert kinds["dense"]["latent_error"] == 0 < kinds["method"]["latent_error"]
    refused = ditkit(f"{line} -p zebra --out other")
    assert refused.exit_code == 2 and "no class 'zebra'" in refused.stderr
    assert not Path("other").exists()


def test_tune_of_classes(ditkit, exported: dict[str, Path]) -> None:
    line = f"tune --model {exported['flow']} --max-error 0.5 --steps 4 --trials 2 --repeats 1"
    result = ditkit(f"{line} --method taylorseer --out tune")
    assert result.exit_code == 0, result.output
    drawn = ditkit(f"generate flag --model {exported['flow']} --recipe tune/recipe.yaml --out a.png")
    assert drawn.exit_code == 0, drawn.output
    Path("classes.txt").write_text("flag\nzebra\n")
    refused = ditkit(f"{line} --prompts classes.txt --out other")
    assert refused.exit_code == 2 and "no class 'zebra'" in refused.stderr
    assert not Path("other").exists()


def test_eval_of_classes(ditkit, exported: dict[str, Path], folder: Path, tree: Path) -> None:  # noqa: F811
    """Groups of the emoji need no data; the drawn pictures are as frequent as the true ones."""
    result = ditkit(f"eval {exported['flow']} --count 12 --steps 2 --out found")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("found/eval.json").read_text())
    assert set(found["by_class"]) == {"flag", "keycap"}
    assert sum(asked for _, asked in found["by_class"].values()) == 12
    assert f"{100 * found['recognised']:.1f} %" in result.stdout
    assert "not FID" in " ".join(result.stdout.split())
    assert Path("found/pictures.png").is_file()
    others = ditkit(f"eval {exported['flow']} --data {tree} --out other")
    assert others.exit_code != 0 and "not among those of training" in others.stderr
    text = ditkit(f"eval {folder} --data {tree} --out other")
    assert text.exit_code == 2 and "--data is for class-conditional models" in text.stderr
    assert not Path("other").exists()


@pytest.mark.parametrize("arch", ["pt-dit", "dico"])
def test_a_text_and_a_method_that_can_not_work(ditkit, tmp_path: Path, arch: str) -> None:
    text_pipeline(arch).save_pretrained("texts")
    drawn = ditkit(
        "generate 'red apple' 'blue fish' --model texts --steps 2 --guidance 2 --size 16 --out a.png"
    )
    assert drawn.exit_code == 0, drawn.output
    with Image.open("a-2.png") as image:
        assert image.size == (16, 16)
    refused = ditkit("generate 'red apple' --model texts --steps 2 --with taylorseer:interval=2 --out b.png")
    cls = {"pt-dit": "PTDiT", "dico": "DiCo"}[arch]
    assert refused.exit_code == 2 and REFUSED[cls] in " ".join(refused.stderr.split())
    assert not Path("b.png").exists()


def test_another_model_guides(ditkit, exported: dict[str, Path]) -> None:
    line = f"generate flag --model {exported['flow']} --steps 3"
    guide = f"--guide-model {exported['flow']}"
    for name, options in (
        ("plain", "--guidance 1"),
        ("itself", f"{guide} --guidance 3"),
        ("off", f"{guide} --guidance 1"),
        ("early", "--guidance 3 --guide-range 0.9,1"),
        ("whole", "--guidance 3"),
    ):
        result = ditkit(f"{line} {options} --out {name}.png")
        assert result.exit_code == 0, result.output
    drawn = {name: Path(f"{name}.png").read_bytes() for name in ("plain", "itself", "off", "early", "whole")}
    assert drawn["plain"] == drawn["itself"] == drawn["off"]
    assert len(set(drawn.values())) == 3
    for options, message in (
        ("--guide-model nowhere", "--guide-model nowhere: no model folder"),
        (f"--guide-model {exported['gaussian']}", "does not fit a DiT"),
        ("--guide-range 0.9", "--guide-range '0.9': give two shares of noise"),
    ):
        refused = ditkit(f"{line} {options} --out x.png")
        assert refused.exit_code != 0 and message in " ".join(refused.stderr.split()), refused.stderr
        assert not Path("x.png").exists()


def test_the_folder_is_a_pipeline(exported: dict[str, Path]) -> None:
    for folder in exported.values():
        for pipe in (ClassConditionalPipeline.from_pretrained(folder), package.load(folder)):
            assert type(pipe) is ClassConditionalPipeline and pipe.class_names == ["flag", "keycap"]
            pipe.set_progress_bar_config(disable=True)
            start = torch.randn(1, 3, 8, 8)
            drawn = [
                pipe(
                    label,
                    num_inference_steps=1,
                    latents=start,
                    output_type="latent",
                    generator=torch.Generator().manual_seed(0),
                ).images
                for label in ("flag", 0, "0")
            ]
            assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_names_in_another_number_are_refused(exported: dict[str, Path]) -> None:
    pipe = package.load(exported["flow"])
    with pytest.raises(ValueError, match="3 names for a model of 2 classes"):
        ClassConditionalPipeline(pipe.transformer, pipe.scheduler, None, ["a", "b", "c"])
    plain = ClassConditionalPipeline(pipe.transformer, pipe.scheduler)
    assert plain.find("1") == 1
    with pytest.raises(ValueError, match="have no names; give 0 to 1"):
        plain.find("flag")


def test_cached_latents_train(ditkit, tree: Path, autoencoder: Path, tmp_path: Path) -> None:  # noqa: F811
    line = (
        f"data cache-latents --autoencoder {autoencoder} --data kind=folder --data path={tree} --data size=16"
    )
    result = ditkit(f"{line} --shard-size 5 --out latents")
    assert result.exit_code == 0, result.output
    assert result.stdout == "12 latents in 3 shards\nlatents\n"
    run = {
        **TINY_DIT, "output": "run", "steps": 2, "sample_every": 2,
        "data": {"kind": "latents", "path": "latents", "split": "all"},
        "task_options": {**TINY_DIT["task_options"], "pixels": None},
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(run))
    for file in tree.rglob("*.png"):
        file.unlink()
    trained = ditkit("train run.yaml")
    assert trained.exit_code == 0, trained.output
    drawn = ditkit("generate green --model run/tiny/export --steps 2 --out green.png")
    assert drawn.exit_code == 0, drawn.output
    with Image.open("green.png") as image:
        assert image.size == (16, 16)
    facts = [file.read_text() for file in Path("run/tiny/export").rglob("*.json")]
    assert not any(str(tmp_path) in text for text in facts)
    shard = Path("latents/latents-00001.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    refused = ditkit("train run.yaml output=again")
    assert refused.exit_code != 0
    assert "latents-00001.safetensors" in refused.stderr and "cache-latents` again" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data kind=folder --autoencoder vae", "--data : Value error, kind: folder needs path"),
        ("--data kind --autoencoder vae", "'kind' is not of the form key=value"),
        ("--data kinds=folder --autoencoder vae", "--data kinds"),
        ("--data kind=emoji --autoencoder nowhere", "--autoencoder nowhere: no folder"),
        ("--data kind=emoji --autoencoder vae --dtype int8", "--dtype='int8'"),
    ],
)
def test_wrong_use_of_cache_latents(ditkit, autoencoder: Path, options: str, message: str) -> None:  # noqa: F811
    result = ditkit(f"data cache-latents {options} --out latents")
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not Path("latents").exists()


def test_pixels_and_latents_exclude_each_other(ditkit, tree: Path, autoencoder: Path) -> None:  # noqa: F811
    data = f"--data kind=folder --data path={tree} --data size=16"
    assert ditkit(f"data cache-latents --autoencoder {autoencoder} {data} --out latents").exit_code == 0
    run = {**TINY_DIT, "output": "run", "data": {"kind": "latents", "path": "latents", "split": "all"}}
    Path("run.yaml").write_text(json.dumps(run))
    result = ditkit("train run.yaml")
    assert result.exit_code == 2 and "the data are latents" in result.stderr
