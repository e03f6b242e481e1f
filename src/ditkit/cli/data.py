"""`ditkit data`: the data sets that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli.common import console, guarded, listed, writable_file


def add_to(app: typer.Typer) -> None:
    data = typer.Typer(help="Look at the data sets that ship with ditkit.", no_args_is_help=True)
    data.command(epilog="Example: ditkit data emoji --preview sheet.png")(guarded(emoji))

    @data.callback(epilog="Example: ditkit data emoji")
    def _group() -> None:
        pass

    app.add_typer(data, name="data")


def emoji(
    preview: Annotated[
        Path | None, typer.Option("--preview", help="Write a sheet of pictures to this .png or .webp file.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=0, help="Pictures on the sheet; 0 for all.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which pictures.")] = 0,
) -> None:
    """Emoji with their names: how many there are, and a preview."""
    if preview is not None:
        writable_file(preview, (".png", ".webp"), "--preview")
    from rich.table import Table

    from ditkit.data import emoji as library

    rows = library.EmojiDataset().rows
    table = Table("group", "pictures", "held out", "for example", header_style="bold", pad_edge=False)
    for group in library.GROUPS:
        members = [row.caption for row in rows if row.group == group]
        held_out = sum(map(library.is_held_out, members))
        table.add_row(group, str(len(members)), str(held_out), members[len(members) // 2] if members else "")
    console.print(table)
    if preview is not None:
        preview.parent.mkdir(parents=True, exist_ok=True)
        library.preview(preview, count, seed)
        listed([preview])
