"""`ditkit compare`: architectures at equal cost, in one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli.common import UsageError, console, existing_file, guarded, listed, notices
from ditkit.cli.tune import INTERRUPTED


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: ditkit compare configs/compare_archs.yaml seeds=[0,1,2]")(guarded(compare))


def compare(
    config: Annotated[Path, typer.Argument(help="YAML file of the comparison.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as budget.steps=100 or dit.model.depth=6.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue; finished runs are not repeated, failed ones are.")
    ] = False,
) -> None:
    """Train architectures at equal FLOPs, parameters or steps and report loss, quality and cost of them all.

    The report is written anew after every run; Ctrl-C keeps what is done.
    """
    existing_file(config, "config")
    for text in overrides or ():
        if "=" not in text.lstrip("="):
            raise UsageError(f"override {text!r} is not of the form key=value")
    from ditkit.analysis.compare.comparison import compare as run

    def told(line: str) -> None:
        notices.print(line, highlight=False, markup=False)

    try:
        result = run(config, tuple(overrides or ()), resume, told)
    except KeyboardInterrupt:
        told("stopped; the same command with --resume goes on")
        raise typer.Exit(INTERRUPTED) from None
    console.print(result.table())
    for failure in result.failures():
        notices.print(f"failed: {failure}", highlight=False, markup=False)
    for verdict in result.verdicts():
        console.print(verdict, highlight=False, markup=False)
    folder = Path(result.settings["output"])
    listed([folder / "report.html", folder / "result.json"])
