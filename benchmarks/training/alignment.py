"""Do early tokens that follow a teacher's make a SiT learn faster, and for how long do they help?

Each seed trains the same SiT on the same batches: plain; with REPA to the end; with HASTE, stopped at two
moments and never; with SRA. The teacher of REPA and HASTE is a small vision transformer that learned the
words of the emoji's names. The learning rate is constant, so that a run can be read off at any step. Along
the run without stop, the gradients of the velocity loss and of the alignments are compared, in the layers
that both reach; at the end, a linear probe tells the pictures' groups from the tokens behind an early block.

    python -m benchmarks.training.alignment [--steps 800] [--seeds 0 1 2] [--runs FOLDER]

A stopped benchmark goes on in its folder.
"""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks import record
from benchmarks.architectures import toy
from benchmarks.record import Claim
from ditkit.data.emoji import Split
from ditkit.seams.taps import hidden_after
from ditkit.training.config import RunConfig
from ditkit.training.order import BatchNoise
from ditkit.training.tasks import Task
from ditkit.training.trainer import run_stage

DEPTH, EARLY, LATE = 6, 3, 5  # blocks; the one that is aligned and probed; SRA's teacher
STOP, EARLY_STOP = (
    0.35,
    0.15,
)  # of the run, HASTE's; the second was chosen where REPA's runs cross the plain ones
POINTS = 16  # measurements along a run
COMPARED = 128  # pictures on which gradients are compared
PROBED = (0.1, 0.2, 0.3)  # times of the pictures that the probe sees
HASTE = {
    "teacher": "teacher", "depth": EARLY, "projector": 256,
    "attention_layers": [EARLY - 1, EARLY], "teacher_layers": [5, 6],
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "repa": {"repa": {"teacher": "teacher", "depth": EARLY, "projector": 256}},
    "haste": {"haste": HASTE | {"stop_at": STOP}},
    "haste, early": {"haste": HASTE | {"stop_at": EARLY_STOP}},
    "never stopped": {"haste": HASTE | {"stop_at": None}},
    "sra": {"sra": {"student_block": EARLY, "teacher_block": LATE}},
}
STOPPED = {"haste": f"stopped at {STOP} of the run: ", "haste, early": f"stopped at {EARLY_STOP} of it: "}
TERMS = {"alignment": 0.5, "attention_alignment": 0.5}  # and their weights in the loss of HASTE


