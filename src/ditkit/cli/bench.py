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
from ditkit.cli.generate import Batch, Guidance, Model, Seed, Size, Steps, load, parse_size

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
    model: Model = "micro-flux",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What to draw; repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file with a prompt a line.")
    ] = None,
    steps: Steps = 28,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds.")] = 3,
    guidance: Guidance = None,
    size: Size = None,
    seed: Seed = 0,
    batch: Batch = 8,
    peers: Annotated[bool, typer.Option(help="Measure other libraries' caches too.")] = True,
    plain: Annotated[
        bool, typer.Option(help="Measure plain sampling with as many steps as were computed.")
    ] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for bench.json, .csv and .html.")] = Path(
        "out/bench"
    ),
) -> None:
    """Measure methods against dense sampling, other libraries and plain sampling with fewer steps."""
    texts = list(prompt or ())
    if prompts is not None:
        lines = existing_file(prompts, "--prompts").read_text(encoding="utf-8").splitlines()
        texts += [line.strip() for line in lines if line.strip()]
        if not texts:
            raise UsageError(f"--prompts {prompts} holds no prompt")
    pixels = parse_size(size)
    writable_folder(out)
    from ditkit.analysis import bench as library
    from ditkit.analysis.contestants import parse
    from ditkit.analysis.sampling import Sampling

    methods = [parse(text) for text in with_ or METHODS]
    pipe = load(model)
    with bench_bar() as progress:
        result = library.bench(
            pipe,
            methods,
            texts or library.PROMPTS,
            sampling=Sampling(steps, guidance, pixels, seed),
            repeats=repeats,
            batch=batch,
            peers=peers,
            plain=plain,
            judge=judge_of(model),
            name=model,
            progress=progress,
        )
    show(result)
    written = [result.to_json(out / "bench.json"), result.to_csv(out / "bench.csv")]
    listed([*written, result.to_html(out / "bench.html")])


def judge_of(model: str) -> Any:
    """Who tells whether pictures show what their prompts name: the emoji set, for pipelines that draw it."""
    from ditkit.hub import BUNDLED

    if model not in BUNDLED:
        return None
    from ditkit.analysis.evaluate import Judge

    return Judge()


@contextlib.contextmanager
def bench_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar over generations; yields what `ditkit.bench` calls before each of them."""
    with bar("runs") as progress:
        task = progress.add_task("measuring", total=None)

        def update(label: str, done: int, total: int) -> None:
            progress.update(task, description=label, completed=done, total=total)

        yield update


def show(result: Any) -> None:
    """The table on the terminal, and what could not be measured."""
    console.print(result.table(console.width))
    for row in result.rows:
        for note in row.notes:
            notices.print(f"{row.label}: {note}", highlight=False, markup=False)
