"""Make a trained pipeline cheaper by training: the settings of such a run, the run, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ditkit.analysis.meter import count
from ditkit.analysis.sampling import Sampling, sample
from ditkit.models.dynamic import choosing
from ditkit.training.config import ConfigError, RunConfig
from ditkit.training.continuing import run_on, train_into

METHODS = ("dydit",)
PIPELINES = ("FluxPipeline", "ClassConditionalPipeline")


def run_for(
    model: str,
    pipe: Any,
    method: str,
    flops: float,
    data: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of a run that brings a pipeline down to a share of its FLOPs, as a training file has them.

    The authors train with a rate of 1e-4 for 0.5 and 2.5e-5 for 0.7, leave out updates with a gradient longer
    than 200 and 50, and stop training the complete network after 30 of 200 thousand updates for 0.5.

    Args:
        model: a pipeline: bundled, a folder or a repository of the hub.
        pipe: the same, opened.
        method: one of `METHODS`.
        flops: share of the blocks' multiply-adds to be spent.
        data: keys of the data section.
        settings: other keys of the run.

    Raises:
        FileNotFoundError: no such data.
        ConfigError: another method, or a kind of pipeline that no task goes on from.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; there is {', '.join(METHODS)}")
    name = type(pipe).__name__
    if name not in PIPELINES:
        raise ConfigError(
            f"--model {model} is a {name}; what {method} compresses is a {' or a '.join(PIPELINES)}"
        )
    settings = dict(settings or {})
    strong, warmup = flops < 0.6, max(1, min(1000, settings.get("steps", 1) // 4))
    budget = {"flops": flops, "warmup": warmup, "hold": warmup // 10}
    if strong:
        budget["complete_until"] = 0.15
    rate = {"lr": 1e-4, "skip_grad_norm": 200.0} if strong else {"lr": 2.5e-5, "skip_grad_norm": 50.0}
    own = {
        "name": method,
        "objective": {method: budget},
        "optimizer": {**rate, **settings.pop("optimizer", {})},
    }
    run = run_on(model, pipe, data, {**own, **settings})
    run["task_options"]["dynamic"] = {}
    return run


def compress(run: RunConfig, out: Path, resume: bool = False) -> Path:
    """Train, and leave the pipeline in a folder, with the run under `run/`.

    Args:
        run: see `run_for`.
        out: for the pipeline.
        resume: go on after a stop.

    Raises:
        FileExistsError, ConfigError, TrainingError: see `train_into`.
    """
    last = "model_index.json"
    if resume and (out / last).is_file():
        return out
    exported = train_into(run, out, last, resume)
    for part in sorted(exported.iterdir(), key=lambda part: part.name == last):
        part.rename(out / part.name)  # the index last: without it there is no pipeline
    exported.rmdir()
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
