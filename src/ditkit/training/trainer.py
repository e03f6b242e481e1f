"""One trainer for every task: accelerate, mixed precision, EMA, exact resume.

The state of a run is the trained parameters, their average, the optimizer, the schedule, the random state
and the position in the data; a checkpoint holds all of it. A run that is killed continues from the newest
checkpoint and, on the same machine, takes bit for bit the steps it would have taken.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from tqdm.auto import tqdm

from ditkit.files import whole_file, write_text
from ditkit.training import checkpoint as ckpt
from ditkit.training import config as configuration
from ditkit.training import networks, optimizers, provenance, sharding
from ditkit.training.average import WeightAverage
from ditkit.training.evaluation import Evaluation
from ditkit.training.order import BatchNoise, SampleOrder, mix, split_rows
from ditkit.training.short_attention import short_attention
from ditkit.training.tasks import Task, find

console = Console(stderr=True)

MOST_SKIPPED = 100
"""Steps in a row that a run passes over before it stops."""

Measure = Callable[[Task, int], dict[str, float]]
"""`(task, step) -> figures`, to be logged beside the held-out loss; the averaged weights are in place."""


class TrainingError(RuntimeError):
    """Training can't go on; what was saved is kept."""


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
        task = _task(run, folder, earlier)
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


def _task(run: configuration.RunConfig, folder: Path, earlier: dict[str, Path]) -> Task:
    """What a stage trains."""
    task = find(run.task)(run, folder, earlier)
    if run.adapter is None:
        return task
    from ditkit.training.adapt import Adapted  # needs peft, which no other run does

    return Adapted(task, run.adapter)


