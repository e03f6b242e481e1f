"""How many images a second the trainer takes, beside the usual DiT training script.

    python -m benchmarks.training.throughput [--sizes s b] [--rounds 5] [--batch 8]

Both train a DiT/2 on 32 x 32 x 4 latents held in memory: one step of the trainer (draws, loss with learned
variance, backward, AdamW, average) and one of `benchmarks.peers.usual_script` take turns, in float32 on both
sides, in bf16 on both sides, and with the trainer's bf16 default against the script's float32. Then both
train a tiny DiT from the same weights with the same noise: the loss curves must be the same. Last, where the
trainer's time goes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers.usual_script import UsualDiT, UsualScript
from benchmarks.record import Claim, arguments, write
from benchmarks.rounds import add_options, interleaved, milliseconds, times_as_fast
from ditkit.analysis.bench import machine
from ditkit.models.dit import SIZES
from ditkit.training.config import RunConfig
from ditkit.training.order import BatchNoise
from ditkit.training.tasks import find
from ditkit.training.trainer import Trainer

console = Console()
SEED, CLASSES, RATE, DROPOUT = 0, 1000, 1e-4, 0.1  # rate and dropout as DiT; it clips no gradients
EQUAL, FASTER = 1.15, 2.0  # targets at equal precision, and of bf16 over float32
TINY = {"depth": 4, "hidden_size": 64, "num_heads": 4}
CASES = {"float32": ("no", False), "bf16": ("bf16", True), "bf16-float32": ("bf16", False)}
"""By name: the trainer's precision, and whether the script runs in bf16."""
MATRICES = ("mm", "matmul", "linear", "convolution", "attention", "mkldnn")  # in the names of operators


def latents(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Latents (N, 4, side, side) of unit deviation and labels (N,)."""
    generator = torch.Generator().manual_seed(SEED)
    samples = torch.randn(count, 4, side, side, generator=generator)
    return samples, torch.randint(CLASSES, (count,), generator=generator)


def trainer(
    dimensions: dict[str, int], side: int, batch: int, precision: str, folder: Path, rate: float = RATE
) -> Trainer:
    """The trainer as a file sets it up, its pictures replaced by latents in memory."""
    AcceleratorState._reset_state()  # the last trainer may have had another precision
    run = RunConfig.model_validate(
        {
            "name": "throughput",
            "task": "class-to-image",
            "seed": SEED,
            "steps": 10**6,
            "batch_size": batch,
            "precision": precision,
            "tracker": None,
            "data": {"groups": ["keycap", "flag"]},
            "optimizer": {"lr": rate},
            "ema": {"decay": 0.9999, "warmup": False},
            "task_options": {
                "arch": "dit",
                "class_dropout": DROPOUT,
                "model": {"num_classes": CLASSES, "patch_size": 2, **dimensions},
            },
        }
    )
    torch.manual_seed(SEED)
    task_class: Any = find(run.task)

    class InMemory(task_class):
        """The task, with latents for its pictures."""

        def _encode(self, pictures: Any) -> Tensor:
            return latents(len(pictures), side)[0]

    task = InMemory(run, folder, {})
    task.labels = latents(task.sample_count, side)[1]
    return Trainer(run, folder, task, Accelerator(mixed_precision=precision, cpu=True))


def script(
    ours: Trainer, dimensions: dict[str, int], side: int, bf16: bool, rate: float = RATE
) -> UsualScript:
    """The usual script with a copy of a trainer's weights."""
    depth, width, heads = (dimensions[name] for name in ("depth", "hidden_size", "num_heads"))
    model = UsualDiT(side, 2, 4, width, depth, heads, CLASSES)
    model.load_state_dict(ours.task.model.state_dict())  # type: ignore[union-attr, operator]
    return UsualScript(model, rate, bf16=bf16)


def usual_step(usual: UsualScript, samples: Tensor, labels: Tensor, batch: int) -> float:
    """One step of the script on its own draws."""
    rows = torch.randint(len(samples), (batch,))
    clean, t, dropped = samples[rows], torch.randint(1000, (batch,)), torch.rand(batch) < DROPOUT
    return usual.step(clean, labels[rows], t, torch.randn_like(clean), dropped)


def steps_in_turns(size: str, case: str, batch: int, rounds: int, clock: str) -> dict[str, Any]:
    """Milliseconds of a step of both, and how many times as fast ours is."""
    side = 32
    precision, bf16 = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        ours = trainer(SIZES[size], side, batch, precision, Path(folder))
        usual = script(ours, SIZES[size], side, bf16)
        samples, labels = latents(256, side)
        runs: dict[str, Callable[[], Any]] = {
            "ours": ours._train_step,
            "usual script": lambda: usual_step(usual, samples, labels, batch),
        }
        seconds = interleaved(runs, rounds, clock)
        shares = share_of_matrices(ours)
    times = milliseconds(seconds)
    return {
        "milliseconds": times,
        "images_a_second": {name: 1e3 * batch / time for name, time in times.items()},
        "times_as_fast": times_as_fast(seconds, "ours", "usual script"),
        **shares,
    }


def share_of_matrices(ours: Trainer) -> dict[str, Any]:
    """The share of matrix products, convolutions and attention in a step, and what costs most."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        ours._train_step()
    events = [(event.key, event.self_cpu_time_total) for event in recorded.key_averages()]
    total = sum(time for _, time in events)
    products = sum(time for name, time in events if any(part in name for part in MATRICES))
    costly = sorted(events, key=lambda event: -event[1])[:10]
    return {"matrices": products / total, "operators": {name: time / total for name, time in costly}}


def curves(case: str, steps: int, batch: int = 8, side: int = 16) -> tuple[list[float], list[float]]:
    """The losses of both over the same steps of a tiny DiT, at a rate at which they fall."""
    rate = 10 * RATE
    precision, bf16 = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        ours = trainer(TINY, side, batch, precision, Path(folder), rate)
        usual = script(ours, TINY, side, bf16, rate)
        task: Any = ours.task
        mine, theirs = [], []
        for step in range(steps):
            order = ours.state.order
            position = order.position
            rows = order.take(batch)
            order.position = position
            noise = BatchNoise(SEED, step, batch, torch.arange(batch), torch.device("cpu"))
            epsilon, times = noise.normal(4, side, side), (noise.uniform() * 1000).long()
            dropped = noise.uniform() < DROPOUT
            theirs.append(usual.step(task.samples[rows], task.labels[rows], times, epsilon, dropped))
            mine.append(float(ours._train_step()["loss"]))
    return mine, theirs


def apart(curves: tuple[list[float], list[float]]) -> float:
    """The largest distance of two curves over the second's value."""
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(*curves, strict=True))


