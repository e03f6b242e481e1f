"""Is half of a DiT, chosen anew at each timestep and token, better than a fixed half of it?

Each seed trains one DiT. From it start, on the same batches: a dynamic DiT (DyDiT) with lambda 0.5, and a
static one that keeps half of the heads and of the channel groups of every block, those with the largest
output weights. For a fifth of its steps the dynamic one takes two passes, as it chooses and complete; the
static one is shown after as many steps and after as many passes. Times are of the exported form, sliced,
against the whole static DiT.

    python -m benchmarks.training.dydit [--steps 500] [--seeds 0 1 2] [--whole 700]
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks import rounds
from benchmarks.architectures import toy
from benchmarks.record import Claim
from ditkit.analysis.meter import count
from ditkit.models.dit import DiT
from ditkit.models.dydit import DyDiT, DyDiTBlock, budget_loss, inherit
from ditkit.models.dynamic import choosing
from ditkit.training.objectives.dydit import DyDiTOptions, target

CONFIG: dict[str, Any] = toy.TRANSFORMER | {"hidden_size": 128, "depth": 4, "num_heads": 8}
PLAN = toy.Plan(steps=500, seeds=(0, 1, 2), batch=16)
SIZE = "width 128, depth 4, 8 heads, 64 tokens"
TIMED = (1, 8)
NEVER = 1e4  # a score that no noise turns


def budgeted(options: DyDiTOptions, steps: int, seed: int) -> toy.Objective:
    """The paper's loss: as chosen, complete, and the budget."""
    generator = torch.Generator().manual_seed(seed)
    done = 0

    def loss(network: Any, batch: toy.Batch) -> Tensor:
        nonlocal done
        size = len(batch.t)
        with choosing(network, draw=lambda *shape: torch.rand(size, *shape, generator=generator)) as chosen:
            error = toy.noise_error(network, batch)
        loss = error + options.weight * budget_loss(chosen.ratio().mean(), target(options, done))
        if done < whole_steps(options, steps):
            with choosing(network, complete=True):
                loss = loss + options.complete_weight * toy.noise_error(network, batch)
        done += 1
        return loss

    return loss


def whole_steps(options: DyDiTOptions, steps: int) -> int:
    """Steps in which the complete network is trained too."""
    return round((options.complete_until or 1) * steps)


def dynamic(whole: DiT) -> DyDiT:
    """A dynamic network that starts as the whole one, all on, with the authors' biases."""
    return inherit(whole).train()


