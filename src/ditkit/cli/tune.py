"""`ditkit tune`: the fastest setting within an error budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ditkit.cli.bench import bench_bar, judge_of, read_prompts
from ditkit.cli.common import UsageError, console, guarded, listed, notices, writable_folder
from ditkit.cli.generate import Batch, Guidance, Model, Seed, Size, Steps, check_prompts, load, parse_size

INTERRUPTED = 130


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: ditkit tune --model micro-flux --max-error 0.05 --trials 60")(guarded(tune))


def tune(
    max_error: Annotated[
        float,
        typer.Option("--max-error", help="Budget: relative distance of the final latents to dense sampling."),
    ],
    model: Model = "micro-flux",
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Settings to try, earlier ones included.")
    ] = 60,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A text file, a prompt or class a line; half of them are held out."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Consider only these methods; repeatable.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", help="Learned parts of a method, as name=folder; repeatable."),
    ] = None,
    steps: Steps = 28,
    guidance: Guidance = None,
    size: Size = None,
    seed: Seed = 0,
    batch: Batch = 8,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds on held-out prompts.")] = 3,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the study, recipe.yaml and report.html.")
    ] = Path("tune"),
) -> None:
    """Search methods, options and steps for the fastest setting whose error stays within a budget.

    Ctrl-C keeps the finished trials; the same command goes on from them.
    """
    if not max_error > 0:
        raise UsageError(f"--max-error {max_error:g}: a number above 0 is needed, e.g. 0.05")
    texts = read_prompts(prompts) or None
    pixels = parse_size(size)
    folders = dict(_pair(text) for text in weights or ())
    writable_folder(out)
    from ditkit import registry
    from ditkit.analysis import tune as library
    from ditkit.analysis.sampling import Sampling

    for name in (*(method or ()), *folders):
        registry.get("method", name)
    pipe = load(model)
    check_prompts(pipe, texts or [])
    with bench_bar() as progress:
        result = library.tune(
            pipe,
            max_error,
            out,
            trials=trials,
            prompts=texts,
            sampling=Sampling(steps, guidance, pixels, seed),
            methods=method,
            weights=folders,
            batch=batch,
            repeats=repeats,
            name=model,
            judge=judge_of(model),
            progress=progress,
        )
    console.print(_table(result))
    console.print(result.headline(), highlight=False)
    for name, why in result.space.left_out.items():
        notices.print(f"not tried: {name}: {why}", highlight=False, markup=False)
    for failure in result.failures:
        notices.print(f"failed: {failure}", highlight=False, markup=False)
    if not result.complete:
        raise typer.Exit(INTERRUPTED)
    listed([out / "recipe.yaml", *sorted((out / "front").glob("*.yaml")), out / "report.html"])


def _pair(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise UsageError(f"--weights {text!r} is not of the form name=folder")
    if not Path(folder).is_dir():
        raise UsageError(f"--weights {text!r}: there is no folder {folder}")
    return name, folder


def _table(result: Any) -> Any:
    """The front, with what it gave on the prompts of the search and on held-out ones."""
    from rich import box
    from rich.table import Table

    from ditkit.analysis.contestants import from_recipe
    from ditkit.analysis.result import error, ratio

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("setting", min_width=24, overflow="fold")
    for name in ("time / dense", "error", "held out: time", "error"):
        table.add_column(name, justify="right")
    rows = {} if result.held is None else {row.label: row for row in result.held.rows}
    shown = {trial.number: trial for trial in (*result.front, *filter(None, [result.chosen]))}
    for trial in sorted(shown.values(), key=lambda trial: trial.outcome.time_ratio):
        held = rows.get(from_recipe(trial.recipe).label)
        cells = [ratio(trial.outcome.time_ratio), error(trial.outcome.error)]
        cells += ["", ""] if held is None else [ratio(held.time_ratio), error(held.latent_error)]
        chosen = result.chosen is not None and trial.number == result.chosen.number
        label = trial.recipe.describe().replace(",", ", ")
        table.add_row(label, *cells, style="bold green" if chosen else "")
    return table
