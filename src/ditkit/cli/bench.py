"""`ditkit bench`: ways to sample, measured side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

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
from ditkit.cli.generate import (
    STEPS,
    Batch,
    Guidance,
    Model,
    Seed,
    Size,
    StepsOfRecipe,
    check_prompts,
    load,
    parse_size,
)

METHODS = tuple(
    f"taylorseer:interval=3,order=2,granularity={where},expansion=newton"
    for where in ("last-block", "module")
)


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: ditkit bench --with taylorseer:interval=3 --with local-window --steps 50")(
        guarded(bench)
    )


def bench(
    with_: Annotated[
        list[str] | None,
        typer.Option("--with", "-w", help="A method to measure; repeatable. a+b are applied together."),
    ] = None,
    recipe: Annotated[
        list[Path] | None, typer.Option("--recipe", help="A recipe.yaml to measure; repeatable.")
    ] = None,
    model: Model = "micro-flux",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to draw, a class's name or number for a class-conditional model; repeatable.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file with a prompt, or class, a line.")
    ] = None,
    steps: StepsOfRecipe = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds.")] = 3,
    guidance: Guidance = None,
    size: Size = None,
    seed: Seed = 0,
    batch: Batch = 8,
    peers: Annotated[bool, typer.Option(help="Measure other libraries' caches too.")] = True,
    plain: Annotated[
        bool, typer.Option(help="Measure plain sampling with as many steps as were computed.")
    ] = True,
    explain: Annotated[
        bool, typer.Option("--explain", help="First say what each method can give on this model at most.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for bench.json, .csv and .html.")] = Path(
        "out/bench"
    ),
) -> None:
    """Measure methods against dense sampling, other libraries and plain sampling with fewer steps."""
    texts = [*(prompt or ()), *read_prompts(prompts)]
    pixels = parse_size(size)
    writable_folder(out)
    from ditkit.analysis import bench as library
    from ditkit.analysis.contestants import parse
    from ditkit.analysis.sampling import Sampling
    from ditkit.recipes import Recipe

    recipes = [Recipe.load(existing_file(path, "--recipe")) for path in recipe or ()]
    for told in (
        opened.settings for opened in recipes
    ):  # what they were measured with, where nothing is said
        steps = steps or told.steps
        guidance, pixels = told.guidance if guidance is None else guidance, pixels or told.size
    methods = [*(parse(text) for text in with_ or (() if recipes else METHODS)), *recipes]
    pipe = load(model)
    check_prompts(pipe, texts)
    for opened in recipes:
        opened.check(pipe)
    texts = texts or library.prompts_for(pipe)
    sampling = Sampling(steps or STEPS, guidance, pixels, seed)
    expected = show_expected(pipe, methods, texts[:batch], sampling) if explain else ()
    with bench_bar() as progress:
        result = library.bench(
            pipe,
            methods,
            texts,
            sampling=sampling,
            repeats=repeats,
            batch=batch,
            peers=peers,
            plain=plain,
            judge=judge_of(model),
            name=model,
            progress=progress,
            expected=expected,
        )
    show(result)
    written = [result.to_json(out / "bench.json"), result.to_csv(out / "bench.csv")]
    listed([*written, result.to_html(out / "bench.html")])


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        UsageError: the file is not there or holds none.
    """
    if path is None:
        return []
    lines = existing_file(path, "--prompts").read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UsageError(f"--prompts {path} holds no prompt")
    return texts


def judge_of(model: str) -> Any:
    """Who tells whether pictures show what their prompts name: the emoji, for pipelines that draw them."""
    from ditkit.hub import BUNDLED

    if model not in BUNDLED:
        return None
    from ditkit.analysis.evaluate import Judge
    from ditkit.analysis.motion_judge import MotionJudge

    return MotionJudge() if model == "micro-wan" else Judge()


@contextlib.contextmanager
def bench_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar over generations; yields what `ditkit.bench` calls before each of them."""
    with bar("runs") as progress:
        task = progress.add_task("measuring", total=None)

        def update(label: str, done: int, total: int) -> None:
            progress.update(task, description=label, completed=done, total=total)

        yield update


def show_expected(pipe: Any, methods: list[Any], prompts: list[str], sampling: Any) -> list[Any]:
    """Ceilings and predicted times on the terminal, before anything is measured."""
    from rich import box
    from rich.table import Table

    from ditkit.analysis.explain import explain
    from ditkit.analysis.result import ratio

    with notices.status("counting and timing a few dense steps"):
        cost, expected = explain(pipe, methods, prompts, sampling)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("before the run", min_width=20, overflow="fold")
    for name in ("FLOPs / dense at best", "time / dense predicted"):
        table.add_column(name, justify="right")
    for each in expected:
        least = None if each.ceiling is None else 1 / each.ceiling
        table.add_row(each.label.replace(",", ", "), ratio(least), ratio(each.time_ratio))
    console.print(table)
    console.print(
        f"{sampling.steps} steps; {100 * cost.share_of_steps:.0f} % of the time is in the steps, "
        f"{100 * cost.flops.attention_share:.0f} % of a step's FLOPs in attention.",
        highlight=False,
    )
    for note in dict.fromkeys(note for each in expected for note in each.notes):
        console.print(f"{note[0].upper()}{note[1:]}.", highlight=False)
    return expected


def show(result: Any) -> None:
    """The table on the terminal, and what could not be measured."""
    console.print(result.table(console.width))
    for row in result.rows:
        for note in row.notes:
            notices.print(f"{row.label}: {note}", highlight=False, markup=False)
