"""The worked examples of CONTRIBUTING.md, taken from the page and run."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import yaml
from typer.testing import CliRunner

import ditkit
import tiny_pipelines
from ditkit import registry
from ditkit.analysis.sampling import Sampling, sample
from ditkit.cli import app
from ditkit.processes.transport import Transport
from ditkit.training.config import ConfigError, load
from ditkit.training.trainer import train

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
PROMPTS = ["red apple", "blue fish"]
SAMPLING = Sampling(steps=7, guidance=2.0)


@contextmanager
def on_the_page(kind: Literal["method", "objective"], module: str, folder: Path) -> Iterator[ModuleType]:
    """The example that the page calls by that file, as a module in the package, gone afterwards."""
    place, name = module.replace(".", "/"), module.rpartition(".")[2]
    (source,) = re.findall(rf"```python\n# src/{place}\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = folder / f"{name}.py"
    path.write_text(source)
    registry.entries(kind)
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    try:
        spec.loader.exec_module(loaded)
        yield loaded
    finally:
        registry._entries.pop((kind, name), None)
        del sys.modules[spec.name]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    with on_the_page("method", "ditkit.methods.hold", tmp_path_factory.mktemp("example")) as module:
        yield module


@pytest.fixture(scope="module")
def objective(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("objective")
    with on_the_page("objective", "ditkit.training.objectives.direction", folder) as module:
        yield module


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.flux()


def latents(pipe) -> torch.Tensor:
    drawn = sample(pipe, PROMPTS, SAMPLING)
    assert drawn.latents is not None
    return drawn.latents


def test_off_is_off(example, pipe) -> None:
    dense = latents(pipe)
    entry = registry.get("method", "hold")
    with ditkit.apply(pipe, entry.target(**entry.neutral)):
        assert torch.equal(latents(pipe), dense)


def test_on_it_skips_and_leaves_no_trace(example, pipe) -> None:
    dense = latents(pipe)
    with ditkit.apply(pipe, registry.parse_method("hold:every=3")) as run:
        first = latents(pipe)
        assert torch.equal(latents(pipe), first)
    assert not torch.equal(first, dense)
    report = run.report()
    assert report.generations == 2
    assert (report.steps_computed, report.steps_forecast) == (2 * 3, 2 * 4)
    assert report.flops is not None
    assert report.flops < 0.55 * report.flops_dense
    assert report.bytes_cached == 2 * len(PROMPTS) * 16 * 32 * 4  # two branches of (B, 16, 32) in float32
    assert torch.equal(latents(pipe), dense)


def test_the_commands_find_it(example) -> None:
    result = CliRunner().invoke(app, ["methods", "hold"])
    assert result.exit_code == 0, result.output
    assert "2407.01425" in result.stdout
    assert "every" in result.stdout


def test_wrong_options_are_named(example) -> None:
    with pytest.raises(registry.OptionError, match="hold: every must be at least 1; got 0"):
        registry.parse_method("hold:every=0")
    with pytest.raises(registry.OptionError, match="no option 'evry'; it has every"):
        registry.parse_method("hold:evry=2")


def run_of(process: str, folder: Path, **objective: Any) -> Path:
    """A training file of one step."""
    options = {"arch": "dit", "process": process, "pixels": 8,
               "model": {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 1}}  # fmt: skip
    run = {"output": str(folder / "run"), "name": "tiny", "task": "class-to-image", "steps": 1,
           "batch_size": 4, "precision": "no", "tracker": None, "log_every": 1,
           "data": {"groups": ["keycap"]},
           "task_options": options, "objective": objective}  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def test_the_objective_trains(objective, tmp_path) -> None:
    train(run_of("flow", tmp_path, direction={"weight": 0.5}))
    (row,) = map(json.loads, (tmp_path / "run/tiny/metrics.jsonl").read_text().splitlines())
    assert row["direction"] == pytest.approx(1.0, abs=1e-6)  # the network starts at zero, in no direction
    stage = load(run_of("flow", tmp_path), ["objective.direction.weight=2"]).stages[0]
    assert stage.objective == {"direction": {"weight": 2}}
    listed = CliRunner().invoke(app, ["objectives", "direction"])
    assert listed.exit_code == 0 and "2410.10356" in listed.stdout and "weight" in listed.stdout


def test_the_objective_is_what_it_says(objective) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    made = objective.Direction(objective.DirectionOptions(), SimpleNamespace(process=Transport()))
    step = SimpleNamespace(clean=clean, noise=noise, timestep=torch.rand(2), output=3 * (clean - noise))
    torch.testing.assert_close(made.terms(step)["direction"].value, torch.zeros(2), atol=1e-6, rtol=0)
    step.output = noise - clean
    torch.testing.assert_close(made.terms(step)["direction"].value, torch.full((2,), 2.0))


def test_the_objective_refuses_what_it_does_not_fit(objective, tmp_path) -> None:
    with pytest.raises(ConfigError, match="direction: it compares velocities"):
        train(run_of("gaussian", tmp_path, direction=None))


def test_the_commands_on_the_page_are_real() -> None:
    """Every `make` target and command that the page shows exists."""
    text = PAGE.read_text()
    makefile = (PAGE.parent / "Makefile").read_text()
    targets = {word for line in re.findall(r"^make ([a-z ]+)", text, re.MULTILINE) for word in line.split()}
    assert targets >= {"test", "format", "lint"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for command in set(re.findall(r"^ditkit (\w+)", text, re.MULTILINE)):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
