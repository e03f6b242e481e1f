"""Does compact channel attention help a small DiCo, and does it wake idle channels?

python -m benchmarks.architectures.dico [--steps 150] [--seeds 0 1 2]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.architectures import toy
from benchmarks.record import Claim
from ditkit.models.dico import DiCo

PLAN = toy.Plan(steps=150, seeds=(0, 1, 2), batch=16)
CONFIG: dict[str, Any] = toy.CONFIG | {
    "input_size": toy.SIDE,
    "hidden_size": 16,
    "depth": (1, 1, 1, 1, 1),
    "learn_sigma": False,
}
IDLE = 0.1  # of the most active channel


def model(channel_attention: bool) -> DiCo:
    return DiCo(**CONFIG, channel_attention=channel_attention)


def activity(network: DiCo) -> Tensor:
    """How active each channel of the last block's convolutions is, mean over pixels and the held-out pictures
    of what is positive, (D,)."""
    seen: list[Tensor] = []
    block: Any = network.decoder_level_1[-1]
    hook = block.conv3.register_forward_hook(lambda module, inputs, output: seen.append(output.relu()))
    try:
        toy.errors(network)
    finally:
        hook.remove()
    return torch.cat(seen).mean((0, 2, 3))


def idle_share(active: Tensor) -> float:
    """The share of channels (D,) below a tenth of the most active one."""
    return (active < IDLE * active.max()).float().mean().item()


def claims(found: dict[str, list[toy.Trained]], idle: dict[str, list[float]], plan: toy.Plan) -> list[Claim]:
    errors = {name: toy.losses(runs) for name, runs in found.items()}
    lower = toy.compare(("CCA", errors["CCA"]), ("no CCA", errors["no CCA"]))
    fewer = toy.compare(("CCA", idle["CCA"]), ("no CCA", idle["no CCA"]), digits=3)
    more = toy.parameters(model(True)) / toy.parameters(model(False))
    limit = f"{plan}, width {CONFIG['hidden_size']}, one block in each level"
    return [
        Claim(
            "dico",
            "lower error with compact channel attention than without",
            "arXiv 2505.11196, by FID (4.81 better, size S)",
            lower[1],
            lower[0],
            f"{limit}; {more:.2f} times the parameters with it",
        ),
        Claim(
            "dico",
            f"with it fewer channels are below {IDLE:.0%} of the most active one",
            "arXiv 2505.11196, by a figure",
            f"share of channels: {fewer[1]}",
            fewer[0],
            f"{limit}; what the last block's convolutions add, ReLU, mean of pixels and held-out pictures",
        ),
    ]


def main() -> None:
    options = toy.arguments(__file__, __doc__, PLAN).parse_args()
    plan = toy.plan_of(options)
    found = toy.study({"CCA": lambda: model(True), "no CCA": lambda: model(False)}, plan)
    idle = {name: [idle_share(activity(run.model)) for run in runs] for name, runs in found.items()}
    toy.write(options.json, claims(found, idle, plan), plan, found, idle=idle)


if __name__ == "__main__":
    main()
