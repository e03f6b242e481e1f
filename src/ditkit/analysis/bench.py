"""Dense, our methods and their peers, side by side in one process: time, FLOPs, bytes, error.

Runs are interleaved (one of each contestant, again and again), so that what else the machine does falls on
all of them, and times are medians. Errors are taken against dense sampling from the same noise.
"""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from ditkit import __version__
from ditkit.analysis import contestants as who
from ditkit.analysis import metrics
from ditkit.analysis import peers as others
from ditkit.analysis.contestants import Contestant
from ditkit.analysis.explain import Expectation
from ditkit.analysis.meter import Count, count
from ditkit.analysis.result import BenchResult, Row
from ditkit.analysis.sampling import Sample, Sampling, draws_classes, draws_clips, sample, some_classes
from ditkit.recipes import Recipe

PROMPTS = (
    "red apple",
    "grinning face",
    "rocket",
    "sunflower",
    "soccer ball",
    "cat face",
    "hot beverage",
    "snowman",
)
"""Captions that micro-flux knows; for other models they are as good as any."""
CLIP_PROMPTS = (
    "red apple moving left",
    "police car moving up right",
    "cat face staying still",
    "rocket moving up, camera zooms in",
)
"""Captions that micro-wan knows, for models that draw clips."""

Judge = Callable[[np.ndarray, Sequence[str]], float]
"""`judge(pictures, prompts)`: the share of pictures (B, H, W, 3) that show what their prompt names; nan when
it knows none of the prompts."""
Progress = Callable[[str, int, int], None]
"""`progress(label, done, total)`, called before each generation."""


@dataclass
class _Entrant:
    contestant: Contestant
    row: Row
    sampling: Sampling
    samples: list[Sample] = field(default_factory=list)
    out: bool = False


@contextlib.contextmanager
def _settled_heap() -> Iterator[None]:
    """What is there already is passed over by the collections between runs, which then take no time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_settled_heap()
def bench(
    model: Any,
    methods: Sequence[Any] = (),
    prompts: Sequence[str] | None = None,
    *,
    sampling: Sampling | None = None,
    repeats: int = 3,
    batch: int = 8,
    peers: bool = True,
    plain: bool = True,
    judge: Judge | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    expected: Sequence[Expectation] = (),
) -> BenchResult:
    """Compare ways to sample from one model.

    Args:
        model: a diffusers text-to-image pipeline with a transformer, a class-conditional one of ours, or what
            `ditkit.load` takes.
        methods: each a method, text such as `"taylorseer:interval=4"`, a sequence to apply together, a
            recipe, or a `Contestant` of one's own.
        prompts: one picture or clip each, of a class where classes are drawn; None: see `prompts_for`.
        sampling: steps, guidance, size and seed; the same noise for every contestant.
        repeats: timed rounds, after one round of counting that also warms up.
        batch: at most so many pictures in one call of the pipeline.
        peers: add other libraries' caches at the intervals of the methods.
        plain: add sampling with as many steps as each method computed.
        judge: gives the prompt accuracy; see `ditkit.analysis.evaluate`.
        name: what the report calls the model; None for what was given, or the pipeline's class.
        expected: what `ditkit.analysis.explain.explain` said of the methods, to stand beside the figures.

    Raises:
        UnknownNameError, OptionError, ValueError, TypeError: before any work, each naming the argument.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least 1 is needed")
    if prompts is not None and not prompts:
        raise ValueError("prompts is empty; at least one is needed")
    entered = [who.enter(method) for method in methods]
    pipe = pipeline_of(model)
    prompts = prompts_for(pipe) if prompts is None else list(prompts)
    sampling = sampling or Sampling()
    if peers:
        intervals = [n for method in methods for n in _intervals(method)]
        entered += others.at_intervals(pipe, intervals, sampling)
    if hasattr(pipe.transformer, "choosing"):
        entered = [who.whole(), *entered]
    everyone = [_entrant(contestant, sampling) for contestant in [who.dense(), *entered]]
    _expect(everyone, expected)

    def note(label: str, done: int) -> None:
        if progress is not None:
            progress(label, done, len(everyone) * (repeats + 1))

    note("counting: dense", 0)
    base = _count(pipe, everyone[0], prompts[:batch], ())
    for index, entrant in enumerate(everyone[1:], start=1):
        note(f"counting: {entrant.contestant.label}", index)
        _count(pipe, entrant, prompts[:batch], base)
    if plain:
        there = {entrant.row.steps for entrant in everyone if entrant.row.kind in ("dense", "plain")}
        for steps in sorted(_computed(everyone) - there, reverse=True):
            everyone.append(_entrant(who.plain(steps), sampling))
            note(f"counting: {everyone[-1].contestant.label}", len(everyone) - 1)
            _count(pipe, everyone[-1], prompts[:batch], base)
        if everyone[-1].row.kind == "plain" and _draws_noise(pipe.scheduler):
            everyone[-1].row.notes.append(
                f"{type(pipe.scheduler).__name__} draws noise at every step, so that with fewer of them the "
                "pictures are others, not worse ones by so much"
            )
    for turn in range(repeats):
        for index, entrant in enumerate(everyone):
            note(entrant.contestant.label, (turn + 1) * len(everyone) + index)
            if not entrant.out:
                _draw(pipe, entrant, prompts, batch)
    note("done", len(everyone) * (repeats + 1))
    for entrant in everyone:
        _fill(entrant, everyone[0], judge, prompts)
    return BenchResult(
        rows=[entrant.row for entrant in everyone],
        prompts=prompts,
        settings=_settings(name or _name(model), pipe, sampling, repeats, batch),
        machine=machine(pipe),
        pictures={e.row.label: e.samples[0].pictures for e in everyone if e.samples},
        clips={
            e.row.label: e.samples[0].clips for e in everyone if e.samples and e.samples[0].clips is not None
        },
    )


