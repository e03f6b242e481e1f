"""`ditkit eval`: how often a pipeline draws what it was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ditkit.cli.common import UsageError, console, data_section, guarded, listed, writable_folder
from ditkit.cli.generate import Guidance, Seed, Steps, load


def add_to(app: typer.Typer) -> None:
    app.command("eval", epilog="Example: ditkit eval micro-wan --count 100 --out out/eval")(guarded(evaluate))


def evaluate(
    model: Annotated[
        str, typer.Argument(help="micro-flux, micro-wan, or a folder of a pipeline.")
    ] = "micro-flux",
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, help="How many to draw; 200 pictures or 100 clips if not given."),
    ] = None,
    steps: Steps = 28,
    guidance: Guidance = None,
    seed: Seed = 0,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Folder of true pictures of a class-conditional model's classes; not needed for emoji.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for eval.json and the pictures.")] = Path(
        "out/eval"
    ),
) -> None:
    """Draw captions and count how often the picture, or the clip's object and motion, is the prompted one.

    Of a class-conditional model: how often the nearest true picture is of the class, and how near they are.
    """
    writable_folder(out)
    section = None if data is None else data_section(data)
    from ditkit.analysis.sampling import draws_classes, draws_clips

    pipe = load(model)
    if draws_classes(pipe):
        listed(_classes(pipe, section, count or 200, steps, guidance, seed, out))
        return
    if section is not None:
        raise UsageError(f"--data is for class-conditional models; {model} draws from text")
    if draws_clips(pipe):
        listed(_clips(pipe, count or 100, steps, guidance, seed, out))
    else:
        listed(_pictures(pipe, count or 200, steps, guidance, seed, out))


def _pictures(pipe: Any, count: int, steps: int, guidance: float | None, seed: int, out: Path) -> list[Path]:
    from ditkit.analysis import evaluate as library
    from ditkit.analysis.pictures import save

    found = library.evaluate(pipe, count, steps, guidance, seed)
    table = _table("captions", "asked", "right")
    for group, (right, asked) in found.by_group.items():
        table.add_row(group, str(asked), f"{100 * right / asked:.0f} %")
    table.add_row("all", str(count), f"{100 * found.accuracy:.1f} %", style="bold")
    table.add_row("at most, by the autoencoder", str(count), f"{100 * found.ceiling:.1f} %", style="dim")
    console.print(table)
    written = [_facts(found.as_dict(), out)]
    for name, picture in (("pictures.png", found.pictures), ("unseen.png", found.unseen)):
        if picture is not None:
            written.append(save(picture, out / name))
    return written


def _classes(
    pipe: Any,
    section: dict[str, Any] | None,
    count: int,
    steps: int,
    guidance: float | None,
    seed: int,
    out: Path,
) -> list[Path]:
    from ditkit.analysis import evaluate_classes as library
    from ditkit.analysis.pictures import save
    from ditkit.data.config import DataConfig

    pictures = None if section is None else DataConfig(**section, split="all")
    found = library.evaluate_classes(pipe, pictures, count, steps, guidance, seed)
    table = _table("class", "asked", "recognised")
    for name, (right, asked) in found.by_class.items():
        table.add_row(name, str(asked), f"{100 * right / asked:.0f} %")
    table.add_row("all", str(count), f"{100 * found.recognised:.1f} %", style="bold")
    table.add_row("true pictures", "", f"{100 * found.ceiling:.1f} %", style="dim")
    console.print(table)
    near = "" if found.precision is None else f", precision {found.precision:.3f}, recall {found.recall:.3f}"
    console.print(
        f"Frechet distance {found.distance:.3f}{near}, by small features: not FID.", highlight=False
    )
    written = [_facts(found.as_dict(), out)]
    assert found.pictures is not None
    return [*written, save(found.pictures, out / "pictures.png")]


def _clips(pipe: Any, count: int, steps: int, guidance: float | None, seed: int, out: Path) -> list[Path]:
    from ditkit.analysis import evaluate_motion as library
    from ditkit.analysis.videos import save_clip, wall

    found = library.evaluate_motion(pipe, count, steps, guidance, seed)
    table = _table(f"share of {count} clips", "object", "motion", "both", "both, nearest of nine")
    rows = {"generated": found.shares, "at most, by the autoencoder": found.ceiling, "real clips": found.real}
    for name, shares in rows.items():
        values = (shares.object, shares.motion, shares.both, shares.nearest)
        style = "bold" if name == "generated" else "dim"
        table.add_row(name, *(f"{100 * value:.1f} %" for value in values), style=style)
    console.print(table)
    return [_facts(found.as_dict(), out), save_clip(wall(found.clips), out / "clips.gif")]


def _table(first: str, *others: str) -> Any:
    from rich.table import Table

    return Table(first, *others, header_style="bold", pad_edge=False)


def _facts(facts: dict[str, Any], out: Path) -> Path:
    from ditkit.files import write_text

    return write_text(out / "eval.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
