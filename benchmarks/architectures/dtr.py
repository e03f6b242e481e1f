"""Does it help a small DiT to see other channels at other noise levels? A window that slides with the
timestep (DTR), all channels (plain), or as many at random for each timestep.

    python -m benchmarks.architectures.dtr [--steps 500] [--seeds 0 1 2]
"""

from __future__ import annotations

from typing import Any

from benchmarks.architectures import toy
from benchmarks.record import Claim
from ditkit.models.dit import DiT

CONFIG: dict[str, Any] = toy.TRANSFORMER | {"patch_size": 4, "hidden_size": 64, "num_heads": 4}
PLAN = toy.Plan(steps=500, seeds=(0, 1, 2))
SIZE = "width 64, depth 3, 16 tokens"
ROUTING: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "DTR": {"sharing_ratio": 0.8},
    "random routing": {"sharing_ratio": 0.8, "pattern": "random"},
}


def model(name: str) -> DiT:
    return DiT(**CONFIG, routing=ROUTING[name])


def claims(found: dict[str, list[toy.Trained]], limit: str) -> list[Claim]:
    errors = {name: toy.losses(runs) for name, runs in found.items()}
    beats_random = toy.compare(("DTR", errors["DTR"]), ("random routing", errors["random routing"]))
    beats_plain = toy.compare(("DTR", errors["DTR"]), ("plain", errors["plain"]))
    counts = {name: toy.parameters(model(name)) for name in ROUTING}
    paper = "arXiv 2310.07138, by FID"
    return [
        Claim(
            "dtr",
            "windows of channels that slide with the timestep: lower error than random ones, as many",
            paper,
            beats_random[1],
            beats_random[0],
            limit,
        ),
        Claim(
            "dtr",
            "lower error than without routing",
            paper,
            beats_plain[1],
            beats_plain[0],
            f"{limit}; Switch-DiT's authors find DTR worse than DiT at XL size",
        ),
        Claim(
            "dtr",
            "no parameters are added",
            "arXiv 2310.07138",
            ", ".join(f"{name} {count:,}" for name, count in counts.items()),
            len(set(counts.values())) == 1,
        ),
    ]


def main() -> None:
    options = toy.arguments(__file__, __doc__, PLAN).parse_args()
    plan = toy.plan_of(options)
    found = toy.study({name: lambda name=name: model(name) for name in ROUTING}, plan)
    toy.write(options.json, claims(found, f"{plan}, {SIZE}"), plan, found)


if __name__ == "__main__":
    main()
