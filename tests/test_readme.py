"""What the README names is there: files, commands, targets, methods, public names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

import ditkit
from ditkit import registry
from ditkit.cli import app

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


LINKS = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#:]+)\)", TEXT)  # not the pictures


@pytest.mark.parametrize("link", sorted(set(LINKS)))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_commands_exist() -> None:
    known = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    named = set(re.findall(r"(?:`|bin/)ditkit (\w+)", TEXT))
    assert named <= set(known)
    assert set(known) <= named, "a command is missing from the README's table"


def test_every_method_is_in_the_table() -> None:
    for name, entry in registry.entries("method").items():
        assert f"| `{name}` |" in TEXT
        assert entry.paper.url in TEXT


def test_every_objective_is_in_the_table() -> None:
    for name, entry in registry.entries("objective").items():
        assert f"| `{name}` |" in TEXT
        assert entry.paper.url in TEXT


def test_every_adapter_is_in_the_table() -> None:
    for name, entry in registry.entries("adapter").items():
        assert f"| `{name}` |" in TEXT
        assert entry.paper.url in TEXT


def test_options_of_the_first_example_are_real() -> None:
    for text in re.findall(r"--with ((?!name:)[a-z-]+:[a-z=0-9,_]+)", TEXT):
        registry.parse_method(text)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^(?:make |.*`make )(\w+)", TEXT, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_public_names_exist() -> None:
    for name in set(re.findall(r"ditkit\.([A-Za-z]\w*)\(", TEXT)):
        assert getattr(ditkit, name) is not None
