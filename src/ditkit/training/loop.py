"""The loop of one stage: batches, gradients, updates, and what is logged, drawn and saved in between."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from tqdm.auto import tqdm

from ditkit.files import whole_file
from ditkit.training import networks, optimizers, records, sharding
from ditkit.training import state as states
from ditkit.training.average import WeightAverage, in_place
from ditkit.training.config import RunConfig
from ditkit.training.evaluation import Evaluation
from ditkit.training.order import BatchNoise, SampleOrder, mix, split_rows
from ditkit.training.schedule import learning_rate_factor
from ditkit.training.short_attention import short_attention
from ditkit.training.state import RunState, TrainingError
from ditkit.training.tasks import Task, create

console = Console(stderr=True)

MOST_SKIPPED = 100
"""Steps in a row that a run passes over before it stops."""

Measure = Callable[[Task, int], dict[str, float]]
"""`(task, step) -> figures`, to be logged beside the held-out loss; the averaged weights are in place."""


class Trainer:
    """The loop of one stage.

    Args:
        run: the stage.
        folder: its own; a run that was stopped there goes on.
        task: what is trained.
        accelerator: of this process.
        measure: called wherever the held-out loss is taken, on the main process.
        evaluation: that the file asks for, on the main process.

    Raises:
        TrainingError: nothing to train, or a checkpoint of a run with other settings.
        DamagedError: there are checkpoints and none is intact.
    """

    def __init__(
        self,
        run: RunConfig,
        folder: Path,
        task: Task,
        accelerator: Accelerator,
        measure: Measure | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.run, self.folder, self.task, self.accelerator = run, folder, task, accelerator
        self.measure, self.evaluation = measure, evaluation
        self.checkpoints = folder / "checkpoints"
        self.sharded = sharding.asked_for() and accelerator.num_processes > 1
        device = accelerator.device
        if self.sharded:
            self.model = sharding.shard(task.to(device), device, accelerator.num_processes)
        else:
            self.model = accelerator.prepare(task)
        self._twin: Task | None = None
        trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
        if not trained:
            raise TrainingError(f"task {run.task!r} has no trainable parameter")
        self.parameters = list(trained.values())
        own = task.own_rates()
        self.optimizers = [accelerator.prepare(o) for o in optimizers.create(run.optimizer, task, own)]
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        # What has its own rate is no part of the network: its gradient must not shrink the network's.
        apart = {id(parameter) for rate in own for parameter in rate.parameters}
        self.clipped = [parameter for parameter in self.parameters if id(parameter) not in apart]
        average = None
        if run.ema:
            decay, warmup = run.ema.decay, run.ema.warmup
            average = WeightAverage(self.parameters, decay=decay, use_ema_warmup=warmup, power=0.75)
            average.to(device)
            task.averaged = self._refuse_average if self.sharded else self._average
        order = SampleOrder(task.sample_count, mix(run.seed, 7), task.sample_periods())
        self.state = RunState(trained, self.optimizers, average, order)
        found = states.restore(self.state, run, self.checkpoints, device)
        if accelerator.is_main_process:
            records.forget_after(folder, self.step)
            if found:
                console.print(f"[bold]{run.name}[/] continues after step {self.step}")

    @property
    def step(self) -> int:
        """Updates made."""
        return self.state.step

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
        indices = self.state.order.take(run.batch_size)
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
        state = self.state
        if state.average and not state.skipped:
            state.average.step(self.parameters)
        state.step += 1
        if not state.skipped and not math.isfinite(float(totals["loss"])):
            raise TrainingError(
                f"{run.name}: the loss at step {self.step} is {float(totals['loss'])}. "
                f"{states.kept(self.checkpoints)} Lower optimizer.lr, clip gradients "
                "(optimizer.clip_grad_norm) or skip such steps (optimizer.skip_grad_norm)."
            )
        if state.skipped > MOST_SKIPPED:
            raise TrainingError(
                f"{run.name}: {state.skipped} steps in a row had a gradient longer than "
                f"optimizer.skip_grad_norm={run.optimizer.skip_grad_norm}. {states.kept(self.checkpoints)} "
                "Lower optimizer.lr or raise skip_grad_norm."
            )
        if run.optimizer.skip_grad_norm:
            totals["skipped"] = torch.tensor(float(state.skipped > 0), device=accelerator.device)
        return totals

    def _fit_gradient(self) -> bool:
        """Clip the gradient; whether its step is to be taken."""
        longest, skip = self.run.optimizer.clip_grad_norm, self.run.optimizer.skip_grad_norm
        if not longest and not skip:
            return True
        norm: Any = self.accelerator.clip_grad_norm_(self.clipped, longest or math.inf)
        taken = skip is None or float(sharding.whole(norm)) <= skip  # NaN is not
        self.state.skipped = 0 if taken else self.state.skipped + 1
        return taken

    def _set_learning_rate(self) -> None:
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
        with self._writing(f"what step {self.step} gave"):
            records.add(self.folder, self.step, record)

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
        file = self.folder / "samples" / f"step-{self.step:08d}.png"
        if picture is not None:
            with self._writing(file.name), whole_file(file) as part:
                picture.save(part)

    def save(self) -> None:
        """Write a checkpoint (all processes have to come)."""
        states.save(self.state, self.run, self.checkpoints, self.accelerator)

    def export(self) -> None:
        """Save the averaged weights in their public format, atomically."""
        with self._averaged() as task:
            if task is None:
                return
            part = self.folder / ".export.part"
            try:
                with self._writing("the export"):
                    shutil.rmtree(part, ignore_errors=True)
                    task.export(part)
                    part.rename(self.folder / "export")
            finally:
                shutil.rmtree(part, ignore_errors=True)  # a full disk has better uses for it

    def _writing(self, what: str) -> contextlib.AbstractContextManager[None]:
        return states.writing(f"{self.run.name}: {what}", self.checkpoints)

    # ---- the average ---------------------------------------------------------------------------------------

    def _average(self) -> dict[str, torch.Tensor]:
        """The averaged parameters by name, the trained ones where the run keeps no average; not copied."""
        average = self.state.average
        return dict(
            zip(self.state.parameters, average.shadow_params if average else self.parameters, strict=True)
        )

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
        elif not self.accelerator.is_main_process:
            yield None
        else:
            here = in_place(self.task, self.state.average, self.parameters)
            with here, torch.no_grad(), networks.as_written(self.run.compile):
                yield self.task

    def _whole_average(self) -> Task | None:
        """On the main process, a task of its own with the averaged parameters, whole."""
        tensors = sharding.gather(self._average(), self.accelerator.is_main_process)
        if not self.accelerator.is_main_process:
            return None
        if self._twin is None:
            with torch.random.fork_rng():
                self._twin = create(self.run, self.folder, self.task.earlier)
            self._twin.to(self.accelerator.device).eval()
        parameters = dict(self._twin.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].data.copy_(tensor)
        return self._twin
