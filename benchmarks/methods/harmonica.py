"""HarmoniCa on trained micro-flux: is a learned table better than random ones and than the plain rule?

Three fits with different seeds, each against five random tables that reuse as much, and against reusing
everything at every other step; further fits leave out what the paper adds. About four minutes.

    python -m benchmarks.methods.harmonica [--epochs 40] [--seeds 0 1 2]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ditkit
from benchmarks.methods.taylorseer import captions, latents
from benchmarks.record import Claim, arguments, write
from ditkit.analysis import bench as comparison
from ditkit.analysis.metrics import relative_l2
from ditkit.analysis.sampling import Sampling
from ditkit.fitting import run
from ditkit.fitting.harmonica import HarmoniCaFitter
from ditkit.methods.harmonica import HarmoniCa


def learned(pipe: Any, prompts: tuple[str, ...], **options: Any) -> Tensor:
    """A table (T, U) after a fit."""
    with tempfile.TemporaryDirectory() as folder:
        fitter = HarmoniCaFitter(**options)
        run.run(pipe, "harmonica", fitter, run.FitData(prompts), Path(folder) / "fit")
        return torch.tensor(HarmoniCa(weights=str(Path(folder) / "fit")).table())


def random_table(like: Tensor, seed: int) -> Tensor:
    """As many reused modules at random places after the first step."""
    steps, units = like.shape
    places = torch.randperm((steps - 1) * units, generator=torch.Generator().manual_seed(seed))
    table = torch.ones(steps * units, dtype=torch.bool)
    table[units + places[: int((~like).sum())]] = False
    return table.reshape(steps, units)


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--model", default="micro-flux")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    pipe = ditkit.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    sampling, prompts = Sampling(steps=options.steps), captions(8)
    dense = latents(pipe, prompts, sampling)

    def error(method: HarmoniCa) -> float:
        return relative_l2(latents(pipe, prompts, sampling, method), dense)

    uniform = error(HarmoniCa(uniform=2))
    common = dict(
        steps=options.steps, epochs=options.epochs, batch=options.batch, lr=0.15, beta=1e-6, reuse=0.5,
        lambda_every=max(1, options.epochs // 4),
    )  # fmt: skip
    training = run.emoji_prompts()[:256]
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        table = learned(pipe, training, seed=seed, **common)
        reused = int((~table).sum())
        chance = [error(HarmoniCa(mask=random_table(table, 10 * seed + i))) for i in range(5)]
        row = {"seed": seed, "reused": reused, "learned": error(HarmoniCa(mask=table)), "random": chance}
        if seed == options.seeds[0]:
            for ablation in ("lambda", "path"):
                other = learned(pipe, training, seed=seed, ablation=ablation, **common)
                row[f"without {ablation}"] = [int((~other).sum()), error(HarmoniCa(mask=other))]
        rows.append(row)
        print(row, flush=True)
    where = f"micro-flux, {options.steps} steps, {table.numel()} module outputs"
    found = [
        Claim(
            "harmonica",
            f"{where}: the learned table is nearer to dense than random tables that reuse as much",
            "the authors' code on a toy DiT",
            "; ".join(
                f"seed {row['seed']}: {row['reused']} reused, {row['learned']:.4f} against "
                f"{min(row['random']):.4f} to {max(row['random']):.4f}"
                for row in rows
            ),
            all(row["learned"] < min(row["random"]) for row in rows),
            f"{options.epochs} trajectories of {options.batch} pictures; beta steered to half of the modules",
        ),
        Claim(
            "harmonica",
            f"{where}: nearer to dense than reusing all at every other step",
            "arXiv 2410.01723",
            ", ".join(f"{row['learned']:.4f} ({row['reused']} reused)" for row in rows) + " against "
            f"{uniform:.4f} ({table.numel() // 2} reused)",
            all(row["learned"] < uniform and row["reused"] >= table.numel() // 2 for row in rows),
            "holds only if no less is reused",
        ),
        Claim(
            "harmonica",
            f"{where}: better than without the image error proxy, and than without its own path",
            "arXiv 2410.01723",
            f"{rows[0]['learned']:.4f} ({rows[0]['reused']} reused); lambda = 1: "
            f"{rows[0]['without lambda'][1]:.4f} ({rows[0]['without lambda'][0]}); cache from full steps: "
            f"{rows[0]['without path'][1]:.4f} ({rows[0]['without path'][0]})",
            all(rows[0]["learned"] < rows[0][f"without {name}"][1] for name in ("lambda", "path")),
            "one seed; the numbers of reused modules differ a little",
        ),
    ]
    found.append(
        Claim(
            "harmonica",
            "near-lossless at 1.44x on DiT-XL/2 at 256 px and at 1.73x on PixArt-Sigma at 2048 px",
            "arXiv 2410.01723",
            "not measured: it takes those models and their reference sets",
            None,
        )
    )
    write(options.json, found, comparison.machine(pipe), rows=rows, uniform=uniform)


if __name__ == "__main__":
    main()
