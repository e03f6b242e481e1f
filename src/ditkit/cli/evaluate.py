"""`ditkit eval`: how often a pipeline draws what it was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli.common import console, guarded, listed, writable_folder
from ditkit.cli.generate import Guidance, Seed, Steps, load


def add_to(app: typer.Typer) -> None:
    app.command("eval", epilog="Example: ditkit eval micro-flux --count 200")(guarded(evaluate))


def evaluate(
    model: Annotated[str, typer.Argument(help="micro-flux, or a folder of a pipeline.")] = "micro-flux",
    count: Annotated[int, typer.Option("--count", min=1, help="Captions of the emoji set to draw.")] = 200,
    steps: Steps = 28,
    guidance: Guidance = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for eval.json and the pictures.")] = Path(
        "out/eval"
    ),
) -> None:
    """Draw captions of the emoji set and count how often the nearest picture is the prompted one."""
    writable_folder(out)
    from rich.table import Table

    from ditkit.analysis import evaluate as library
    from ditkit.analysis.pictures import save
    from ditkit.files import write_text

    found = library.evaluate(load(model), count, steps, guidance, seed)
    table = Table("captions", "asked", "right", header_style="bold", pad_edge=False)
    for group, (right, asked) in found.by_group.items():
        table.add_row(group, str(asked), f"{100 * right / asked:.0f} %")
    table.add_row("all", str(count), f"{100 * found.accuracy:.1f} %", style="bold")
    table.add_row("at most, by the autoencoder", str(count), f"{100 * found.ceiling:.1f} %", style="dim")
    console.print(table)
    facts = json.dumps(found.as_dict(), indent=1, ensure_ascii=False)
    written = [write_text(out / "eval.json", facts + "\n")]
    for name, picture in (("pictures.png", found.pictures), ("unseen.png", found.unseen)):
        if picture is not None:
            written.append(save(picture, out / name))
    listed(written)
