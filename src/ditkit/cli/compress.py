"""`ditkit compress`: a trained pipeline, made cheaper by training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ditkit.cli.common import UsageError, guarded, listed, notices, writable_folder


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog="Example: ditkit compress --model runs/dit/export --flops 0.5 --data emoji --out half   then: "
        "ditkit generate flag --model half"
    )(guarded(compress))


def compress(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A pipeline's folder, such as training exports.")
    ],
    data: Annotated[
        str,
        typer.Option("--data", help="A folder of pictures or of cached latents, or emoji (the bundled set)."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the pipeline; its run is in run/ there.")
    ],
    method: Annotated[
        str, typer.Option("--method", help="dydit: chosen heads, channels and tokens.")
    ] = "dydit",
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
    pairs = [_pair(text) for text in overrides or ()]
    if lr is not None and lr <= 0:
        raise UsageError(f"--lr {lr}: a learning rate is above 0")
    writable_folder(out)
    section = _data(data)
    from pydantic import ValidationError

    from ditkit.training import compress as library
    from ditkit.training import config

    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed}
    settings |= {} if lr is None else {"optimizer": {"lr": lr}}
    with notices.status(f"loading {model}"):
        raw = library.run_for(model, method, flops, section, settings)
    for text, key, value in pairs:
        config.assign(raw, key.split("."), value, text)
    try:
        run = config.RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UsageError(config.explain(error)) from None
    listed([library.compress(run, out, resume)])
    _report(out)


def _report(out: Path) -> None:
    """Draw a few pictures and say what they cost."""
    from ditkit.analysis.bench import prompts_for
    from ditkit.cli.generate import load
    from ditkit.training.compress import spent

    pipe = load(str(out))
    names = getattr(pipe, "class_names", None)
    prompts = prompts_for(pipe) if names is None and hasattr(pipe, "tokenizer") else names or ["0", "1"]
    with notices.status("measuring what it spends"):
        told = spent(pipe, prompts[:8])
    notices.print(str(told), highlight=False)
    notices.print(f"use it: ditkit generate ... --model {out}", highlight=False)


def _pair(text: str) -> tuple[str, str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"override {text!r} is not of the form key=value")
    return text, key.strip(), value.strip()


def _data(text: str) -> dict[str, Any]:
    """The keys of the data section."""
    if text == "emoji":
        return {"kind": "emoji"}
    path = Path(text)
    if not path.is_dir():
        raise UsageError(f"--data {text}: no such folder of pictures, and not emoji")
    from ditkit.data.latents import MANIFEST

    return {"kind": "latents" if (path / MANIFEST).is_file() else "folder", "path": str(path)}
