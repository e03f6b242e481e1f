"""DiffScaler's claim at a small scale: how near adapters of equal size come to full fine-tuning, and that
nothing is forgotten.

A small DiT of velocities learns the emoji at 16 x 16 pixels and goes on to Fashion-MNIST's pictures at that
size: all of it (full), DiffScaler, LoRA and TD-LoRA of as many parameters, and DiffScaler's scales and shifts
alone. Each learns a table of the ten classes, begun at the null class. Every way has the best of the same
three learning rates on the first seed (vectors ten times those, as DiffScaler's defaults have it). The
held-out error is averaged over fixed noises; a claim holds where every seed agrees.

    python -m benchmarks.training.diffscaler FOLDER  # has fashion900.npz: images (N, 28, 28), labels (N,)
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from ditkit import hub
from ditkit.adapters import store
from ditkit.training.config import RunConfig
from ditkit.training.trainer import run_stage

SIDE, SEEDS, NOISES = 16, (0, 1, 2), 8
PRETRAINING, STEPS, BATCH = 1200, 300, 16
NETWORK = {"patch_size": 4, "hidden_size": 64, "depth": 4, "num_heads": 4}
RATES = (1e-3, 3e-3, 1e-2)
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
WAYS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "full": None,
    "diffscaler": ("diffscaler", {"rank": 8}),
    "lora": ("lora", {"rank": 9, "alpha": 9}),
    "td-lora": ("td-lora", {"rank": 3, "alpha": 3}),
    "scale and shift": ("diffscaler", {"rank": 0}),
}


def tiles(source: Path, folder: Path) -> Path:
    """The pictures as a folder of classes."""
    with np.load(source / "fashion900.npz", allow_pickle=False) as found:
        images, labels = found["images"], found["labels"]
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / CLASSES[int(label)]
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(255 - image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        picture.save(place / f"{index:03d}.png")
    return folder


def settings(seed: int, steps: int, options: dict[str, Any], data: dict[str, Any], **more: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run", "task": "class-to-image", "seed": seed, "steps": steps, "batch_size": BATCH,
            "precision": "no", "data": data, "task_options": {"process": "flow", **options},
            "schedule": {"kind": "cosine", "warmup_steps": 20}, "ema": {"decay": 0.99}, "tracker": None,
            "log_every": 100, "checkpoint_every": steps, "heldout_every": steps, **more,
        }
    )  # fmt: skip


def trained(run: RunConfig, folder: Path) -> dict[str, float]:
    """Held-out error and parameters of a finished run."""
    figures: dict[str, float] = {}

    def measure(task: Any, step: int) -> dict[str, float]:
        inner = getattr(task, "task", task)
        figures["error"] = statistics.mean(inner.heldout_loss(seed)["loss"] for seed in range(NOISES))
        figures["parameters"] = sum(p.numel() for p in task.parameters() if p.requires_grad)
        return {}

    run_stage(run, folder, {}, measure)
    return figures


def adapted(
    seed: int, way: str, rate: float, start: Path, data: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """One way of going on from a pretrained pipeline, at one learning rate."""
    more: dict[str, Any] = {"optimizer": {"lr": rate}}
    if (chosen := WAYS[way]) is not None:
        kind, options = chosen
        if kind == "diffscaler":
            options = {**options, "vector_lr": 10 * rate}
        more["adapter"] = {"kind": kind, "options": options}
    figures = trained(settings(seed, STEPS, {"start_from": str(start)}, data, **more), folder)
    return {"seed": seed, "way": way, "rate": rate, **figures}


def unforgotten(start: Path, adapter: Path) -> bool:
    """Whether the pretrained network, with the adapter switched off, answers bit for bit as before."""
    model = hub.load(start).transformer.eval()
    inputs = (torch.randn(8, 3, SIDE, SIDE), torch.rand(8), torch.arange(8) % 5)
    with torch.no_grad():
        before, weights = model(*inputs).sample, {k: v.clone() for k, v in model.state_dict().items()}
        store.load(model, adapter, "other")
        changed = model(*inputs).sample
        store.use(model)
        after = model(*inputs).sample
    store.remove(model, "other")
    same = all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    return torch.equal(before, after) and same and not torch.equal(before, changed)


def measured(source: Path, work: Path) -> tuple[list[dict[str, Any]], bool]:
    data = {"kind": "folder", "path": str(tiles(source, work / "tiles")), "size": SIDE}
    runs, unchanged = [], []
    for seed in SEEDS:
        first = settings(
            seed, PRETRAINING, {"arch": "dit", "model": NETWORK, "pixels": SIDE},
            {"kind": "emoji"}, optimizer={"lr": 1e-3},
        )  # fmt: skip
        trained(first, work / f"{seed}")
        start = work / f"{seed}" / "export"
        for way in WAYS:
            for rate in RATES if seed == SEEDS[0] else (best_rate(runs, way),):
                folder = work / f"{seed}-{way}-{rate}"
                runs.append(adapted(seed, way, rate, start, data, folder))
                if WAYS[way] is not None:
                    unchanged.append(unforgotten(start, folder / "export"))
    return runs, all(unchanged)


def best_rate(runs: list[dict[str, Any]], way: str) -> float:
    """The learning rate of the least error on the first seed."""
    first = [run for run in runs if (run["way"], run["seed"]) == (way, SEEDS[0])]
    return min(first, key=lambda run: run["error"])["rate"]


def claims(runs: list[dict[str, Any]], unchanged: bool) -> list[record.Claim]:
    rates = {way: best_rate(runs, way) for way in WAYS}
    errors = {way: [r["error"] for r in runs if (r["way"], r["rate"]) == (way, rates[way])] for way in WAYS}
    sizes = {run["way"]: run["parameters"] for run in runs}

    def told(way: str) -> str:
        mean, spread = statistics.mean(errors[way]), statistics.stdev(errors[way])
        return f"{mean:.4f} ± {spread:.4f} {way} ({sizes[way]:,} parameters, rate {rates[way]:g})"

    limit = (
        f"{len(SEEDS)} seeds, ± their deviation, each must agree; the best of the rates "
        f"{', '.join(f'{rate:g}' for rate in RATES)} on the first; DiT of width 64 and depth 4, emoji to 900 "
        f"Fashion-MNIST pictures at {SIDE} x {SIDE}, {STEPS} steps of batch {BATCH}; the method is a "
        "reconstruction from the abstract and secondary sources"
    )
    paper = "arXiv 2404.09976, at a small scale"
    pairs = [
        ("diffscaler", "full fine-tuning is the floor of its held-out error", "full", "diffscaler", paper),
        ("diffscaler", "DiffScaler is no worse than LoRA of as many parameters", "diffscaler", "lora", paper),
        ("diffscaler", "LoRA is better than scales and shifts alone", "lora", "scale and shift", paper),
        ("diffscaler", "DiffScaler is better than scales and shifts alone", "diffscaler", "scale and shift",
         paper),
        ("td-lora", "TD-LoRA is no worse than LoRA of as many parameters", "td-lora", "lora",
         "arXiv 2504.06803, reconstructed, at a small scale"),
    ]  # fmt: skip
    lines = [
        record.Claim(
            system, claim, source, f"held-out error {told(low)}, {told(high)}",
            all(a <= b for a, b in zip(errors[low], errors[high], strict=True)), limit,
        )
        for system, claim, low, high, source in pairs
    ]  # fmt: skip
    count = sum(WAYS[run["way"]] is not None for run in runs)
    said = "answers and weights bit-equal" if unchanged else "answers or weights differ"
    kept = f"{said} after {count} adapters were trained, loaded and switched off"
    lines.append(record.Claim("diffscaler", "nothing is forgotten", paper, kept, unchanged, limit))
    return lines


def main() -> None:
    parser = record.arguments(__file__, __doc__)
    parser.add_argument("source", type=Path, help="folder that has fashion900.npz")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        runs, unchanged = measured(asked.source, Path(work))
    record.write(asked.json, claims(runs, unchanged), {"torch": torch.__version__}, runs=runs)


if __name__ == "__main__":
    main()
