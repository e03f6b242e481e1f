"""Runs that go on from a pipeline: which task trains it, with what settings, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ditkit.data.config import DataConfig
from ditkit.data.latents import read_manifest
from ditkit.data.pictures import open_records
from ditkit.hub import call_defaults
from ditkit.pipelines.denoising import is_flow
from ditkit.training.config import ConfigError, RunConfig

FEWEST = 50
"""Steps between two looks at what is held out; a shorter run looks at its end."""
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
    if name not in _STARTS:
        known = " or a ".join(_STARTS)
        raise ConfigError(f"--model {model} is a {name}; what can be trained on is a {known}")
    task, options, own = _STARTS[name](pipe, dict(data))
    section = DataConfig.model_validate(own)
    if task == "class-to-image" and section.kind == "emoji" and pipe.vae is None:
        options["pixels"], section = section.size, section.model_copy(update={"size": 64})
    run = {
        "task": task,
        "task_options": {"start_from": str(model), **options},
        "data": section.model_dump(mode="json"),
        "precision": "bf16" if torch.cuda.is_available() else "no",
        **(settings or {}),
    }
    if section.kind == "emoji-motion" or _holds_out(section):
        run.setdefault("heldout_every", max(run.get("steps", 1) // 5, FEWEST))
    return run


def _holds_out(data: DataConfig) -> bool:
    """Whether pictures are held out; not of cached latents, and not where there are so few."""
    try:
        return len(open_records(data).of("heldout")) > 0
    except (FileNotFoundError, ValueError):
        return False


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


Start = tuple[str, dict[str, Any], dict[str, Any]]
"""A task, its options, and keys of the data section with the pipeline's own where there were none."""


def _pictures(pipe: Any, data: dict[str, Any]) -> Start:
    size = getattr(pipe.vae.config, "sample_size", None) or pipe.default_sample_size * pipe.vae_scale_factor
    if data.get("kind") == "latents":
        size = read_manifest(Path(data["path"]))["pictures"]["size"]
    return "text-to-image", {"train_text_encoders": False}, {"size": size, **data}


def _clips(pipe: Any, data: dict[str, Any]) -> Start:
    """The bundled clips, in the size and length of a plain call."""
    if data.get("kind") not in ("emoji", "emoji-motion"):
        raise ConfigError(
            f"--data {data.get('path')}: a {type(pipe).__name__} is trained on clips; there are the bundled "
            "ones, --data emoji"
        )
    call = call_defaults(pipe)
    frames, size = call["num_frames"], min(call["height"], call["width"])
    options = {"train_text_encoders": False, "windows": {"lengths": {frames: 1.0}}, "storage": "float32"}
    own = {"size": size, "motion": {"frames": frames}, **data, "kind": "emoji-motion"}
    return "text-to-video", options, own


def _classes(pipe: Any, data: dict[str, Any]) -> Start:
    options: dict[str, Any] = {"process": "flow" if is_flow(pipe.scheduler) else "gaussian"}
    if pipe.transformer.y_embedder.dropout <= 0:
        options["class_dropout"] = 0.0
    return "class-to-image", options, {"size": pipe.transformer.latent_size[0] * pipe.scale, **data}


_STARTS: dict[str, Callable[[Any, dict[str, Any]], Start]] = {
    "FluxPipeline": _pictures,
    "StableDiffusion3Pipeline": _pictures,
    "WanPipeline": _clips,
    "ClassConditionalPipeline": _classes,
}
