"""`ditkit fit`: the parts of methods that are learned or searched for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli.common import (
    UsageError,
    bar,
    console,
    existing_file,
    guarded,
    listed,
    notices,
    writable_folder,
)
from ditkit.cli.generate import Model, load


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog="Example: ditkit fit sla --model micro-flux --out out/sla --set steps=200   then: "
        "ditkit generate 'red apple' --with sla:weights=out/sla"
    )(guarded(fit))


def fit(
    name: Annotated[str, typer.Argument(help="Whose part: harmonica, clear, sla, sparse-vdit.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for what was learned; a stopped fit goes on there."),
    ] = None,
    model: Model = "micro-flux",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="An option of the fit as option=value; repeatable."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A text file with a prompt a line; the emoji captions if not given."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Pictures to learn from: own (the model draws them) or emoji (the data set)."
        ),
    ] = "own",
    options: Annotated[bool, typer.Option("--options", help="List the options of the fit and stop.")] = False,
) -> None:
    """Fit the part of a method that is learned or searched for; run it again to go on after a stop."""
    from ditkit import registry

    entry = registry.get("fitter", name)
    if options:
        from ditkit.cli.listing import detail

        detail(entry)
        return
    fitter = registry.build("fitter", name, set_ or ())
    if out is None:
        raise UsageError(f"--out is needed: the folder for the fit, e.g. --out out/{name}")
    if data not in ("own", "emoji"):
        raise UsageError(f"--data {data!r}: own or emoji")
    from ditkit.fitting import run as library

    library.check_folder(out)
    writable_folder(out)
    texts = _prompts(prompts)
    pipe = load(model)
    if texts is None:
        texts = library.emoji_prompts()
    with fit_bar() as progress:
        folder = library.run(pipe, name, fitter, library.FitData(texts, data), out, progress)
    listed([folder])
    notices.print(f"use it: ditkit generate ... --with {entry.name}:weights={folder}", highlight=False)


def _prompts(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    lines = existing_file(path, "--prompts").read_text(encoding="utf-8").splitlines()
    texts = tuple(line.strip() for line in lines if line.strip())
    if not texts:
        raise UsageError(f"--prompts {path} holds no prompt")
    return texts


@contextlib.contextmanager
def fit_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar over the work of a fit; on Ctrl-C it says how to go on."""
    with bar("") as progress:
        task = progress.add_task("fitting", total=None)

        def update(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        try:
            yield update
        except KeyboardInterrupt:
            progress.stop()
            console.print("stopped; the same command goes on from here", highlight=False)
            raise typer.Exit(130) from None
