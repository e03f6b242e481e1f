"""`ditkit convert`: authors' checkpoints into diffusers folders."""

from __future__ import annotations

import typer


def add_to(app: typer.Typer) -> None:
    pass
