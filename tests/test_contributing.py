"""The worked example of CONTRIBUTING.md, taken from the page and run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

import ditkit
import tiny_pipelines
from ditkit import registry
from ditkit.analysis.sampling import Sampling, sample
from ditkit.cli import app

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
PROMPTS = ["red apple", "blue fish"]
SAMPLING = Sampling(steps=7, guidance=2.0)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The example as a module in the package, gone after the tests."""
    (source,) = re.findall(r"```python\n# src/ditkit/methods/hold\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("example") / "hold.py"
    path.write_text(source)
    registry.entries("method")
    spec = importlib.util.spec_from_file_location("ditkit.methods.hold", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        registry._entries.pop(("method", "hold"), None)
        del sys.modules[spec.name]


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