def bf16_instructions() -> str:
    """Which bf16 instructions this processor has, in words."""
    found = torch.cpu.get_capabilities()
    names = {"avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX"}
    return " and ".join(word for name, word in names.items() if found.get(name)) or "no bf16 instructions"


def claims(rows: dict[str, dict[str, Any]], courses: dict[str, Any]) -> list[Claim]:
    distances = {precision: apart(course) for precision, course in courses.items()}
    found = []
    for name, row in rows.items():
        size, case = name.split()
        target, kind = {
            "float32": (EQUAL, "in float32"),
            "bf16": (EQUAL, "in bf16, as the script,"),
            "bf16-float32": (FASTER, "in bf16, against float32,"),
        }[case]
        rates = row["images_a_second"]
        found.append(
            Claim(
                "trainer",
                f"DiT-{size.upper()}/2 {kind} trains at least {target:g} times as fast as the usual script, "
                "on the same loss curve",
                "ditkit",
                f"{row['times_as_fast']:.2f} times: {rates['ours']:.2f} images a second, the script "
                f"{rates['usual script']:.2f}; losses at most {100 * distances[case]:.2g} % apart over "
                f"{len(courses[case][0])} steps of a tiny DiT ({courses[case][1][0]:.3f} to "
                f"{courses[case][1][-1]:.3f})",
                row["times_as_fast"] >= target and distances[case] < (0.001 if case == "float32" else 0.02),
                f"{100 * row['matrices']:.0f} % of the trainer's step is products of matrices and attention; "
                f"32 x 32 x 4 latents in memory, {torch.get_num_threads()} thread(s), a processor with "
                f"{bf16_instructions()}",
            )
        )
    return found


def main() -> None:
    parser = arguments(__file__, __doc__)
    add_options(parser, rounds=5)
    parser.add_argument("--sizes", nargs="+", choices=["s", "b"], default=["s", "b"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30, help="of the loss curves")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    courses = {case: curves(case, options.steps) for case in options.cases}
    pairs = [(size, case) for size in options.sizes for case in options.cases]
    rows = {
        f"{size} {case}": steps_in_turns(size, case, options.batch, options.rounds, options.clock)
        for size, case in track(pairs, description="cases")
    }
    written = claims(rows, courses)
    for claim in written:
        console.print(f"{'holds' if claim.holds else 'DOES NOT HOLD'}  {claim.claim}: {claim.measured}")
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    figures = {"steps": rows, "losses": courses}
    write(options.json, written, machine(), settings=settings, figures=figures)


if __name__ == "__main__":
    main()
