"""One trainer for every task: accelerate, mixed precision, EMA, exact resume.

A training file is run stage by stage, each in a folder of its own: here; the loop of one stage is in
`ditkit.training.loop`. A run that is killed continues from the newest checkpoint and, on the same machine,
takes bit for bit the steps it would have taken.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ditkit.files import write_text
from ditkit.training import config as configuration
from ditkit.training import networks, provenance, sharding
from ditkit.training.evaluation import Evaluation
from ditkit.training.loop import Measure, Trainer
from ditkit.training.order import mix
from ditkit.training.state import TrainingError
from ditkit.training.tasks import create, find


def train(path: str | Path, overrides: list[str] | tuple[str, ...] = (), resume: bool = False) -> Path:
    """Run every stage of a training file in order and return the folder of the last stage's export.

    Args:
        path: YAML file, see `ditkit.training.config`; or the output folder of a run, to resume it.
        overrides: `key=value` texts.
        resume: continue in the output folder, stage by stage, from the newest intact checkpoint; stages
            that are already exported are passed over.

    Raises:
        ConfigError: a bad key or value.
        FileExistsError: the output folder holds a run and `resume` is False.
        TrainingError: the loss is not finite.
    """
    file = configuration.load_run(path, overrides, resume)
    for stage in file.stages:
        find(stage.task)
    stages = [file.output / stage.name for stage in file.stages]
    first_process = os.environ.get("RANK", "0") == "0"  # the others may come when it has begun to write
    if first_process and not resume and any(folder.exists() for folder in stages):
        raise FileExistsError(
            f"{file.output} holds a run already: pass --resume to continue it or choose another output"
        )
    if first_process:
        configuration.keep(file)
    earlier: dict[str, Path] = {}
    for stage, folder in zip(file.stages, stages, strict=True):
        if not (folder / "export").is_dir():
            run_stage(stage, folder, dict(earlier))
        earlier[stage.name] = folder
    return stages[-1] / "export"


def run_stage(
    run: configuration.RunConfig, folder: Path, earlier: dict[str, Path], measure: Measure | None = None
) -> None:
    """Train one stage to its end and export it under `folder/export`.

    Args:
        run: the stage.
        folder: its own; a run that was stopped there goes on.
        earlier: the folders of the stages before it, by name.
        measure: called wherever the held-out loss is taken (`heldout_every`), on the main process.
    """
    with sharding.unseen_by_accelerate():
        accelerator = Accelerator(
            mixed_precision=run.precision,
            gradient_accumulation_steps=run.accumulation,
            log_with=run.tracker,
            project_dir=folder,
            cpu=not torch.cuda.is_available(),
        )
    try:
        torch.manual_seed(mix(run.seed, 0))
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.yaml", yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
        accelerator.wait_for_everyone()
        task = create(run, folder, earlier)
        task.train()  # networks that were loaded come in evaluation mode
        evaluation = None
        if run.evaluation and accelerator.is_main_process:
            evaluation = Evaluation(run.evaluation, task)
        if run.gradient_checkpointing:
            networks.checkpoint_gradients(task, f"{run.name}.gradient_checkpointing")
        if run.compile:
            networks.compile_networks(task, run.compile, f"{run.name}.compile")
        trainer = Trainer(run, folder, task, accelerator, measure, evaluation)
        if accelerator.is_main_process:
            provenance.add_start(folder, trainer.step, accelerator.num_processes, str(accelerator.device))
        trainer.fit()
        trainer.export()
        accelerator.wait_for_everyone()
        for tracker in accelerator.trackers:
            tracker.finish()  # `end_training` would take the process group from the stages after this one
    finally:
        AcceleratorState._reset_state()  # the next stage may have another precision


__all__ = ["Measure", "Trainer", "TrainingError", "run_stage", "train"]