class Trainer:
    """The loop of one stage."""

    def __init__(
        self,
        run: configuration.RunConfig,
        folder: Path,
        task: Task,
        accelerator: Accelerator,
        measure: Measure | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.run, self.folder, self.task, self.accelerator = run, folder, task, accelerator
        self.measure, self.evaluation = measure, evaluation
        self.order = SampleOrder(task.sample_count, mix(run.seed, 7), task.sample_periods())
        self.sharded = sharding.asked_for() and accelerator.num_processes > 1
        if self.sharded:
            device = accelerator.device
            self.model = sharding.shard(task.to(device), device, accelerator.num_processes)
        else:
            self.model = accelerator.prepare(task)
        self._twin: Task | None = None
        self.names, self.parameters = _trainable(task)
        own = task.own_rates()
        self.optimizers = [accelerator.prepare(o) for o in optimizers.create(run.optimizer, task, own)]
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        # What has its own rate is no part of the network: its gradient must not shrink the network's.
        apart = {id(parameter) for rate in own for parameter in rate.parameters}
        self.clipped = [parameter for parameter in self.parameters if id(parameter) not in apart]
        self.ema = (
            WeightAverage(self.parameters, decay=run.ema.decay, use_ema_warmup=run.ema.warmup, power=0.75)
            if run.ema
            else None
        )
        self.step = 0
        self.skipped = 0  # steps in a row whose gradient was too long
        if self.ema:
            self.ema.to(accelerator.device)
            task.averaged = self._refuse_average if self.sharded else self._average
        self._restore()

    def fit(self) -> None:
        run, accelerator = self.run, self.accelerator
        if accelerator.is_main_process and run.tracker:
            accelerator.init_trackers(
                "tracker", config={"name": run.name, "seed": run.seed, "steps": run.steps}
            )
        bar = tqdm(
            total=run.steps, initial=self.step, desc=run.name, unit="step",
            disable=not accelerator.is_main_process, mininterval=2.0,
        )  # fmt: skip
        seconds, window = 0.0, 0  # of the training steps alone, without what is saved and drawn in between
        while self.step < run.steps:
            started = time.perf_counter()
            losses = self._train_step()
            seconds += time.perf_counter() - started
            window += 1
            bar.update()
            if self.step % run.log_every == 0 or self.step == run.steps:
                self._log(losses, seconds / window, bar)
                seconds, window = 0.0, 0
            at_end = self.step == run.steps
            if run.sample_every and (self.step % run.sample_every == 0 or at_end):
                self._draw()
            if run.heldout_every and (self.step % run.heldout_every == 0 or at_end):
                self._evaluate()
            if run.evaluation and (self.step % run.evaluation.every == 0 or at_end):
                self._judge()
            if self.step % run.checkpoint_every == 0 or at_end:
                self.save()
        bar.close()

    def _train_step(self) -> dict[str, torch.Tensor]:
        run, accelerator = self.run, self.accelerator
        indices = self.order.take(run.batch_size)
        world = accelerator.num_processes
        pieces = list(split_rows(run.batch_size, world * run.accumulation))
        mine = pieces[accelerator.process_index :: world]
        totals: dict[str, torch.Tensor] = {}
        self._set_learning_rate()
        for rows in mine:
            with accelerator.accumulate(self.model):
                if self.sharded:
                    self.model.set_requires_gradient_sync(accelerator.sync_gradients)
                noise = BatchNoise(run.seed, self.step, run.batch_size, rows, accelerator.device)
                with short_attention(accelerator.device):
                    with accelerator.autocast():
                        losses = self.model(indices[rows].to(accelerator.device), noise)
                    accelerator.backward(losses["loss"])
                taken = not accelerator.sync_gradients or self._fit_gradient()
                for optimizer in self.optimizers:
                    if taken:
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / run.accumulation
        if self.ema and not self.skipped:
            self.ema.step(self.parameters)
        self.step += 1
        if not self.skipped and not math.isfinite(float(totals["loss"])):
            raise TrainingError(
                f"{run.name}: the loss at step {self.step} is {float(totals['loss'])}. {self._kept()} "
                "Lower optimizer.lr, clip gradients (optimizer.clip_grad_norm) or skip such steps "
                "(optimizer.skip_grad_norm)."
            )
        if self.skipped > MOST_SKIPPED:
            raise TrainingError(
                f"{run.name}: {self.skipped} steps in a row had a gradient longer than "
                f"optimizer.skip_grad_norm={run.optimizer.skip_grad_norm}. {self._kept()} "
                "Lower optimizer.lr or raise skip_grad_norm."
            )
        if run.optimizer.skip_grad_norm:
            totals["skipped"] = torch.tensor(float(self.skipped > 0), device=accelerator.device)
        return totals

    def _fit_gradient(self) -> bool:
        """Clip the gradient; whether its step is to be taken."""
        longest, skip = self.run.optimizer.clip_grad_norm, self.run.optimizer.skip_grad_norm
        if not longest and not skip:
            return True
        norm: Any = self.accelerator.clip_grad_norm_(self.clipped, longest or math.inf)
        taken = skip is None or float(sharding.whole(norm)) <= skip  # NaN is not
        self.skipped = 0 if taken else self.skipped + 1
        return taken

    def _set_learning_rate(self) -> None:
        """The schedule is a function of the step, so it has no state to save."""
        factor = learning_rate_factor(self.run, self.step)
        self.learning_rate = self.run.optimizer.lr * factor
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def _log(self, losses: dict[str, torch.Tensor], seconds: float, bar: Any) -> None:
        means = {
            name: float(torch.as_tensor(self.accelerator.gather(value.reshape(1))).mean())
            for name, value in losses.items()
        }
        record = {**means, "lr": self.learning_rate, "seconds_per_step": seconds}
        bar.set_postfix(loss=f"{means['loss']:.4f}", lr=f"{record['lr']:.1e}")
        self._record(record)

    def _record(self, record: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        if self.run.tracker:
            self.accelerator.log(record, step=self.step)
        with (self.folder / "metrics.jsonl").open("a") as out:
            out.write(json.dumps({"step": self.step, **record}) + "\n")

    def _evaluate(self) -> None:
        with self._averaged() as task:
            if task is None:
                return
            figures = {f"heldout_{name}": value for name, value in task.heldout_loss().items()}
            if self.measure:
                figures |= self.measure(task, self.step)
        if figures:
            self._record(figures)

    def _judge(self) -> None:
        with self._averaged() as task:
            if task is not None and self.evaluation is not None:
                self._record(self.evaluation(task))

    def _draw(self) -> None:
        with self._averaged() as task:
            picture = None if task is None else task.draw()
        if picture is not None:
            with whole_file(self.folder / "samples" / f"step-{self.step:08d}.png") as part:
                picture.save(part)

    def _average(self) -> dict[str, torch.Tensor]:
        """The averaged parameters by name, not copied."""
        assert self.ema is not None
        return dict(zip(self.names, self.ema.shadow_params, strict=True))

    def _refuse_average(self) -> dict[str, torch.Tensor]:
        raise TrainingError(
            f"{self.run.name}: an objective needs the run's averaged parameters, which no process has whole: "
            "launch without --use_fsdp"
        )

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[Task | None]:
        """The task with the average in place of the trained parameters, in evaluation, on the main process;
        None on the others, which have to come too. Nothing records gradients."""
        if self.sharded:
            with torch.no_grad():
                yield self._whole_average()
            return
        if not self.accelerator.is_main_process:
            yield None
            return
        training = self.task.training
        self.task.eval()
        if self.ema:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            with torch.no_grad(), networks.as_written(self.run.compile):
                yield self.task
        finally:
            if self.ema:
                self.ema.restore(self.parameters)
            self.task.train(training)

    # ---- state -------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint (main process; all have to come); see `ditkit.training.checkpoint`."""
        self.accelerator.wait_for_everyone()
        weights = self._whole(dict(zip(self.names, (p.data for p in self.parameters), strict=True)))
        if broken := [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]:
            raise TrainingError(
                f"{self.run.name}: after step {self.step}, {broken[0]} and {len(broken) - 1} more parameters "
                f"are not finite; they are not saved. {self._kept()}"
            )
        tensors = {"model": weights}
        position = list(self.order.position)
        state: dict[str, Any] = {"optimizers": [], "data_position": position, "skipped": self.skipped}
        for index, optimizer in enumerate(self.optimizers):
            packed, facts = ckpt.pack_optimizer(optimizer.state_dict())
            tensors[f"optimizer-{index}"] = self._whole(packed)
            state["optimizers"].append(facts)
        if self.ema:
            average = self.ema.state_dict()
            shadow = average.pop("shadow_params")
            tensors["ema"] = self._whole(dict(zip(self.names, shadow, strict=True)))
            state["ema"] = average
        if self.accelerator.is_main_process:
            tensors["rng"] = {"torch": torch.get_rng_state()}
            folder, checkpoint = self.folder / "checkpoints", ckpt.Checkpoint(self.step, tensors, state)
            try:
                ckpt.write(folder, checkpoint, self.run.keep_checkpoints)
            except OSError as error:
                raise TrainingError(
                    f"{self.run.name}: the checkpoint of step {self.step} could not be written: "
                    f"{error.strerror or error}. {self._kept()}"
                ) from error
        self.accelerator.wait_for_everyone()

    def _kept(self) -> str:
        """What a run that stops leaves behind, and what to do."""
        saved = ckpt.found(self.folder / "checkpoints")
        if not saved:
            return "There was no checkpoint yet."
        return f"{saved[-1]} is kept; --resume goes on from it once the cause is gone."

    def _whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is shared out over the processes put together, on the main process; empty on the others."""
        if not self.sharded:
            return tensors
        kept = {}
        for name, tensor in tensors.items():  # one at a time: no device has to hold them all
            tensor = sharding.whole(tensor)
            if self.accelerator.is_main_process:
                kept[name] = tensor.cpu()
        return kept

    def _whole_average(self) -> Task | None:
        """On the main process, a task of its own with the averaged parameters, whole."""
        named = zip(self.names, self.ema.shadow_params if self.ema else self.parameters, strict=True)
        tensors = self._whole(dict(named))
        if not self.accelerator.is_main_process:
            return None
        if self._twin is None:
            with torch.random.fork_rng():
                self._twin = _task(self.run, self.folder, self.task.earlier)
            self._twin.to(self.accelerator.device).eval()
        parameters = dict(self._twin.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].data.copy_(tensor)
        return self._twin

    def _restore(self) -> None:
        saved = ckpt.newest(self.folder / "checkpoints")
        if saved is None:
            self._forget_records_after(0)
            return
        if set(saved.tensors.get("model", self.names)) != set(self.names):
            raise TrainingError(
                f"{self.run.name}: the checkpoint in {self.folder} is of another model, or of objectives "
                "with other parameters; choose another output"
            )
        wanted = {"model", "rng", *(["ema"] if self.ema else ())}
        wanted |= {f"optimizer-{index}" for index in range(len(self.optimizers))}
        facts = {"optimizers", "data_position", *(["ema"] if self.ema else ())}
        if missing := sorted({*(wanted - set(saved.tensors)), *(facts - set(saved.state))}):
            raise TrainingError(
                f"{self.run.name}: the checkpoint in {self.folder} has no {' and no '.join(missing)}: the "
                "run had other settings; choose another output"
            )
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(sharding.part_like(saved.tensors["model"][name], parameter))
        for index, (optimizer, facts) in enumerate(
            zip(self.optimizers, saved.state["optimizers"], strict=True)
        ):
            state = ckpt.unpack_optimizer(saved.tensors[f"optimizer-{index}"], facts)
            optimizers.share_out(state, optimizer)
            optimizer.load_state_dict(state)
            optimizers.lay_out_alike(optimizer)
        if self.ema:
            shadow = [
                sharding.part_like(saved.tensors["ema"][name].to(self.accelerator.device), parameter)
                for name, parameter in zip(self.names, self.parameters, strict=True)
            ]
            self.ema.load_state_dict({**saved.state["ema"], "shadow_params": shadow})
        torch.set_rng_state(saved.tensors["rng"]["torch"])
        self.order.position = tuple(saved.state["data_position"])
        self.step, self.skipped = saved.step, saved.state.get("skipped", 0)
        self._forget_records_after(saved.step)
        if self.accelerator.is_main_process:
            console.print(f"[bold]{self.run.name}[/] continues after step {self.step}")

    def _forget_records_after(self, step: int) -> None:
        """Drop what was logged after the checkpoint: those steps will be taken again."""
        path = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process and path.exists():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # the line a crash cut short
            write_text(path, "".join(f"{line}\n" for line in kept))

    def export(self) -> None:
        """Save the averaged weights in their public format, atomically."""
        with self._averaged() as task:
            if task is None:
                return
            part = self.folder / ".export.part"
            shutil.rmtree(part, ignore_errors=True)
            task.export(part)
            part.rename(self.folder / "export")


def learning_rate_factor(run: configuration.RunConfig, step: int) -> float:
    """Factor on the learning rate for the update after `step` updates."""
    schedule = run.schedule
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    last = schedule.final_factor
    if schedule.kind == "cosine":
        share = min(1.0, (step - schedule.warmup_steps) / max(1, run.steps - schedule.warmup_steps))
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * share))
    if schedule.decay_steps:
        share = min(1.0, max(0.0, (step - (run.steps - schedule.decay_steps)) / schedule.decay_steps))
        return 1 - (1 - last) * share
    return 1.0


def _trainable(task: Task) -> tuple[list[str], list[torch.nn.Parameter]]:
    pairs = [(name, parameter) for name, parameter in task.named_parameters() if parameter.requires_grad]
    if not pairs:
        raise TrainingError(f"task {task.run.task!r} has no trainable parameter")
    return [name for name, _ in pairs], [parameter for _, parameter in pairs]