def settings(name: str, seed: int, steps: int, batch: int, objective: dict[str, Any]) -> RunConfig:
    """The run of a SiT."""
    return RunConfig.model_validate({
        "name": name, "task": "class-to-image", "seed": seed, "steps": steps, "batch_size": batch,
        "precision": "no", "tracker": None, "objective": objective,
        "optimizer": {"lr": 1e-3, "clip_grad_norm": 1.0}, "schedule": {"warmup_steps": min(50, steps)},
        "ema": {"decay": 0.99}, "heldout_every": max(1, steps // POINTS), "checkpoint_every": steps,
        "task_options": {
            "arch": "sit", "process": "flow", "pixels": toy.SIDE,
            "model": {"patch_size": 2, "hidden_size": 96, "depth": DEPTH, "num_heads": 3},
        },
    })  # fmt: skip


def teacher(folder: Path, steps: int) -> Path:
    """Train the teacher once; its run's folder."""
    run = RunConfig.model_validate({
        "name": "teacher", "task": "teacher", "seed": 0, "steps": steps, "precision": "no", "tracker": None,
        "optimizer": {"lr": 1e-3, "weight_decay": 0.05, "clip_grad_norm": 1.0},
        "schedule": {"kind": "cosine", "warmup_steps": min(100, steps), "final_factor": 0.02},
        "ema": {"decay": 0.999}, "heldout_every": steps, "checkpoint_every": steps,
        "task_options": {
            "least": 10,
            "model": {
                "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6,
                "num_attention_heads": 4, "patch_size": 8,
            },
        },
    })  # fmt: skip
    if not (folder / "export").is_dir():
        run_stage(run, folder, {})
    return folder


# --- what is measured along a run ---------------------------------------------------------------------


def cosines(task: Task, step: int) -> dict[str, float]:
    """Cosines between the gradient of the velocity loss and that of each alignment, where both are."""
    network: Any = task.get_submodule("model")
    shared = [
        parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and (not name.startswith("blocks.") or int(name.split(".")[1]) < EARLY)
    ]
    rows = torch.arange(COMPARED)
    with torch.enable_grad():
        losses = task(
            rows * (task.sample_count // COMPARED), BatchNoise(7, step, COMPARED, rows, rows.device)
        )
        terms = {name: losses[name] for name in TERMS if name in losses and losses[name].requires_grad}
        if not terms:
            return {}
        velocity = losses["loss"] - sum(TERMS[name] * value for name, value in terms.items())
        base = _gradient(velocity, shared)
        return {
            f"cosine_{name}": float(F.cosine_similarity(base, _gradient(value, shared), dim=0))
            for name, value in terms.items()
        }


def _gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([
        (torch.zeros_like(parameter) if part is None else part).flatten()
        for part, parameter in zip(parts, parameters, strict=True)
    ])  # fmt: skip


@torch.no_grad()
def probe(network: Any) -> float:
    """Accuracy on the held-out pictures of a linear classifier of groups, fitted by ridge regression to the
    mean token behind the early block, of the training pictures under some noise and without their label."""
    features, right = {}, {}
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        pictures, right[split] = toy.pictures(split)
        features[split] = torch.cat([_tokens(network, part) for part in pictures.split(256)])  # (N, D)
    mean, spread = features["train"].mean(0), features["train"].std(0) + 1e-6
    inputs = {split: (value - mean) / spread for split, value in features.items()}
    train, targets = inputs["train"].double(), F.one_hot(right["train"], toy.CLASSES).double()
    centred = targets - targets.mean(0)
    weights = torch.linalg.solve(
        train.T @ train + len(train) * 1e-2 * torch.eye(train.shape[1], dtype=torch.float64),
        train.T @ centred,
    )
    guess = (inputs["heldout"].double() @ weights + targets.mean(0)).argmax(1)
    return float((guess == right["heldout"]).double().mean())


def _tokens(network: Any, pictures: Tensor) -> Tensor:
    """Mean tokens behind the early block, side by side for each of the times, (N, times x D)."""
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.full((len(pictures),), network.y_embedder.num_classes)  # the null class
    found = []
    for time in PROBED:
        state = (1 - time) * pictures + time * noise
        times = torch.full((len(pictures),), 1 - time)  # the network's clock: 0 is noise
        found.append(
            hidden_after(network, EARLY, lambda state=state, times=times: network(state, times, labels)).mean(
                1
            )
        )
    return torch.cat(found, dim=1)


# --- what is told -------------------------------------------------------------------------------------


def course(folder: Path, key: str) -> dict[int, float]:
    """A figure of a run by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def reached(curve: dict[int, float], goal: float) -> float | None:
    """The step at which a falling curve first lies at a goal, by straight lines between measurements."""
    points = sorted(curve.items())
    if points[0][1] <= goal:
        return float(points[0][0])
    for (before, high), (after, low) in pairwise(points):
        if low <= goal:
            return before + (after - before) * (high - goal) / (high - low)
    return None


def claims(figures: dict[str, Any], steps: int, batch: int) -> list[Claim]:
    """What the papers promise, beside the runs."""
    seeds = len(figures["plain"]["loss"])
    limit = (
        f"emoji at {toy.SIDE}x{toy.SIDE}, SiT of width 96, {DEPTH} blocks, {steps} steps of batch {batch}, "
        f"{seeds} seeds; held-out velocity loss of the averaged weights"
    )
    end = {way: [curve[max(curve)] for curve in figures[way]["loss"]] for way in WAYS}
    found = []
    repa, haste, sra = "arXiv 2410.06940", "arXiv 2505.16792", "arXiv 2505.02831"
    for way, source in (("repa", repa), ("haste", haste), ("haste, early", haste)):
        steps_to = [
            reached(curve, goal) for curve, goal in zip(figures[way]["loss"], end["plain"], strict=True)
        ]
        shares = [None if step is None else step / steps for step in steps_to]
        told = ", ".join("never" if share is None else f"{share:.2f}" for share in shares)
        found.append(
            Claim(
                way.partition(",")[0],
                STOPPED.get(way, "")
                + "reaches the plain run's last held-out loss in at most 0.6 of its steps",
                source,
                f"share of the steps, by seed: {told}; last loss {toy.told(end[way])}, "
                f"plain {toy.told(end['plain'])}",
                all(share is not None and share <= 0.6 for share in shares),
                limit,
            )
        )
    for less, more, claim, source in (
        ("haste", "repa", "is at least as good as REPA at the end", haste),
        ("haste, early", "repa", "is at least as good as REPA at the end", haste),
        ("haste", "never stopped", "is better than never stopped", haste),
        ("haste, early", "never stopped", "is better than never stopped", haste),
        ("sra", "plain", "the last held-out loss is not worse than without it", sra),
    ):
        holds, told = toy.compare((less, end[less]), (more, end[more]))
        claim = STOPPED.get(less, "") + claim
        found.append(Claim(less.partition(",")[0], claim, source, told, holds, limit))
    holds, told = toy.compare(("plain", figures["plain"]["probe"]), ("sra", figures["sra"]["probe"]), 3)
    found.append(
        Claim(
            "sra",
            "a linear probe behind the aligned block is more accurate than without it",
            sra,
            f"groups of held-out pictures: {told}",
            holds,
            limit,
        )
    )
    for name in TERMS:
        curves = [curve for curve in figures["never stopped"][f"cosine_{name}"]]
        first = [statistics.mean(list(curve.values())[:3]) for curve in curves]
        last = [statistics.mean(list(curve.values())[-3:]) for curve in curves]
        holds, told = toy.compare(("last", last), ("first", first), 3)
        found.append(
            Claim(
                "haste",
                f"its {name.replace('_', ' ')} ends with a gradient that does not serve the velocity loss",
                haste,
                f"cosine, mean of three measurements: {told}",
                holds and statistics.mean(last) < 0.05,
                f"{limit}; layers up to block {EARLY}",
            )
        )
    return found


def draw(figures: dict[str, Any], path: Path) -> None:
    """Losses beside the plain run's and cosines over the steps, means over the seeds."""
    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for way in WAYS:
        pairs = zip(figures[way]["loss"], figures["plain"]["loss"], strict=True)
        left.plot(
            *_mean([{step: ours[step] / plain[step] for step in ours} for ours, plain in pairs]), label=way
        )
    left.set(xlabel="steps", ylabel="held-out velocity loss / plain")
    for name in TERMS:
        right.plot(*_mean(figures["never stopped"][f"cosine_{name}"]), label=name.replace("_", " "))
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="steps", ylabel="cosine with the velocity loss's gradient")
    left.legend()
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=120)
    plt.close(picture)


