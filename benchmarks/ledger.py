"""docs/ledger.md from the results of all benchmarks: each claim, what was measured for it, its limit.

python -m benchmarks.ledger            # from what lies in benchmarks/results
python -m benchmarks.ledger --check    # exit code 1 when docs/ledger.md is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from ditkit.files import write_text

LEDGER = Path(__file__).parents[1] / "docs" / "ledger.md"
HEAD = """# Ledger

What is promised for each system, and what this repository's own benchmarks measured for it. Written by
`make ledger` from `benchmarks/results/`; each script in `benchmarks/` fills one of them. Times are
medians of interleaved runs on the machine named below each table, as ratios; errors are relative L2 distances
of the final latents to dense sampling from the same noise.
"""
VERDICT = {True: "holds", False: "**does not hold**", None: "out of reach here"}


def ledger(results: Path) -> str:
    """The page's text.

    Args:
        results: folder of the JSON files that the benchmarks wrote.
    """
    claims = [
        {
            **claim,
            "file": path.relative_to(results).with_suffix("").as_posix(),
            "machine": found.get("machine", {}),
        }
        for path in sorted(results.rglob("*.json"))
        for found in [json.loads(path.read_text(encoding="utf-8"))]
        for claim in found["claims"]
    ]
    claims.sort(key=lambda claim: (claim["system"], claim["file"]))
    parts = [HEAD]
    for (system, file), group in groupby(claims, key=lambda claim: (claim["system"], claim["file"])):
        parts.append(_section(system, file, list(group)))
    return "\n".join(parts)


def _section(system: str, file: str, claims: list[dict[str, Any]]) -> str:
    lines = [f"## {system}", "", f"`benchmarks/{file}.py`", ""]
    lines += ["| claim | by | measured | verdict | limit |", "|---|---|---|---|---|"]
    for claim in claims:
        cells = [claim["claim"], claim["source"], claim["measured"], VERDICT[claim["holds"]], claim["limit"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    machine = ", ".join(f"{name} {value}" for name, value in claims[0]["machine"].items())
    return "\n".join([*lines, "", f"Machine: {machine}." if machine else "", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    text = ledger(RESULTS)
    if options.check:
        sys.exit(LEDGER.read_text(encoding="utf-8") != text)
    print(write_text(LEDGER, text))


if __name__ == "__main__":
    main()
