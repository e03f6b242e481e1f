from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tiny_pipelines
from ditkit.cli import app


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline."""
    path = tmp_path_factory.mktemp("tiny-flux")
    tiny_pipelines.flux().save_pretrained(path)
    return path


@pytest.fixture
def ditkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command line in an empty folder, e.g. `ditkit("generate 'red apple' --seed 3")`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(line: str) -> Result:
        return CliRunner().invoke(app, shlex.split(line))

    return run


def one_line_error(result: Result, code: int = 2) -> str:
    """The message of a command that refused: one line on the error stream, nothing on the other one."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
