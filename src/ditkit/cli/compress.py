"""`ditkit compress`: a trained pipeline, made cheaper by training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ditkit.cli.common import UsageError, data_section, guarded, listed, notices, run_config, writable_folder
from ditkit.cli.generate import Model, load


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog="Example: ditkit compress --model micro-flux --flops 0.6 --data emoji --out less   then: "
        "ditkit generate 'red apple' --model less"
    )(guarded(compress))


def compress(
    data: Annotated[
        str,
        typer.Option("--data", help="A folder of pictures or of cached latents, or emoji (the bundled set)."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the pipeline; its run is in run/ there.")
    ],
    model: Model = "micro-flux",
    method: Annotated[str, typer.Option("--method", help="dydit: chosen heads, channels, tokens.")] = "dydit",
    flops: Annotated[
        float, typer.Option("--flops", min=0.01, max=1.0, help="Share of the blocks' FLOPs to be spent.")
    ] = 0.5,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps.")] = 2000,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures in a step.")] = 32,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate; as the method's authors if not given.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the batches and the noise.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value of a training file, such as objective.dydit.warmup=500 or ema=null."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
) -> None:
    """Train a pipeline's network to spend a share of its FLOPs, and save the pipeline."""
    if lr is not None and lr <= 0:
        raise UsageError(f"--lr {lr}: a learning rate is above 0")
    writable_folder(out)
    section = data_section(data)
    from ditkit.training import compress as library

    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed}
    settings |= {} if lr is None else {"optimizer": {"lr": lr}}
    raw = library.run_for(model, load(model), method, flops, section, settings)
    listed([library.compress(run_config(raw, overrides), out, resume)])
    _report(out)


def _report(out: Path) -> None:
    """Draw a few pictures and say what they cost."""
    from ditkit.analysis.bench import prompts_for
    from ditkit.training.compress import spent

    pipe = load(str(out))
    names = getattr(pipe, "class_names", None)
    prompts = prompts_for(pipe) if names is None and hasattr(pipe, "tokenizer") else names or ["0", "1"]
    with notices.status("measuring what it spends"):
        told = spent(pipe, prompts[:8])
    notices.print(str(told), highlight=False)
    notices.print(f"use it: ditkit generate ... --model {out}", highlight=False)
