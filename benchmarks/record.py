"""What a benchmark writes: claims beside what was measured for them, and the figures behind.

Every script below takes `--json FILE` (by default its own place under `benchmarks/results/`); `ledger.py`
turns all of them into `docs/ledger.md`. They run as modules, from the top of the repository:
`python -m benchmarks.methods.taylorseer`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ditkit.files import write_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Claim:
    """One line of the ledger.

    Args:
        system: registered name, or the part of ditkit it is about.
        claim: what is promised, with its figure.
        source: who promises it: a paper, the design, a peer.
        measured: what came out here, with figures.
        holds: whether it holds; None where the claim is out of reach of this machine.
        limit: what bounds it, or what the measurement leaves open.
    """

    system: str
    claim: str
    source: str
    measured: str
    holds: bool | None
    limit: str = ""


def arguments(script: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    place = Path(script).resolve().relative_to(HERE).with_suffix(".json")
    parser.add_argument("--json", type=Path, default=RESULTS / place, help="where to write the result")
    return parser


def write(path: Path, claims: list[Claim], machine: dict[str, Any], **figures: Any) -> None:
    """Write a result: claims for the ledger, figures for whoever wants to look closer. A result among those
    of the repository renews the ledger."""
    found = {"claims": [asdict(claim) for claim in claims], "machine": machine, **figures}
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(path)
    if RESULTS in path.resolve().parents:
        from benchmarks.ledger import LEDGER, ledger

        print(write_text(LEDGER, ledger(RESULTS)))
