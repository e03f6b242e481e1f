"""Importing is quick and pulls in torch only when it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ditkit


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_does_not_import_torch() -> None:
    assert run("import sys, ditkit; print('torch' in sys.modules, 'diffusers' in sys.modules)").split() == [
        "False",
        "False",
    ]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["bench", "--help"], ["data", "emoji", "--help"]]
)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from ditkit.cli import main
sys.argv = ["ditkit", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "diffusers", "transformers", "matplotlib", "numpy", "PIL"}} & set(sys.modules)
print("heavy:", sorted(heavy))
"""
    assert "heavy: []" in run(code)


def modules(code: str) -> int:
    """How many modules are loaded after the code ran: a count, where seconds would depend on the machine."""
    return int(run(f"import sys\n{code}\nprint(len(sys.modules))").split()[-1])


def test_help_stays_light() -> None:
    """0.5 s are asked of `ditkit --help`; it takes 0.2 s and about 220 modules."""
    assert modules("import ditkit") < 100
    assert modules("import ditkit.cli") < 400


@pytest.mark.parametrize("name", ditkit.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(ditkit, name) is not None


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="TaylorSeer"):
        ditkit.does_not_exist  # noqa: B018
    assert "TaylorSeer" in dir(ditkit)
