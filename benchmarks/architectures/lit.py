"""Linear attention in place of softmax in a small DiT, from scratch and inherited from a trained one.

From scratch: softmax, ReLU kernels, ReLU kernels with the depthwise convolution of few and of many heads.
Inherited: the softmax network of each seed becomes the frozen teacher of two students that start from its
weights, without and with those of its attention. All learn a variance, so that both terms of the
distillation count.

    python -m benchmarks.architectures.lit [--steps 200] [--seeds 0 1 2]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.architectures import toy
from benchmarks.record import Claim
from ditkit.models.dit import DiT
from ditkit.models.lit import LiT, distillation_losses, inherit
from ditkit.processes import GaussianDiffusion

PROCESS = GaussianDiffusion.create(1000)  # with a learned variance
CONFIG: dict[str, Any] = toy.TRANSFORMER | {"learn_sigma": True}
PLAN = toy.Plan(steps=200, seeds=(0, 1, 2), batch=16, points=5)
FEW, MANY = 2, 16
FEW_HEADS: dict[str, Any] = CONFIG | {"num_heads": FEW}
MANY_HEADS: dict[str, Any] = CONFIG | {"num_heads": MANY}
ATTENTION = ("q", "k", "v", "proj")


def without_convolution() -> LiT:
    """A LiT whose convolutions add nothing and stay so."""
    model = LiT(**FEW_HEADS)
    block: Any
    for block in model.blocks:
        for parameter in block.attn.dwc.parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    return model


FRESH: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: DiT(**CONFIG),
    "ReLU": without_convolution,
    "ReLU and convolution": lambda: LiT(**FEW_HEADS),
    "many heads": lambda: LiT(**MANY_HEADS),
}
INHERITED = {"inherited": (), "inherited with attention": ATTENTION}


def hybrid(model: Any, batch: toy.Batch) -> Tensor:
    """DiT's loss: noise error plus the bound on the variance."""
    losses = PROCESS.training_losses(
        lambda x, t: model(x, t, batch.labels).sample, batch.pictures, batch.t, batch.noise
    )
    return losses["loss"].mean()


def distilled(teacher: DiT) -> toy.Objective:
    """DiT's loss plus the distance to a frozen teacher, with the authors' weights."""

    def objective(model: Any, batch: toy.Batch) -> Tensor:
        predictions = []

        def predict(state: Tensor, t: Tensor) -> Tensor:
            predictions.append(model(state, t, batch.labels).sample)
            return predictions[-1]

        own = PROCESS.training_losses(predict, batch.pictures, batch.t, batch.noise)["loss"]
        with torch.no_grad():
            wanted = teacher(batch.state, batch.t, batch.labels).sample
        return (own + distillation_losses(predictions[0], wanted, toy.CHANNELS)["loss"]).mean()

    return objective


def students(teachers: list[toy.Trained], plan: toy.Plan) -> dict[str, list[toy.Trained]]:
    """A student of each kind from the teacher of each seed."""
    found: dict[str, list[toy.Trained]] = {name: [] for name in INHERITED}
    pairs = list(zip(plan.seeds, teachers, strict=True))
    for seed, teacher in tqdm(pairs, desc="students"):
        for name, attention in INHERITED.items():
            torch.manual_seed(seed)
            student = inherit(teacher.model, attention, num_heads=FEW)
            found[name].append(toy.train(student, plan, seed, distilled(teacher.model)))
            tqdm.write(f"{name}, seed {seed}: {found[name][-1].loss:.4f}")
    return found


def reached(run: toy.Trained, error: float) -> int | None:
    """The first measured step at which a training had come down to an error."""
    return next((step for step, measured in run.curve.items() if measured <= error), None)


def claims(found: dict[str, list[toy.Trained]], plan: toy.Plan) -> list[Claim]:
    errors = {name: toy.losses(runs) for name, runs in found.items()}
    paper = "arXiv 2501.12976, by FID"
    limit = f"{plan}, width 32, depth 3, 64 tokens"

    def below(less: str, more: str, text: str, note: str = "") -> Claim:
        holds, measured = toy.compare((less, errors[less]), (more, errors[more]))
        return Claim("lit", text, paper, measured, holds, limit + note)

    return [
        below("softmax", "ReLU", "from scratch, ReLU kernels alone are worse than softmax"),
        below(
            "ReLU and convolution",
            "softmax",
            "from scratch, with the depthwise convolution they are at least as good as softmax",
        ),
        below(
            "ReLU and convolution",
            "many heads",
            f"from scratch, few heads ({FEW}) are no worse than many ({MANY})",
            "; that few heads cost no time is said of GPUs and not measured here",
        ),
        _sooner(found, limit),
        below(
            "inherited",
            "inherited with attention",
            "the attention's weights are best not inherited",
            "; distilled, teacher and student of one size; the paper's gap is small too",
        ),
    ]


def _sooner(found: dict[str, list[toy.Trained]], limit: str) -> Claim:
    """Whether inheriting and distilling reaches the teacher's error in fewer steps than a fresh start."""
    steps: dict[str, list[int | None]] = {
        name: [reached(run, teacher.loss) for run, teacher in zip(found[name], found["softmax"], strict=True)]
        for name in ("inherited", "ReLU and convolution")
    }
    first, total = min(found["softmax"][0].curve), max(found["softmax"][0].curve)
    counted = {name: [total + 1 if n is None else n for n in row] for name, row in steps.items()}
    shown = {
        name: ", ".join("not reached" if n is None else str(n) for n in row) for name, row in steps.items()
    }
    early = {name: toy.told([run.curve[first] for run in found[name]]) for name in steps}
    inherited, fresh = counted["inherited"], counted["ReLU and convolution"]
    return Claim(
        "lit",
        "inherited and distilled, the teacher's error is reached in fewer steps than from scratch",
        "arXiv 2501.12976, by FID",
        f"step {shown['inherited']} inherited; {shown['ReLU and convolution']} from scratch (of {total}; "
        f"teacher {toy.told(toy.losses(found['softmax']))})"
        f"{'' if toy.differs(inherited, fresh) else ': within seed noise'}; "
        f"after {first} steps {early['inherited']} inherited, {early['ReLU and convolution']} from scratch",
        statistics.mean(inherited) < statistics.mean(fresh),
        f"{limit}; measured every {first} steps; the teacher's own {total} are not counted, and leave it far "
        "from converged",
    )


def main() -> None:
    options = toy.arguments(__file__, __doc__, PLAN).parse_args()
    plan = toy.plan_of(options)
    found = toy.study(FRESH, plan, hybrid)
    found |= students(found["softmax"], plan)
    toy.write(options.json, claims(found, plan), plan, found)


if __name__ == "__main__":
    main()
