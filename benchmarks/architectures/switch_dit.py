"""Experts chosen by the timestep, and the prior that spreads them over the schedule.

The prior is tried alone: only the gates of a fresh Switch-DiT are trained, on the prior loss. Then the whole
network learns as those of `dtr`, whose errors (plain, DTR) are read from its result: run that first, with
the same steps and seeds.

    python -m benchmarks.architectures.switch_dit [--steps 500] [--seeds 0 1 2] [--gate-steps 200]
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.architectures import dtr, toy
from benchmarks.record import RESULTS, Claim
from ditkit.models.switch_dit import SwitchDiT

NEAR, FAR = 50, 500  # distances in timesteps that the card of the system compares
NEARLY_ALL = 0.95  # the share of timesteps from which on an expert counts as shared by all


def model() -> SwitchDiT:
    return SwitchDiT(**dtr.CONFIG)


# --- the gates alone ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gates:
    """What the prior loss made of the gates.

    Args:
        start, end: prior loss before and after training.
        near, far: mean cosine of the experts taken at timesteps up to 50, and from 500 on, apart.
        shared_start, shared: before and after, of each block the share of timesteps that take its busiest
            expert.
    """

    start: float
    end: float
    near: float
    far: float
    shared_start: list[float]
    shared: list[float]


def train_gates(seed: int, steps: int, rate: float = 0.1) -> Gates:
    """Train the gates of a fresh network on the prior loss; all else is frozen.

    The rate is high: the embeddings of the time start small, and only the gates can make up for it."""
    torch.manual_seed(seed)
    network = model()
    network.requires_grad_(False)
    blocks: list[Any] = list(network.blocks)
    gates = [parameter for block in blocks for parameter in block.router.f_gate.parameters()]
    for parameter in gates:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(gates, lr=rate, weight_decay=0.0)
    everywhere = torch.arange(network.config["num_timesteps"])
    with torch.no_grad():
        start, shared_start = network.prior_loss(everywhere).item(), busiest(network)
    for _ in range(steps):
        loss = network.prior_loss(torch.randint(len(everywhere), (128,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        end = network.prior_loss(everywhere).item()
    near, far = similarity(network.choices())
    return Gates(start, end, near, far, shared_start, busiest(network))


def busiest(network: SwitchDiT) -> list[float]:
    """Of each block, the share of timesteps that take its busiest expert."""
    taken = network.choices().mean(0).unflatten(0, (-1, network.config["num_experts"]))
    return taken.max(1).values.tolist()


def similarity(choices: Tensor) -> tuple[float, float]:
    """Mean cosine of rows (S, A) at most `NEAR`, and at least `FAR`, apart."""
    rows = F.normalize(choices, dim=1)
    cosine = rows @ rows.T
    place = torch.arange(len(rows))
    apart = (place[:, None] - place).abs()
    return cosine[(apart > 0) & (apart <= NEAR)].mean().item(), cosine[apart >= FAR].mean().item()


# --- the whole network --------------------------------------------------------------------------------


def with_prior(network: SwitchDiT, batch: toy.Batch) -> Tensor:
    """The noise error plus the prior loss, with the authors' weight of 1."""
    return toy.noise_error(network, batch) + network.prior_loss(batch.t)


def peers(path: Path, plan: toy.Plan) -> dict[str, list[float]]:
    """The errors of plain and routed networks in the result of `dtr`.

    Raises:
        ValueError: it was made by another plan.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["plan"] != json.loads(json.dumps(asdict(plan))):
        raise ValueError(
            f"{path} was made by {found['plan']}, this run is to be {asdict(plan)}: run "
            "benchmarks.architectures.dtr with the same options first"
        )
    return {name: figures["losses"] for name, figures in found["figures"].items()}


def claims(gates: list[Gates], errors: dict[str, list[float]], gate_steps: int, limit: str) -> list[Claim]:
    paper, ours = "arXiv 2403.09176", "arXiv 2403.09176, by FID"
    alone = f"{gate_steps} steps on the gates of a fresh network of {dtr.CONFIG['depth']} blocks"
    near, far = [each.near for each in gates], [each.far for each in gates]
    shared = [min(each.shared) for each in gates]
    fresh = [min(each.shared_start) for each in gates]
    falls = [each.end / each.start for each in gates]
    below_dtr = toy.compare(("Switch-DiT", errors["Switch-DiT"]), ("DTR", errors["DTR"]))
    below_plain = toy.compare(("Switch-DiT", errors["Switch-DiT"]), ("plain", errors["plain"]))
    heavier = toy.parameters(model()) / toy.parameters(dtr.model("plain"))
    return [
        Claim(
            "switch-dit",
            "training the gates on the prior loss alone drives it down",
            paper,
            f"from {toy.told([each.start for each in gates])} to {toy.told([each.end for each in gates])}",
            max(falls) < 1,
            alone,
        ),
        Claim(
            "switch-dit",
            f"timesteps at most {NEAR} apart share more experts than those {FAR} and more apart",
            paper,
            f"mean cosine of the choices {toy.told(near, 3)} near, {toy.told(far, 3)} far",
            min(near) > max(far),
            alone,
        ),
        Claim(
            "switch-dit",
            "in each block one expert is taken at nearly all timesteps",
            paper,
            f"the busiest expert of the block where it is least busy: {toy.told(shared, 3)} of the timesteps "
            f"({toy.told(fresh, 3)} before training)",
            min(shared) >= NEARLY_ALL,
            f"{alone}; nearly all: {NEARLY_ALL:.0%}, by chance at least two thirds",
        ),
        Claim(
            "switch-dit",
            "lower error than DTR",
            ours,
            below_dtr[1],
            below_dtr[0],
            f"{limit}; {heavier:.2f} times the parameters",
        ),
        Claim(
            "switch-dit",
            "lower error than DiT",
            ours,
            below_plain[1],
            below_plain[0],
            f"{limit}; {heavier:.2f} times the parameters",
        ),
    ]


def main() -> None:
    parser = toy.arguments(__file__, __doc__, dtr.PLAN)
    parser.add_argument("--gate-steps", type=int, default=200)
    parser.add_argument("--dtr", type=Path, default=RESULTS / "architectures" / "dtr.json")
    options = parser.parse_args()
    plan = toy.plan_of(options)
    errors = peers(options.dtr, plan)
    gates = [train_gates(seed, options.gate_steps) for seed in tqdm(plan.seeds, desc="gates")]
    found = toy.study({"Switch-DiT": model}, plan, with_prior)
    errors["Switch-DiT"] = toy.losses(found["Switch-DiT"])
    result = claims(gates, errors, options.gate_steps, f"{plan}, {dtr.SIZE}")
    toy.write(options.json, result, plan, found, gates=[asdict(each) for each in gates])


if __name__ == "__main__":
    main()
