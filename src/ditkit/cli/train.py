"""`ditkit train`: what a YAML file describes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli.common import UsageError, existing_file, guarded, listed


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog="Example: ditkit train configs/micro_flux.yaml transformer.steps=100 output=runs/short"
    )(guarded(train))


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; to resume, its output folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as optimizer.lr=1e-4.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
) -> None:
    """Train what a YAML file describes; checkpoints and curves go into its output folder."""
    if not (resume and config.is_dir()):
        existing_file(config, "config")
    for text in overrides or ():
        if "=" not in text.lstrip("="):
            raise UsageError(f"override {text!r} is not of the form key=value")
    from ditkit.training.trainer import train as run

    exported = run(config, tuple(overrides or ()), resume)
    if os.environ.get("RANK", "0") == "0":  # of the processes of one launch, the first one answers
        listed([exported])
