"""`ditkit fit`: errors before work, a run, what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fit sal --out a", "Did you mean"),
        ("fit sla", "--out is needed"),
        ("fit sla --out a --set topk=7", "topk must be above 0"),
        ("fit sla --out a --set speed=7", "no option 'speed'"),
        ("fit sla --out a --data cats", "own or emoji"),
        ("fit sla --out a --prompts none.txt", "--prompts not found"),
        ("fit sla --out a --model micro-flx", "did you mean 'micro-flux'"),
    ],
)
def test_wrong_use(ditkit, line: str, words: str) -> None:
    result = ditkit(line)
    assert result.exit_code == 2 and words in result.stderr
    assert not Path("a").exists()


def test_options_are_listed(ditkit) -> None:
    result = ditkit("fit clear --options")
    assert result.exit_code == 0 and "radius" in result.stdout and "arxiv.org/abs/2412.16112" in result.stdout


def test_fit_then_generate(ditkit, folder: Path) -> None:
    Path("prompts.txt").write_text("red apple\n\ngreen rocket\n")
    small = "--set samples=1 --set sampling_steps=2 --set block=2"
    line = f"fit sparse-vdit --model {folder} --out found --prompts prompts.txt {small}"
    result = ditkit(line)
    assert result.exit_code == 0, result.stderr
    assert "found" in result.stdout and "--with sparse-vdit:weights=found" in result.stderr
    drawn = ditkit(f"generate 'red apple' --model {folder} --steps 2 --with sparse-vdit:weights=found")
    assert drawn.exit_code == 0, drawn.stderr
    again = ditkit(line)
    assert again.exit_code == 2 and "finished fit" in again.stderr
