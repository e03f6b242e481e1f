"""Bad input: one line that says what is wrong and what would be right, before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import Result

import ditkit.hub


def one_line_error(result: Result, code: int = 2) -> str:
    """The message of a command that refused: one line on the error stream, nothing on the other one."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """None of these may get as far as loading a model, but for those marked as such."""
    if "folder" not in request.fixturenames:
        monkeypatch.setattr(ditkit.hub, "load", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("generate apple --with taylorser", "unknown method 'taylorser'. Did you mean 'taylorseer'"),
        ("bench --with taylorser:interval=2", "unknown method 'taylorser'. Did you mean 'taylorseer'"),
        ("methods taylorser", "Did you mean 'taylorseer'"),
        ("generate apple --with taylorseer:intervall=2", "no option 'intervall'; it has"),
        ("generate apple --with taylorseer:interval=two", "interval='two' is not of type int"),
        ("generate apple --with taylorseer:interval", "'interval' is not of the form option=value"),
        ("generate apple --with taylorseer:interval=0", "interval"),
        ("generate apple --with taylorseer --with taylorser", "unknown method 'taylorser'"),
        ("generate ' '", "a prompt is empty"),
        ("generate apple --size 64by64", "--size '64by64': give pixels as 64, or as 96x64"),
        ("generate apple --size 0x64", "--size '0x64'"),
        ("generate apple --out apple.txt", "--out apple.txt: the name has to end in .png"),
        ("generate apple --out .", "--out .: the name has to end in .png"),
        ("bench --prompts missing.txt", "--prompts not found: missing.txt"),
        ("generate apple --recipe missing.yaml", "--recipe not found: missing.yaml"),
        ("bench --recipe missing.yaml", "--recipe not found: missing.yaml"),
        ("tune --max-error 0", "--max-error 0: a number above 0 is needed"),
        ("tune --max-error 0.1 --prompts missing.txt", "--prompts not found: missing.txt"),
        ("tune --max-error 0.1 --method taylorser", "Did you mean 'taylorseer'"),
        ("tune --max-error 0.1 --weights sla", "--weights 'sla' is not of the form name=folder"),
        ("tune --max-error 0.1 --weights sla=nowhere", "there is no folder nowhere"),
        ("train missing.yaml", "config not found: missing.yaml"),
        ("data emoji --preview sheet.pdf", "--preview sheet.pdf: the name has to end in .png or .webp"),
    ],
)
def test_wrong_use(ditkit, tmp_path: Path, line: str, expected: str) -> None:
    assert expected in one_line_error(ditkit(line))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line", ["generate apple --steps 0", "bench --repeats 0", "generate apple --seed -1"]
)
def test_values_out_of_range(ditkit, line: str) -> None:
    result = ditkit(line)
    assert result.exit_code == 2
    assert "Invalid value" in result.stderr


def test_a_file_where_a_folder_is_needed(ditkit, tmp_path: Path) -> None:
    Path("taken").write_text("x")
    assert "taken is not a folder" in one_line_error(ditkit("bench --out taken"))
    assert "taken is not a folder" in one_line_error(ditkit("generate apple --out taken/apple.png"))
    assert "sheets.png is a folder" in one_line_error(_with_folder(ditkit, "generate apple --out sheets.png"))


def _with_folder(ditkit, line: str):
    Path("sheets.png").mkdir()
    return ditkit(line)


def test_a_place_that_cannot_be_written(ditkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made to fail rather than made read-only: the superuser may write anywhere."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13), str(tmp_path / "locked"))

    monkeypatch.setattr("ditkit.cli.common.tempfile.NamedTemporaryFile", refuse)
    message = one_line_error(ditkit("generate apple --out locked/apple.png"))
    assert "cannot write to locked (Permission denied)" in message


def test_an_empty_list_of_prompts(ditkit) -> None:
    Path("empty.txt").write_text("\n \n")
    assert "--prompts empty.txt holds no prompt" in one_line_error(ditkit("bench --prompts empty.txt"))


def test_a_bad_recipe(ditkit) -> None:
    Path("recipe.yaml").write_text("methods: [{taylorseer: {intervall: 2}}]")
    assert "no option 'intervall'" in one_line_error(ditkit("generate apple --recipe recipe.yaml"))
    Path("recipe.yaml").write_text("methds: []")
    assert "methds: no such key" in one_line_error(ditkit("generate apple --recipe recipe.yaml"))


def test_overrides_of_training(ditkit) -> None:
    Path("run.yaml").write_text("output: runs/x\nstages: []\n")
    assert "'lr' is not of the form key=value" in one_line_error(ditkit("train run.yaml lr"))


def test_a_training_file_that_is_wrong(ditkit, tmp_path: Path) -> None:
    Path("run.yaml").write_text("output: runs/x\nstages:\n  - {name: a, task: autoencoder, stepz: 3}\n")
    assert "stepz" in one_line_error(ditkit("train run.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_two_methods_on_one_seam(ditkit, folder: Path, tmp_path: Path) -> None:
    line = f"generate apple --model {folder} --with taylorseer:interval=2 --with taylorseer:interval=3"
    message = one_line_error(ditkit(line))
    assert "interval=2" in message
    assert "interval=3" in message
    assert list(tmp_path.rglob("*.png")) == []


def test_a_model_that_is_not_there(ditkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert "no-such-model" in one_line_error(ditkit("generate apple --model ./no-such-model"))


def test_a_failure_of_the_work_itself(
    ditkit, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, what went wrong, where to see more, and no half of an output."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("ditkit.analysis.sampling.sample", fail)
    message = one_line_error(ditkit(f"generate apple --model {folder} --out a.png"), code=1)
    assert "RuntimeError: out of memory (ditkit --debug shows where)" in message
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(ditkit) -> None:
    result = ditkit("--debug generate apple --with taylorser")
    assert type(result.exception).__name__ == "UnknownNameError"


def test_markup_in_a_message_is_text(ditkit) -> None:
    assert "'[bold]x[/]'" in one_line_error(ditkit("generate apple --with '[bold]x[/]'"))


def test_a_pipeline_without_text(ditkit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Labelled:
        def __call__(self, class_labels): ...

        def set_progress_bar_config(self, **_): ...

    monkeypatch.setattr("ditkit.hub.load", lambda _: Labelled())
    assert "--model any: Labelled takes no text prompt" in one_line_error(
        ditkit("generate apple --model any")
    )