def _mean(curves: list[dict[int, float]]) -> tuple[list[int], list[float]]:
    return list(curves[0]), [
        statistics.mean(values) for values in zip(*(c.values() for c in curves), strict=True)
    ]


def measure(runs: Path, steps: int, seeds: list[int], batch: int, teaching: int) -> dict[str, Any]:
    """Train what is not there yet, and read everything off."""
    from ditkit.models.dit import SiT

    stages = {"teacher": teacher(runs / "teacher", teaching)}
    figures: dict[str, Any] = {}
    for way, objective in WAYS.items():
        folders = [runs / f"{way.replace(',', '').replace(' ', '-')}-{seed}" for seed in seeds]
        for seed, folder in zip(seeds, folders, strict=True):
            if not (folder / "export").is_dir():
                watched = cosines if way == "never stopped" else None
                run_stage(settings(way, seed, steps, batch, objective), folder, stages, watched)
        figures[way] = {"loss": [course(folder, "heldout_loss") for folder in folders]}
        networks = [SiT.from_pretrained(folder / "export" / "transformer").eval() for folder in folders]
        figures[way]["probe"] = [probe(network) for network in networks]
        if way == "never stopped":
            for name in TERMS:
                figures[way][f"cosine_{name}"] = [course(folder, f"cosine_{name}") for folder in folders]
    return figures


def main() -> None:
    parser = record.arguments(__file__, __doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step")
    parser.add_argument("--teaching", type=int, default=1000, help="steps of the teacher")
    parser.add_argument("--runs", type=Path, default=Path("runs/alignment"), help="folder of the runs")
    parser.add_argument("--picture", type=Path, default=Path("docs/assets/alignment.png"))
    options = parser.parse_args()
    figures = measure(options.runs, options.steps, options.seeds, options.batch, options.teaching)
    draw(figures, options.picture)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    record.write(options.json, claims(figures, options.steps, options.batch), machine, figures=figures)


if __name__ == "__main__":
    main()
