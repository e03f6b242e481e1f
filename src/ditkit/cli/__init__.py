"""The `ditkit` command. Each command is a thin call of the library, one file per group of commands.

Nothing here imports torch at the top: `ditkit --help` answers in a fraction of a second.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ditkit import __version__
from ditkit.cli import (
    adapt,
    bench,
    compare,
    compress,
    convert,
    data,
    demo,
    evaluate,
    fit,
    generate,
    listing,
    train,
    tune,
)
from ditkit.cli.common import console, set_debug

app = typer.Typer(
    name="ditkit",
    help="Methods for diffusion transformers, on the models of Hugging Face diffusers.",
    epilog='Example: ditkit generate "red apple" --with taylorseer:interval=4 --seed 7 --out apple.png',
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

GROUPS = (
    demo, generate, bench, tune, evaluate, train, adapt, compress, compare, fit, listing, data, convert,
)  # fmt: skip
for group in GROUPS:
    group.add_to(app)


def _version(asked: bool) -> None:
    if asked:
        console.print(f"ditkit {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    set_debug(debug)


def main() -> None:
    """Entry point of the `ditkit` script. Exit codes: 0 done, 1 failed while working, 2 wrong use."""
    app()
