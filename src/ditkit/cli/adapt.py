"""`ditkit adapt`: an adapter for a model and pictures of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ditkit.cli.common import (
    UsageError,
    data_section,
    guarded,
    listed,
    notices,
    pair,
    run_config,
    writable_folder,
)
from ditkit.cli.generate import Model, load


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog="Example: ditkit adapt --model micro-flux --method diffscaler --data pictures --out adapter  "
        "then: ditkit generate 'red apple' --adapter adapter"
    )(guarded(adapt))


def adapt(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="A folder of pictures or of cached latents, or emoji: the bundled set, of clips for a model "
            "that draws clips.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the adapter; its run is in run/ there.")
    ],
    method: Annotated[
        str, typer.Option("--method", help="One of `ditkit adapters`: diffscaler, td-lora, lora.")
    ] = "lora",
    model: Model = "micro-flux",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps.")] = 1000,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures or clips in a step.")] = 16,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate; the adapter's own if not given.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the start and of the batches.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="An option of the adapter as option=value; repeatable."),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            help="A layer to adapt, or the ending of several names; repeatable. All of every block.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value of a training file, such as schedule.kind=cosine or data.split=all."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
) -> None:
    """Train an adapter beside a frozen model, and save it alone."""
    from ditkit import registry

    values = dict(pair(item, "--set") for item in set_ or ())
    registry.construct("adapter", method, values)
    if lr is not None and lr <= 0:
        raise UsageError(f"--lr {lr}: a learning rate is above 0")
    writable_folder(out)
    section = data_section(data)
    from ditkit.training.adapt import adapt as train
    from ditkit.training.adapt import run_for
    from ditkit.training.config import AdapterConfig

    adapter = AdapterConfig(kind=registry.get("adapter", method).name, options=values, layers=layers)
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed}
    settings |= {} if lr is None else {"optimizer": {"lr": lr}}
    raw = run_for(model, load(model), adapter, section, settings)
    listed([train(run_config(raw, overrides), out, resume)])
    notices.print(f"use it: ditkit generate ... --model {model} --adapter {out}", highlight=False)
