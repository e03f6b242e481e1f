"""Make a trained pipeline cheaper by training: the settings of such a run, the run, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ditkit import hub
from ditkit.analysis.meter import count
from ditkit.analysis.sampling import Sampling, sample
from ditkit.data.config import DataConfig
from ditkit.models.dynamic import choosing
from ditkit.pipelines.class_conditional import ClassConditionalPipeline
from ditkit.training.config import ConfigError, RunConfig

RUN = "run"  # where checkpoints and curves are, inside the folder of the pipeline that comes of it
METHODS = ("dydit",)


def run_for(
    model: str, method: str, flops: float, data: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings of a run that brings a pipeline down to a share of its FLOPs, as a training file has them.

    The authors train with a rate of 1e-4 for 0.5 and 2.5e-5 for 0.7, leave out updates with a gradient longer
    than 200 and 50, and stop training the complete network after 30 of 200 thousand updates for 0.5.

    Args:
        model: a folder of a pipeline that training exported.
        method: one of `METHODS`.
        flops: share of the blocks' multiply-adds to be spent.
        data: keys of the data section.
        settings: other keys of the run.

    Raises:
        FileNotFoundError: no such pipeline.
        ConfigError: another method, or a pipeline that it does not work on; the message names those it does.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; there is {', '.join(METHODS)}")
    pipe = hub.load(model)
    if not isinstance(pipe, ClassConditionalPipeline):
        raise ConfigError(f"{model} is a {type(pipe).__name__}; {method} works on pipelines of a DiT or SiT")
    settings = dict(settings or {})
    steps, strong = settings.get("steps", 1), flops < 0.6
    warmup = max(1, min(1000, steps // 4))
    budget = {"flops": flops, "warmup": warmup, "hold": warmup // 10}
    if strong:
        budget["complete_until"] = 0.15
    return {
        "name": method,
        "precision": "bf16" if torch.cuda.is_available() else "no",
        **settings,
        **_of_classes(pipe, Path(model), data),
        "objective": {method: budget},
        "optimizer": {
            "lr": 1e-4 if strong else 2.5e-5,
            "skip_grad_norm": 200.0 if strong else 50.0,
            **settings.get("optimizer", {}),
        },
    }


def _of_classes(pipe: ClassConditionalPipeline, folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Task and data for a network of classes."""
    flow, size = "FlowMatch" in type(pipe.scheduler).__name__, pipe.transformer.latent_size
    section = {"size": size[0] * pipe.scale, **data}
    options: dict[str, Any] = {
        "arch": "dydit",
        "inherit_from": str(folder),
        "process": "flow" if flow else "gaussian",
    }
    if pipe.transformer.y_embedder.dropout <= 0:
        options["class_dropout"] = 0.0
    if pipe.vae is None:
        options["pixels"], section["size"] = size[0], max(64, size[0])
    elif data.get("kind") != "latents":
        options["autoencoder"] = str(folder / "vae")
    section = DataConfig.model_validate(section).model_dump(mode="json")
    return {"task": "class-to-image", "task_options": options, "data": section}


def compress(run: RunConfig, out: Path, resume: bool = False) -> Path:
    """Train, and leave the pipeline in a folder, with the run under `run/`.

    Args:
        run: see `run_for`.
        out: for the pipeline.
        resume: go on after a stop.

    Raises:
        FileExistsError: there is a run already, and `resume` is False.
        ConfigError: a setting that does not fit the pipeline or the data.
        TrainingError: the loss is not finite.
    """
    from ditkit.training.trainer import run_stage

    folder, last = out / RUN, out / "model_index.json"
    if not resume and (folder.exists() or last.exists()):
        raise FileExistsError(
            f"{out} holds a pipeline or its run already: pass --resume or choose another --out"
        )
    if last.is_file():
        return out
    if not (folder / "export").is_dir():
        run_stage(run, folder, {})
    parts = sorted((folder / "export").iterdir(), key=lambda part: part.name == last.name)
    for part in parts:  # the index last: without it there is no pipeline
        part.rename(out / part.name)
    (folder / "export").rmdir()
    return out


@dataclass(frozen=True)
class Spent:
    """What drawing costs, of the whole: with everything running in the same network.

    Args:
        blocks: share of the multiply-adds that the blocks' choices spend, by formula.
        flops: share of the transformer's FLOPs, counted.
        seconds: share of the time in the transformer's forwards; one round, so only a hint.
    """

    blocks: float
    flops: float
    seconds: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"spends {self.blocks:.3f} of the blocks' multiply-adds, {self.flops:.3f} of the transformer's "
            f"FLOPs (counted), {self.seconds:.2f} of its time (one round)"
        )


def spent(pipe: Any, prompts: Sequence[str], steps: int = 10) -> Spent:
    """What a pipeline with a dynamic transformer spends when it draws, without guidance.

    Args:
        prompts: captions or classes, drawn together.
        steps: of the schedule.
    """
    sampling, shares = Sampling(steps, guidance=1.0), []
    flops, seconds = [], []
    for how in ({}, {"complete": True}):
        with choosing(pipe.transformer, **how) as chosen:

            def note(*_: Any, chosen: Any = chosen) -> None:
                if chosen.made:
                    shares.append(chosen.ratio().mean().item())

            hook = pipe.transformer.register_forward_hook(note)
            try:
                with count(pipe.transformer) as counted:
                    sample(pipe, prompts, sampling)
                flops.append(sum(counted.flops_by_forward))
                start = time.perf_counter()
                sample(pipe, prompts, sampling)
                seconds.append(time.perf_counter() - start)
            finally:
                hook.remove()
    return Spent(sum(shares) / len(shares), flops[0] / flops[1], seconds[0] / seconds[1])
