"""Every command explains itself."""

from __future__ import annotations

import re

import pytest
from typer.main import get_command

from ditkit import __version__
from ditkit.cli import app


def commands() -> list[str]:
    """All commands, those of groups with the group's name before them."""
    names: list[str] = []
    for name, command in get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        inner = getattr(command, "commands", None)
        names += [f"{name} {sub}" for sub in inner] if inner else [name]
    return names


def test_the_commands_that_users_are_promised() -> None:
    promised = {
        "demo", "generate", "methods", "models", "bench", "train", "eval", "convert", "data emoji",
        "fit", "tune", "compare",
    }  # fmt: skip
    assert promised <= set(commands())


@pytest.mark.parametrize("command", ["", *commands()])
def test_help_has_an_example(ditkit, command: str) -> None:
    result = ditkit(f"{command} --help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert re.search(rf"Example: ditkit {command}", text), text


@pytest.mark.parametrize("command", commands())
def test_every_option_is_explained(command: str) -> None:
    group = get_command(app)
    for name in command.split():
        group = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    assert group.help
    for parameter in group.params:
        assert parameter.name == "help" or parameter.help, f"{command}: {parameter.name}"


def test_version(ditkit) -> None:
    assert ditkit("--version").stdout == f"ditkit {__version__}\n"


def test_an_unknown_command_is_wrong_use(ditkit) -> None:
    result = ditkit("generat apple")
    assert result.exit_code == 2
    assert "generate" in result.stderr
