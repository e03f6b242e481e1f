"""What a benchmark writes: claims beside what was measured for them, and the figures behind.

Every script here takes `--json FILE` (by default its own name under `benchmarks/results/`); `ledger.py` turns
all of them into `docs/ledger.md`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ditkit.files import write_text

RESULTS = Path(__file__).parent / "results"


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
    name = Path(script).stem
    parser.add_argument(
        "--json", type=Path, default=RESULTS / f"{name}.json", help="where to write the result"
    )
    return parser


def write(path: Path, claims: list[Claim], machine: dict[str, Any], **figures: Any) -> None:
    """Write a result: claims for the ledger, figures for whoever wants to look closer. A result among those
    of the repository renews the ledger."""
    found = {"claims": [asdict(claim) for claim in claims], "machine": machine, **figures}
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(path)
    if path.parent == RESULTS:
        from ledger import LEDGER, ledger

        print(write_text(LEDGER, ledger(RESULTS)))
