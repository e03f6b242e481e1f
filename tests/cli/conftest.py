from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tiny_pipelines
from ditkit.cli import app, common


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline."""
    path = tmp_path_factory.mktemp("tiny-flux")
    tiny_pipelines.flux().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline that draws clips, 17 frames of 64 pixels in a plain call."""
    path = tmp_path_factory.mktemp("tiny-wan")
    tiny_pipelines.wan().save_pretrained(path)
    call = {"height": 64, "width": 64, "num_frames": 17, "guidance_scale": 2.0}
    (path / "call.json").write_text(json.dumps(call))
    return path


@pytest.fixture
def ditkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command line in an empty folder, e.g. `ditkit("generate 'red apple' --seed 3")`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for console in (common.console, common.notices):  # where it was set before they were made, they keep it
        monkeypatch.setattr(console, "_width", None)
        monkeypatch.setattr(console, "_height", None)

    def run(line: str) -> Result:
        return CliRunner().invoke(app, shlex.split(line))

    return run