def prompts_for(pipe: Any) -> list[str]:
    """What is drawn when nobody says what: captions, or some of a pipeline's classes."""
    if draws_classes(pipe):
        return some_classes(pipe, len(PROMPTS))
    return list(CLIP_PROMPTS if draws_clips(pipe) else PROMPTS)


def _expect(everyone: Sequence[_Entrant], expected: Sequence[Expectation]) -> None:
    said = {expectation.label: expectation for expectation in expected}
    for row in (entrant.row for entrant in everyone):
        if row.label in said:
            row.ceiling, row.predicted = said[row.label].ceiling, said[row.label].time_ratio


def pipeline_of(model: Any) -> Any:
    if isinstance(model, (str, Path)):
        from ditkit.hub import load

        model = load(model)
    if not isinstance(getattr(model, "transformer", None), torch.nn.Module):
        raise TypeError(f"bench needs a pipeline with a transformer, not a {type(model).__name__}")
    model.set_progress_bar_config(disable=True)
    return model


def _intervals(method: Any) -> list[int]:
    """At which intervals a method computes a step, when it is a cache with an interval."""
    if isinstance(method, str):
        method = who.parse(method)
    elif isinstance(method, Recipe):
        method = method.build()
    together = method if isinstance(method, Sequence) else [method]
    return [n for n in (getattr(part, "interval", None) for part in together) if isinstance(n, int) and n > 1]


def _entrant(contestant: Contestant, sampling: Sampling) -> _Entrant:
    if contestant.steps is not None:
        sampling = Sampling(contestant.steps, sampling.guidance, sampling.size, sampling.seed)
    return _Entrant(contestant, Row(contestant.label, contestant.kind, sampling.steps), sampling)


