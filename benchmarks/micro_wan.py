"""How often micro-wan shows the object and the motion it was asked for, and how it compares with real clips.

    python benchmarks/micro_wan.py [--count 100] [--steps 28] [--guidance G]
"""

from __future__ import annotations

from record import Claim, arguments, write
from rich.console import Console

import ditkit
from ditkit.analysis.bench import machine
from ditkit.analysis.evaluate_motion import Shares, evaluate_motion

TARGET = 0.8


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=None)
    options = parser.parse_args()
    pipe = ditkit.load("micro-wan")
    pipe.set_progress_bar_config(disable=True)
    found = evaluate_motion(pipe, options.count, options.steps, options.guidance)
    tokens = 9 * 8 * 8
    claims = [
        Claim(
            "micro-wan",
            f"object and direction of motion are the prompted ones in {TARGET:.0%} of {options.count} clips",
            "ditkit",
            f"{found.shares.both:.0%} (object {found.shares.object:.0%}, motion {found.shares.motion:.0%}; "
            f"with the asked motion the nearest of nine {found.shares.nearest:.0%}), {options.steps} steps, "
            f"{found.seconds:.0f} s",
            found.shares.both >= TARGET,
            f"eighty emoji, {tokens} tokens; right is within 45 degrees",
        ),
        Claim(
            "micro-wan",
            "the measure finds object and motion of real clips, as they are and through the autoencoder",
            "ditkit",
            f"{_both(found.real)} as they are, {_both(found.ceiling)} through the autoencoder",
            min(found.real.both, found.ceiling.both) >= 0.98,
        ),
    ]
    for claim in claims:
        Console().print(claim)
    write(options.json, claims, machine(pipe), evaluation=found.as_dict())


def _both(shares: Shares) -> str:
    return f"{shares.both:.0%}"


if __name__ == "__main__":
    main()
