"""The ledger says what the results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import ledger, record

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_committed_page_is_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ledger", "--check"],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, "run `make ledger`" + done.stderr


def test_every_result_has_its_script() -> None:
    for path in (FOLDER / "results").rglob("*.json"):
        script = FOLDER / path.relative_to(FOLDER / "results").with_suffix(".py")
        assert script.exists(), path.name
        for claim in json.loads(path.read_text())["claims"]:
            assert claim["measured"], claim


def test_a_claim_becomes_a_line(tmp_path: Path) -> None:
    claims = [
        record.Claim("a-system", "twice as fast", "paper", "1.7 | 1.8 times", False, "small pictures"),
        record.Claim("a-system", "half the memory", "paper", "0.5", True),
        record.Claim("other", "on eight GPUs", "paper", "not run", None),
    ]
    record.write(tmp_path / "a.json", claims, {"threads": 2}, rows=[1])
    text = ledger.ledger(tmp_path)
    assert "| twice as fast | paper | 1.7 \\| 1.8 times | **does not hold** | small pictures |" in text
    assert "| half the memory | paper | 0.5 | holds |  |" in text
    assert "| on eight GPUs | paper | not run | out of reach here |  |" in text
    assert text.count("## ") == 2
    assert "threads 2" in text