def _count(pipe: Any, entrant: _Entrant, prompts: Sequence[str], base: Sequence[int]) -> list[int]:
    """One generation under the counters; gives the bytes alive after each step.

    A peer that fails here is left out of the timed rounds and its row says why: that is a finding too.

    Args:
        base: bytes alive after each step of dense sampling; what a method holds beyond them is its cache.
    """
    row = entrant.row
    alive: list[int] = []
    try:
        with entrant.contestant.attach(pipe, True) as run, count(pipe.transformer) as spent:
            gc.collect()  # what earlier runs left is not counted, what it held does not vanish meanwhile
            sample(
                pipe,
                prompts,
                entrant.sampling,
                lambda _: alive.append(spent.bytes_live),
                batch=len(prompts),
            )
            report = run.report() if run is not None else None
    except Exception as failure:
        if entrant.contestant.kind != "peer":
            raise
        entrant.out = True
        row.notes.append(f"did not run: {type(failure).__name__}: {' '.join(str(failure).split())[:200]}")
        return []
    row.flops = spent.flops / len(prompts)
    row.bytes_peak = spent.bytes_peak
    if not hasattr(pipe.transformer, "choosing"):  # whose full steps are not all as dear as the dearest
        row.steps_computed = _steps_computed(spent, entrant.sampling.steps)
    if alive and row.kind != "plain":
        beside = base if len(base) == len(alive) else [max(base or alive)] * len(alive)
        row.bytes_cached = max(mine - theirs for mine, theirs in zip(alive, beside, strict=True))
    if report is not None:
        row.steps_computed = report.steps_computed
        row.notes += report.notes
        if report.flops is not None:  # it knows of kernels that the operators' counter does not see
            row.flops = report.flops / len(prompts)
    return alive


def _steps_computed(spent: Count, steps: int) -> int | None:
    """How many steps ran the whole model: those whose forward took what the dearest one took."""
    flops = spent.flops_by_forward
    if not flops or len(flops) % steps:
        return None
    dear = sum(value > 0.99 * max(flops) for value in flops)
    return round(dear * steps / len(flops))


def _draws_noise(scheduler: Any) -> bool:
    """Whether a scheduler adds noise of its own; diffusers' have only their names in common."""
    return any(part in type(scheduler).__name__ for part in ("DDPM", "Ancestral"))


def _computed(everyone: Sequence[_Entrant]) -> set[int]:
    rows = [entrant.row for entrant in everyone if entrant.row.kind == "method"]
    return {row.steps_computed for row in rows if row.steps_computed}


def _draw(pipe: Any, entrant: _Entrant, prompts: Sequence[str], batch: int) -> None:
    gc.collect()
    with entrant.contestant.attach(pipe, False):
        drawn = sample(pipe, prompts, entrant.sampling, batch=batch)
    if entrant.samples:  # pictures and latents of the first round are enough
        drawn = Sample(None, entrant.samples[0].pictures, drawn.seconds)
    entrant.samples.append(drawn)


def _fill(entrant: _Entrant, dense: _Entrant, judge: Judge | None, prompts: Sequence[str]) -> None:
    row = entrant.row
    if not entrant.samples:
        return
    row.seconds_all = [drawn.seconds for drawn in entrant.samples]
    row.seconds = statistics.median(row.seconds_all)
    rounds = zip(row.seconds_all, [drawn.seconds for drawn in dense.samples], strict=True)
    row.time_ratio = statistics.median(mine / theirs for mine, theirs in rounds)
    if row.flops is not None and dense.row.flops:
        row.flops_ratio = row.flops / dense.row.flops
    mine, reference = entrant.samples[0], dense.samples[0]
    if mine.latents is not None and reference.latents is not None:
        row.latent_error = metrics.relative_l2(mine.latents, reference.latents)
        row.latent_errors = metrics.relative_l2_each(mine.latents, reference.latents)
        row.latent_psnr = metrics.psnr(mine.latents, reference.latents)
    row.picture_error = metrics.relative_l2(mine.pictures, reference.pictures)
    row.picture_psnr = metrics.psnr(mine.pictures, reference.pictures, data_range=1.0)
    if judge is not None:
        share = judge(mine.pictures, prompts)
        row.accuracy = None if math.isnan(share) else share


def _name(model: Any) -> str:
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__


def _settings(name: str, pipe: Any, sampling: Sampling, repeats: int, batch: int) -> dict[str, Any]:
    return {
        "model": name,
        "pipeline": type(pipe).__name__,
        "transformer": type(pipe.transformer).__name__,
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "scheduler": type(pipe.scheduler).__name__,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "size": sampling.size,
        "seed": sampling.seed,
        "repeats": repeats,
        "batch": batch,
    }


def machine(pipe: Any = None) -> dict[str, Any]:
    """What the figures depend on beside the settings: device, threads, versions."""
    device = getattr(pipe, "device", torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type}, {name}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "ditkit": __version__,
    }
