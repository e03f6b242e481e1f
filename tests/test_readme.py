"""What the README and the pages that it leads to name is there: files, commands, targets, methods, public
names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

import ditkit
from ditkit import registry
from ditkit.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "training.md", ROOT / "docs" / "bundled_models.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def links(page: Path) -> set[str]:
    """To files, those of the pictures left out."""
    return set(re.findall(r"(?<!!)\[[^\]]*\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        assert (page.parent / link).exists(), link


def test_every_page_is_led_to() -> None:
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:]} <= links(PAGES[0])


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
