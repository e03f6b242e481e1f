"""`ditkit demo`: what `make demo` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli.bench import bench_bar, judge_of, show
from ditkit.cli.common import guarded, listed, writable_folder
from ditkit.cli.generate import Guidance, Model, Seed, Size, Steps, load, parse_size


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: ditkit demo --out out")(guarded(demo))


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.html and the pictures.")] = Path(
        "out"
    ),
    model: Model = "micro-flux",
    steps: Steps = 28,
    guidance: Guidance = None,
    size: Size = None,
    seed: Seed = 0,
    clips: Annotated[
        bool, typer.Option("--clips/--no-clips", help="A row of clips by micro-wan too.")
    ] = True,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds.")] = 3,
) -> None:
    """Draw eight pictures, and clips, densely and with each method, side by side, and write a report."""
    pixels = parse_size(size)
    writable_folder(out)
    from ditkit.analysis import demo as library
    from ditkit.analysis.sampling import Sampling

    pipe = load(model)
    with bench_bar() as progress:
        result = library.demo(
            out,
            pipe,
            name=model,
            sampling=Sampling(steps, guidance, pixels, seed),
            repeats=repeats,
            judge=judge_of(model),
            progress=progress,
            clips=load("micro-wan") if clips else None,
        )
    show(result)
    listed([out / "demo.png", out / "report.html"])
