"""`ditkit convert`: authors' checkpoints into diffusers folders."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli.common import UsageError, bar, console, existing_file, guarded, writable_folder


class Origin(str, Enum):
    authors = "authors"
    dit = "dit"
    pixart = "pixart"


class Weights(str, Enum):
    ema = "ema"
    model = "model"


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: ditkit convert DiT-XL-2-256x256.pt --arch dit-xl/2 --out dit-xl-2")(
        guarded(convert)
    )


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="An authors' .pt, .pth or .safetensors file; with --from dit or pixart, a folder."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist yet.")],
    arch: Annotated[
        str | None, typer.Option("--arch", help="Architecture, such as dit-xl/2; else what the file says.")
    ] = None,
    origin: Annotated[
        Origin,
        typer.Option("--from", help="dit, pixart: start --arch lit, lit-pixart from a trained one's folder."),
    ] = Origin.authors,
    weights: Annotated[
        Weights, typer.Option("--weights", help="Which weights of a training checkpoint.")
    ] = Weights.ema,
) -> None:
    """Write an authors' checkpoint as a diffusers folder. Nothing in the file is ever run."""
    if origin is Origin.authors:
        existing_file(source, "checkpoint")
    elif arch is None:
        raise UsageError(f"--from {origin.value} needs --arch: the architecture to start, such as lit")
    if out.exists():
        raise UsageError(f"--out {out} exists already; name a new folder")
    writable_folder(out.parent)
    from ditkit.models.convert import convert as run
    from ditkit.models.convert import inherit

    with bar("MB") as progress:
        task = progress.add_task("converting", total=None)

        def update(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done // 2**20, total=total // 2**20)

        if origin is Origin.authors:
            done = run(source, arch, out, weights.value, progress=update)
        else:
            done = inherit(source, str(arch), out, progress=update)
    console.print(str(done), highlight=False, soft_wrap=True, markup=False)
