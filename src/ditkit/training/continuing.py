"""Runs that go on from a pipeline: which task trains it, with what settings, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ditkit.data.config import DataConfig
from ditkit.data.pictures import open_pictures
from ditkit.pipelines.denoising import is_flow
from ditkit.training.config import ConfigError, RunConfig

RUN = "run"  # where checkpoints and curves are, inside the folder of what comes of it


def run_on(
    model: str, pipe: Any, data: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings of a run that trains a pipeline on pictures, as a training file has them.

    Args:
        model: a pipeline: bundled, a folder or a repository of the hub.
        pipe: the same, opened.
        data: keys of the data section; the size is the pipeline's own where there is none.
        settings: other keys of the run, `name` among them.

    Raises:
        FileNotFoundError: no such data.
        ConfigError: a kind of pipeline that no task goes on from.
    """
    name = type(pipe).__name__
    if name not in _TASKS:
        raise ConfigError(f"--model {model} is a {name}; what can be trained on is a {' or a '.join(_TASKS)}")
    task, options, size = _TASKS[name](pipe)
    section = DataConfig.model_validate({"size": size, **data})
    if task == "class-to-image" and section.kind == "emoji" and pipe.vae is None:
        options["pixels"], section = size, section.model_copy(update={"size": 64})
    run = {
        "task": task,
        "task_options": {"start_from": str(model), **options},
        "data": section.model_dump(mode="json"),
        "precision": "bf16" if torch.cuda.is_available() else "no",
        **(settings or {}),
    }
    try:
        open_pictures(section, "heldout")
        run.setdefault("heldout_every", max(1, run.get("steps", 1) // 5))
    except (FileNotFoundError, ValueError):
        pass  # so few pictures that none is held out, or cached latents
    return run


def train_into(run: RunConfig, out: Path, last: str, resume: bool) -> Path:
    """Train under `out/run`, or go on there; the folder of what was exported.

    Args:
        run: see `run_on`.
        out: for what comes of it.
        last: the file in `out` that says that something came of it.
        resume: go on after a stop.

    Raises:
        FileExistsError: there is a run already, or what came of it, and `resume` is False.
        ConfigError: a setting that does not fit the pipeline or the data.
        TrainingError: the loss is not finite.
    """
    from ditkit.training.trainer import run_stage

    folder = out / RUN
    if not resume and (folder.exists() or (out / last).exists()):
        raise FileExistsError(
            f"{out} holds {last} or the run of one already: pass --resume or choose another --out"
        )
    if not (folder / "export").is_dir():
        run_stage(run, folder, {})
    return folder / "export"


def _text_pipeline(pipe: Any) -> tuple[str, dict[str, Any], int]:
    size = getattr(pipe.vae.config, "sample_size", None) or pipe.default_sample_size * pipe.vae_scale_factor
    return "text-to-image", {"train_text_encoders": False}, size


def _class_pipeline(pipe: Any) -> tuple[str, dict[str, Any], int]:
    options: dict[str, Any] = {"process": "flow" if is_flow(pipe.scheduler) else "gaussian"}
    if pipe.transformer.y_embedder.dropout <= 0:
        options["class_dropout"] = 0.0
    return "class-to-image", options, pipe.transformer.latent_size[0] * pipe.scale


_TASKS: dict[str, Callable[[Any], tuple[str, dict[str, Any], int]]] = {
    "FluxPipeline": _text_pipeline,
    "ClassConditionalPipeline": _class_pipeline,
}
