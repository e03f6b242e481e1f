"""Where the denoising loop is, found without the user's or the pipeline's help.

B batch, L tokens.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditkit.seams.anatomy import Anatomy
from ditkit.seams.errors import SeamError
from ditkit.seams.watch import unwatch, watch

Coordinate = Literal["index", "sigma"]


@dataclass(frozen=True)
class Step:
    """Where the denoising loop is, for one forward of the transformer.

    Args:
        index: 0 .. num_steps - 1, counts up. A scheduler that evaluates twice for each step (Heun) lists both
            evaluations among its timesteps, and both count.
        num_steps: length of the schedule from its first step on; None for a transformer without a pipeline.
        timestep: as the transformer receives it, the largest when tokens or samples have their own.
        branch: name of the guidance branch when the pipeline tells it (diffusers' cache_context: `"cond"`,
            `"uncond"`), else the ordinal of the call within the step: `"0"`, `"1"`, ...
        generation: rises with each new generation.
        sigma: the scheduler's noise level at this step, None when there is none.
        euler_to: the noise level that the scheduler's step leads to, if it is an Euler step in it, i.e.
            x(euler_to) = x(sigma) + (euler_to - sigma) x the transformer's prediction; else None.
    """

    index: int
    num_steps: int | None
    timestep: float
    branch: str
    generation: int
    sigma: float | None = None
    euler_to: float | None = None

    def at(self, coordinate: Coordinate) -> float:
        """Where the step lies: its index, or its noise level, for which the timestep stands in where the
        scheduler has none."""
        if coordinate == "index":
            return float(self.index)
        return self.timestep if self.sigma is None else self.sigma

    @property
    def is_last(self) -> bool:
        """Is it known to be the last one of its generation?"""
        return self.num_steps is not None and self.index >= self.num_steps - 1


class StepClock:
    """Tells the `Step` of each forward of one transformer.

    A generation starts when the pipeline's scheduler gets its timesteps; without a scheduler when the
    timestep rises (diffusers' transformers), turns back (ours, which run both ways), when the shape of an
    input changes, or when another sample arrives at the same timestep. The next step starts when the
    scheduler has stepped, else when the timestep changes. Further calls within a step are guidance branches.

    One thing can't be told from a bare transformer's inputs: a generation that was given up, followed by one
    of the same shape that starts at a lower timestep. `restart` tells it.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, pipeline: Any = None) -> None:
        self._anatomy = anatomy
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else lambda: None
        self._scheduler: Any = None
        self._callbacks: list[Callable[[], None]] = []
        self._on_schedule: list[Callable[[], None]] = []
        self._on_prediction: list[Callable[[Step, float | None, Tensor], None]] = []
        self._step: Step | None = None
        self._generation = -1
        self._renew = True
        self._scheduled = False
        self._index = 0
        self._first = 0
        self._steps_taken = 0
        self._steps_seen = 0
        self._timestep = 0.0
        self._direction = 0
        self._times: list[float] = []
        self._sigmas: list[float] = []
        self._euler = False
        self._calls: Counter[str] = Counter()
        self._shapes: dict[str, tuple[Any, ...]] = {}
        self._sample: Tensor | None = None

    @property
    def step(self) -> Step:
        """The step of the forward that is running.

        Raises:
            SeamError: no forward has run yet.
        """
        if self._step is None:
            raise SeamError("the step is known inside a forward of the transformer only")
        return self._step

    @property
    def generation(self) -> int:
        """The current generation, -1 before the first."""
        return self._generation

    def on_reset(self, callback: Callable[[], None]) -> None:
        """Call back whenever what was kept of the last generation must be dropped."""
        self._callbacks.append(callback)

    def on_schedule(self, callback: Callable[[], None]) -> None:
        """Call back when the pipeline's scheduler got its timesteps, before the first forward."""
        self._on_schedule.append(callback)

    def on_prediction(self, callback: Callable[[Step, float | None, Tensor], None]) -> None:
        """Call back when the pipeline's scheduler is given the prediction of a step: with the step, the noise
        level that follows and the prediction, after guidance."""
        self._on_prediction.append(callback)

    def restart(self) -> None:
        """The next forward starts a new generation."""
        self._renew = True
        self._sample = None
        for callback in self._callbacks:
            callback()

    # The scheduler's side.

    def attach(self) -> None:
        """Start to listen to the pipeline's scheduler."""
        pipeline = self._pipeline()
        self._listen_to(getattr(pipeline, "scheduler", None))

    def detach(self) -> None:
        self._listen_to(None)
        self._callbacks.clear()
        self._on_schedule.clear()
        self._on_prediction.clear()
        self._sample = None

    def _listen_to(self, scheduler: Any) -> None:
        if self._scheduler is not None:
            unwatch(self._scheduler, self)
        self._scheduler = scheduler
        if scheduler is not None:
            watch(scheduler, self)

    def timesteps_set(self, scheduler: Any) -> None:
        self.restart()
        self._scheduled, self._steps_taken, self._step = True, 0, None
        for callback in self._on_schedule:
            callback()

    def stepping(self, scheduler: Any, model_output: Any) -> None:
        # Of two transformers that share a scheduler only the one that ran has predicted.
        ran = not self._renew and self._steps_seen == self._steps_taken
        if self._step is None or not ran or not isinstance(model_output, Tensor):
            return
        place = self._first + self._index + 1
        following = self._sigmas[place] if place < len(self._sigmas) else None
        for callback in self._on_prediction:
            callback(self._step, following, model_output)

    def stepped(self, scheduler: Any) -> None:
        self._steps_taken += 1
        place = getattr(scheduler, "step_index", None)
        at_end = place is None or place >= len(self._times)
        if self._step is not None and self._steps_taken == self._step.num_steps and at_end:
            self.restart()
            self._scheduled, self._steps_taken = False, 0

    def _read_schedule(self, timestep: float) -> None:
        """Timesteps, noise levels and the place of the first step in them (img2img starts midway)."""
        scheduler = self._scheduler
        self._times, self._sigmas, self._first, self._euler = [], [], 0, False
        times = getattr(scheduler, "timesteps", None)
        if not self._scheduled or times is None:
            return
        self._times = [float(time) for time in torch.as_tensor(times).flatten().tolist()]
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) >= len(self._times):
            self._sigmas = [float(sigma) for sigma in torch.as_tensor(sigmas).flatten().tolist()]
        self._euler = _is_euler(scheduler)
        begin = getattr(scheduler, "begin_index", None)
        self._first = int(begin) if begin else self._find(timestep)

    def _find(self, timestep: float) -> int:
        """Place of a timestep in the schedule; transformers get it as it is or divided by the number of
        training steps. 0 when it isn't there."""
        train_steps = float(getattr(self._scheduler.config, "num_train_timesteps", 1000))
        # Scaled first: a transformer that divides gets 1.0 at the start, which is also the last timestep.
        for scaled in (timestep * train_steps, timestep):
            near = min(range(len(self._times)), key=lambda i: abs(self._times[i] - scaled), default=0)
            if self._times and abs(self._times[near] - scaled) <= 1e-3 * max(abs(scaled), 1e-3):
                return near
        return 0

    # The transformer's side.

    def begin(self, arguments: Mapping[str, Any], context: str | None = None) -> Step:
        """The step of a forward that starts now.

        Args:
            arguments: of the transformer's forward, by name.
            context: the guidance branch's name when the pipeline tells it.
        """
        pipeline = self._pipeline()
        if pipeline is not None and getattr(pipeline, "scheduler", None) is not self._scheduler:
            # Another scheduler was put in; it may have got its timesteps already.
            self._listen_to(getattr(pipeline, "scheduler", None))
            self.restart()
            self._scheduled = getattr(self._scheduler, "num_inference_steps", None) is not None
            self._steps_taken = self._steps_seen = 0
        timestep = _largest(arguments.get(self._anatomy.timestep))
        sample = arguments.get(self._anatomy.sample)
        shapes = tuple(
            (name, shape_of(value))
            for name, value in arguments.items()
            if isinstance(value, Tensor) or name == self._anatomy.sample
        )
        if self._renew or self._is_new(timestep, sample):
            self._start(timestep)
        elif self._is_next(timestep):
            self._advance(timestep)
        branch = self._branch(context)
        if self._shapes.setdefault(branch, shapes) != shapes:
            self._start(timestep)
            branch = self._branch(context)
            self._shapes[branch] = shapes
        self._calls[context or ""] += 1
        self._timestep, self._steps_seen = timestep, self._steps_taken
        self._sample = None if self._scheduled else sample
        place = self._first + self._index
        self._step = Step(
            index=self._index,
            num_steps=len(self._times) - self._first if self._times else None,
            timestep=timestep,
            branch=branch,
            generation=self._generation,
            sigma=self._sigmas[place] if place < len(self._sigmas) else None,
            euler_to=self._sigmas[place + 1] if self._euler and place + 1 < len(self._sigmas) else None,
        )
        return self._step

    def _branch(self, context: str | None) -> str:
        ordinal = self._calls[context or ""]
        if context is None:
            return str(ordinal)
        return context if ordinal == 0 else f"{context}#{ordinal}"

    def _is_next(self, timestep: float) -> bool:
        return self._steps_taken > self._steps_seen or timestep != self._timestep

    def _is_new(self, timestep: float, sample: Any) -> bool:
        """A new generation that no scheduler announced."""
        if self._steps_taken > self._steps_seen:
            return False
        if timestep == self._timestep:
            return self._sample is not None and isinstance(sample, Tensor) and not _same(sample, self._sample)
        rises = timestep > self._timestep
        if self._anatomy.falling_time:
            return rises
        turned = self._direction != 0 and (1 if rises else -1) != self._direction
        if not turned:
            self._direction = 1 if rises else -1
        return turned

    def _start(self, timestep: float) -> None:
        if not self._renew:
            self.restart()
        self._renew = False
        self._generation += 1
        self._index, self._direction = self._steps_taken, 0
        self._calls.clear()
        self._shapes.clear()
        self._read_schedule(timestep)
        if self._first and self._index:
            # `_find` saw the timestep of a later step: this transformer joins a schedule that is under way.
            self._first = max(0, self._first - self._index)

    def _advance(self, timestep: float) -> None:
        self._index += max(1, self._steps_taken - self._steps_seen)
        self._calls.clear()


def _is_euler(scheduler: Any) -> bool:
    """Is a step of the scheduler x + (next sigma - sigma) x prediction, without noise?"""
    config, name = getattr(scheduler, "config", {}), type(scheduler).__name__
    if name == "FlowMatchEulerDiscreteScheduler":
        return not config.get("stochastic_sampling", False)
    return name == "EulerDiscreteScheduler" and config.get("prediction_type") == "epsilon"


def _largest(timestep: Any) -> float:
    if isinstance(timestep, Tensor):
        return float(timestep.max())
    return float(timestep) if timestep is not None else 0.0


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))


def shape_of(value: Any) -> Hashable:
    """The shape of a tensor, the shapes in a list of tensors (Z-Image's samples), None for anything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(map(shape_of, value)) if isinstance(value, (list, tuple)) else None