@torch.no_grad()
def halved(whole: DiT) -> DyDiT:
    """A static network of half the heads and channels: routers that always choose the same."""
    model = inherit(whole, token_bias=None).train()
    block: DyDiTBlock
    for block in model.blocks:  # pyright: ignore[reportAssignmentType]
        for router, layer in ((block.attn_rate, block.attn.proj), (block.mlp_rate, block.mlp.fc2)):
            assert router is not None
            parts = CONFIG["num_heads"]
            size = layer.weight.unflatten(1, (parts, -1)).square().sum((0, 2))  # (H,)
            kept = size[1:].topk(parts // 2 - 1).indices  # the first is always on
            router.router.weight.zero_()
            router.router.bias.fill_(-NEVER)[kept] = NEVER
            router.requires_grad_(False)
    return model


@torch.no_grad()
def spent(model: DyDiT) -> float:
    """Share of the blocks' multiply-adds on the held-out pictures, whose times cover the schedule."""
    shares = []
    batch = toy.held_out()
    for state, t, labels in zip(*(x.split(128) for x in (batch.state, batch.t, batch.labels)), strict=True):
        with choosing(model) as chosen:
            model(state, t, labels)
        shares.append(chosen.ratio())
    return torch.cat(shares).mean().item()


def as_many_passes(plan: toy.Plan, options: DyDiTOptions) -> toy.Plan:
    """The static network's training: measured after as many steps, and at its end."""
    passes = plan.steps + whole_steps(options, plan.steps)
    return dataclasses.replace(plan, steps=passes, points=passes // math.gcd(passes, plan.steps))


def run(plan: toy.Plan, before: int, options: DyDiTOptions) -> dict[str, list[Any]]:
    """All networks of all seeds."""
    found: dict[str, list[Any]] = {name: [] for name in ("whole", "dynamic", "halved")}
    longer = dataclasses.replace(plan, steps=before, points=1)
    for seed in plan.seeds:
        torch.manual_seed(seed)
        whole = toy.train(DiT(**CONFIG), longer, seed)
        after = seed + 100  # batches that the whole network has not seen in this order
        made = toy.train(
            dynamic(copy.deepcopy(whole.model)), plan, after, budgeted(options, plan.steps, seed)
        )
        half = toy.train(halved(copy.deepcopy(whole.model)), as_many_passes(plan, options), after)
        for name, trained in (("whole", whole), ("dynamic", made), ("halved", half)):
            found[name].append(trained)
        share = spent(made.model)
        print(f"seed {seed}: whole {whole.loss:.4f}, dynamic {made.loss:.4f} at {share:.3f}, {half.curve}")
    return found


@torch.inference_mode()
def times(whole: DiT, model: DyDiT, batch: int, turns: int) -> tuple[rounds.Seconds, float]:
    """Seconds of a forward at ten timesteps of the schedule, and the counted share of the FLOPs."""
    state, labels = torch.randn(batch, toy.CHANNELS, toy.SIDE, toy.SIDE), torch.zeros(batch, dtype=torch.long)
    steps = torch.linspace(0, toy.PROCESS.num_steps - 1, 10).long()

    def draw(network: Any) -> None:
        for step in steps:
            network(state, step.expand(batch), labels)

    flops = []
    for network in (model, whole):
        with count(network) as counted:
            draw(network)
        flops.append(sum(counted.flops_by_forward))
    seconds = rounds.interleaved({"dynamic": lambda: draw(model), "whole": lambda: draw(whole)}, turns)
    return seconds, flops[0] / flops[1]


def claims(
    plan: toy.Plan, before: int, found: dict[str, list[Any]], options: DyDiTOptions, turns: int
) -> list[Claim]:
    shares = [spent(trained.model) for trained in found["dynamic"]]
    limit = f"{plan} after {before} of the whole network, {SIZE}; lambda {options.flops}"
    errors = toy.losses(found["dynamic"])
    static = {
        steps: [t.curve[steps] for t in found["halved"]]
        for steps in (plan.steps, as_many_passes(plan, options).steps)
    }
    (holds, same_steps), (holds_too, same_passes) = (
        toy.compare(("dynamic", errors), (f"static after {steps} steps", values))
        for steps, values in static.items()
    )
    told, faster = [], []
    for batch in TIMED:
        ratios, counted = [], []
        for whole, made in zip(found["whole"], found["dynamic"], strict=True):
            seconds, share = times(whole.model, made.model, batch, turns)
            ratios.append(rounds.times_as_fast(seconds, "dynamic", "whole"))
            counted.append(share)
        told.append(f"batch {batch}: {toy.told(ratios, 2)} x, FLOPs {toy.told(counted, 3)}")
        faster += ratios if batch >= 8 else []
    paper = "arXiv 2410.03456"
    whole = toy.told(toy.losses(found["whole"]))
    return [
        Claim(
            "dydit",
            f"fine-tuned with lambda {options.flops}, it spends {options.flops} +- 0.03 of the multiply-adds",
            f"{paper}: 57.88 of 118.69 G",
            f"{toy.told(shares, 3)} over held-out pictures and all timesteps, {len(shares)} seeds",
            all(abs(share - options.flops) <= 0.03 for share in shares),
            limit,
        ),
        Claim(
            "dydit",
            "lower held-out error than a static network of equal FLOPs fine-tuned as long",
            f"{paper}, by FID",
            f"{same_steps}; {same_passes}; the whole before {whole}; FLOPs {toy.told(shares, 3)}, 0.5",
            holds and holds_too,
            f"{limit}; equal: start, batches, rate; a fifth of the dynamic steps take two passes, so "
            "the static network is shown after as many steps and after as many passes",
        ),
        Claim(
            "dydit",
            "a forward takes less time than the whole static network's from batch 8 on",
            f"{paper}: 1.73 x at 0.49 of the FLOPs on a GPU",
            f"{'; '.join(told)}; {len(shares)} seeds",
            statistics.mean(faster) > 1 and min(faster) > 1,
            f"one CPU thread, ten timesteps, medians of {turns} interleaved rounds; {limit}",
        ),
    ]


def main() -> None:
    parser = toy.arguments(__file__, __doc__, PLAN)
    parser.add_argument("--whole", type=int, default=700, help="steps of the whole network")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = toy.plan_of(options)
    budget = DyDiTOptions(flops=0.5, warmup=plan.steps // 4, hold=plan.steps // 40, complete_until=0.2)
    found = run(plan, options.whole, budget)
    written = claims(plan, options.whole, found, budget, options.rounds)
    for claim in written:
        print(claim)
    toy.write(options.json, written, plan, found, budget=budget.model_dump(), whole_steps=options.whole)


if __name__ == "__main__":
    main()
