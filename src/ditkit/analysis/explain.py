"""What to expect of methods before they run: ceilings from counted FLOPs, times from a few timed steps.

A generation of a few dense steps tells what a step takes, how much of it lies in the blocks and in attention,
and what the pipeline does beside the steps. Everything else follows by `ditkit.seams.cost`.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ditkit.analysis import contestants as who
from ditkit.analysis.sampling import Sampling, sample
from ditkit.recipes import Recipe
from ditkit.seams.anatomy import Anatomy, bind, describe
from ditkit.seams.cost import ModelCost, together, words
from ditkit.seams.errors import SeamError
from ditkit.seams.stats import attention_of, flop_counter

_STEPS = 5
"""Dense steps that are timed; the first one warms up."""


@dataclass(frozen=True)
class PipelineCost:
    """What a dense generation is made of.

    Args:
        flops: of one forward of the transformer.
        seconds: of one step with its share of the scheduler; `attention` stands in FLOPs' proportion.
        beside: seconds of a generation outside of the steps: text encoder, decoder.
    """

    flops: ModelCost
    seconds: ModelCost
    beside: float

    @property
    def share_of_steps(self) -> float:
        """s: the steps' share of a dense generation's time."""
        steps = self.seconds.steps * self.seconds.whole
        return steps / (steps + self.beside) if steps else 0.0

    def end_to_end(self, speed_up: float) -> float:
        """Time of a generation relative to dense when its steps take so many times less: 1 - s + s/S."""
        return 1 - self.share_of_steps + self.share_of_steps / speed_up


@dataclass(frozen=True)
class Expectation:
    """What to expect of methods that are applied together.

    Args:
        label: as in tables.
        ceiling: at most so many times fewer FLOPs in the transformer; None when the methods give no counts.
        time_ratio: predicted time relative to dense, text encoder and decoder included.
        notes: in words, why it can't help here.
    """

    label: str
    ceiling: float | None
    time_ratio: float | None
    notes: list[str] = field(default_factory=list)


def explain(
    pipe: Any, methods: Sequence[Any], prompts: Sequence[str], sampling: Sampling | None = None
) -> tuple[PipelineCost, list[Expectation]]:
    """Ceilings and predicted times of methods, for this pipeline, size and number of steps.

    Args:
        pipe: a text-to-image pipeline.
        methods: each a method, text, a sequence to apply together, or a recipe, as `bench` takes them.
        prompts: B prompts, drawn in one batch.
        sampling: the settings that the methods will run with.
    """
    sampling = sampling or Sampling()
    cost = measure(pipe, prompts, sampling)
    return cost, [expect(method, cost) for method in methods]


def expect(given: Any, cost: PipelineCost) -> Expectation:
    """What to expect of one entry of a comparison."""
    contestant = who.enter(given)
    if isinstance(given, Recipe):
        parts: Sequence[Any] = given.build()
    elif isinstance(given, str):
        parts = who.parse(given)
    else:
        parts = given if isinstance(given, Sequence) else [given]
    steps = contestant.steps or cost.flops.steps
    fewer = cost.flops.steps / steps
    in_flops = together(parts, replace(cost.flops, steps=steps))
    in_time = together(parts, replace(cost.seconds, steps=steps))
    if not parts:
        in_flops = in_time = 1.0
    little = words(cost.flops)
    sparse = any("attention" in getattr(part, "claims", ()) for part in parts)
    return Expectation(
        contestant.label,
        None if in_flops is None else in_flops * fewer,
        None if in_time is None else cost.end_to_end(in_time * fewer),
        [little] if little is not None and sparse else [],
    )


def measure(pipe: Any, prompts: Sequence[str], sampling: Sampling) -> PipelineCost:
    """Draw a few dense steps, once counted and once timed."""
    few = replace(sampling, steps=min(_STEPS, sampling.steps))
    model = getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    anatomy = describe(model)
    flops = _counted(pipe, model, anatomy, prompts, replace(few, steps=1), sampling.steps)
    stamps: list[float] = []
    blocks: list[float] = []
    with _timed(model, anatomy, blocks):
        drawn = sample(pipe, prompts, few, lambda _: stamps.append(time.perf_counter()), batch=len(prompts))
    passes = max(len(blocks) // few.steps, 1)
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    step = statistics.median(gaps) if gaps else drawn.seconds / few.steps
    inside = statistics.median(blocks) * passes if blocks else 0.0
    in_blocks = max(flops.whole - flops.outside, 1.0)
    seconds = replace(
        flops,
        whole=step,
        attention=inside * flops.attention / in_blocks,
        outside=max(step - inside, 0.0),
        block=inside * flops.block / in_blocks,
    )
    return PipelineCost(flops, seconds, max(drawn.seconds - few.steps * step, 0.0))


def _counted(
    pipe: Any, model: nn.Module, anatomy: Anatomy, prompts: Sequence[str], sampling: Sampling, steps: int
) -> ModelCost:
    """One forward's FLOPs: all, in attention, outside of the blocks, in a block on average."""
    counter = flop_counter()
    inside: list[int] = []
    grids: list[Any] = []

    def see(_: nn.Module, args: Any, kwargs: Any) -> None:
        with contextlib.suppress(SeamError):  # tokens that are no grid
            grids.append(anatomy.layout(model, bind(model, args, kwargs)))

    def read() -> tuple[float, float]:
        return counter.get_total_flops(), attention_of(counter)

    before: list[tuple[float, float]] = []
    spent: list[tuple[float, float]] = []
    handles = [
        model.register_forward_pre_hook(see, with_kwargs=True),
        model.register_forward_pre_hook(lambda *_: before.append(read())),
        model.register_forward_hook(lambda *_: spent.append(read())),
    ]
    with _around_blocks(model, anatomy, counter.get_total_flops, inside.append), counter:
        try:
            sample(pipe, prompts, sampling, batch=len(prompts))
        finally:
            for handle in handles:
                handle.remove()
    passes = max(len(spent), 1)
    whole, attention = (
        sum(after[part] - first[part] for first, after in zip(before, spent, strict=True)) / passes
        for part in (0, 1)
    )
    in_blocks = sum(inside) / passes
    layout = grids[0] if grids else None
    return ModelCost(
        steps,
        whole,
        attention,
        whole - in_blocks,
        in_blocks / max(len(anatomy.blocks(model)), 1),
        None if layout is None else layout.grid,
        0 if layout is None else layout.joint_text_length,
    )


@contextlib.contextmanager
def _around_blocks(model: nn.Module, anatomy: Anatomy, read: Any, add: Any) -> Iterator[None]:
    """`add(read() after - read() before)` for each block."""
    starts: list[Any] = []
    handles = []
    for _, _, block in anatomy.blocks(model):
        handles.append(block.register_forward_pre_hook(lambda *_: starts.append(read())))
        handles.append(block.register_forward_hook(lambda *_: add(read() - starts.pop())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _timed(model: nn.Module, anatomy: Anatomy, blocks: list[float]) -> Iterator[None]:
    """Seconds of all blocks, for each forward of the model."""
    device = next(model.parameters()).device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    one: list[float] = []

    def done(*_: Any) -> None:
        blocks.append(sum(one))
        one.clear()

    handle = model.register_forward_hook(done)
    try:
        with _around_blocks(model, anatomy, now, one.append):
            yield
    finally:
        handle.remove()
