"""Predict and correct: the transformer's own output continued by a polynomial, and mended afterwards.

The corrector is that of "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
Models", arXiv 2302.04867 (section 3, UniC), which a multistep solver gets without a further evaluation. Here
it serves a cache that keeps the pipeline's own steps, as TaylorSeer (arXiv 2503.06923) does with features:
- predict: at a skipped step the prediction v(sigma) is the polynomial through its last computed values;
- correct: once a step is computed, the polynomial through the new value as well tells how far the skipped
  steps since the last computed one went wrong, and that is made good in this step's update; so is what the
  new value tells of the skipped steps before that one, which now lie inside the polynomial (ours). It needs a
  scheduler whose update is an Euler step in sigma, x <- x + (sigma' - sigma) v: v + delta / (sigma' - sigma)
  moves x by delta more.
No part of the transformer runs at a skipped step. Of N steps K are computed, the j-th at
N (1 - (1 - j/K)^bend): rarely while there is much noise and v hardly turns, more and more often after it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ditkit.registry import Choice, Paper, Range, Search, register
from ditkit.seams.apply import Host
from ditkit.seams.blocks import OutputCache
from ditkit.seams.cost import ModelCost
from ditkit.seams.extrapolate import Trajectory
from ditkit.seams.steps import Step


@register(
    "method",
    "predict-correct",
    summary="continue the transformer's output by a polynomial and correct the state at computed steps",
    paper=Paper(
        "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
        "2302.04867",
        2023,
    ),
    seam=("blocks",),
    neutral={"interval": 1},
)
@dataclass(frozen=True)
class PredictCorrect:
    """Forecast the prediction between computed steps. For inference.

    Args:
        interval: one of so many steps is computed, >= 1. 1 computes all of them.
        bend: how much denser computed steps lie at the end, >= 1; at 1 they lie evenly.
        order: of the predictor's polynomial, >= 0.
        corrector: order of the corrector's polynomial, >= 1; 0: no correction.
        num_steps: length of a generation, for a loop of one's own over a bare transformer; a pipeline's
            scheduler tells it. Without it they lie evenly.

    Raises:
        ValueError: an option out of range.
    """

    interval: int = 4
    bend: float = 1.5
    order: int = 1
    corrector: int = 3
    num_steps: int | None = None

    claims: ClassVar[frozenset[str]] = frozenset({"blocks"})
    search: ClassVar[Search] = {
        "interval": Range(2, 16),
        "bend": Choice((1.5, 1.75, 2.0, 1.25, 1.0)),
        "order": Choice((1, 2)),
        "corrector": Choice((3, 2, 0)),
    }

    def __post_init__(self) -> None:
        if not (isinstance(self.bend, int | float) and 1 <= self.bend < math.inf):
            raise ValueError(f"bend must be a number of at least 1; got {self.bend!r}")
        least = {"interval": 1, "order": 0, "corrector": 0, "num_steps": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if name == "num_steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name} must be a whole number of at least {smallest}; got {value!r}")

    def full_steps(self, num_steps: int) -> list[int]:
        """Indices (0 = the noisiest step) of the steps that a generation of `num_steps` computes."""
        count = self.computed_steps(num_steps)
        places = (num_steps * (1 - ((count - j) / count) ** self.bend) for j in range(count))
        # The last ones would fall on one step: as many steps are left for each as follow it.
        return [min(math.floor(place + 0.5), num_steps - count + j) for j, place in enumerate(places)]

    def is_full(self, index: int, num_steps: int | None) -> bool:
        """Is this step of a generation computed? With no known end they lie evenly."""
        return index in _schedule(self, num_steps) if num_steps is not None else index % self.interval == 0

    def computed_steps(self, num_steps: int) -> int:
        """How many steps a generation of `num_steps` computes."""
        return -(-num_steps // self.interval)

    def ceiling(self, cost: ModelCost) -> float:
        """At most so many times less work: nothing of the transformer runs at a skipped step."""
        return cost.steps / self.computed_steps(cost.steps)

    def attach(self, host: Host) -> None:
        """Answer in place of the host's model."""
        cache = _Outputs(self)
        host.clock.on_reset(cache.tracks.clear)
        host.stats.holds(cache.nbytes)
        host.note(cache.notes)
        host.blocks.cache_output(cache)


@dataclass
class _Track:
    """One guidance branch of one generation.

    Attributes:
        skipped: sigma and length of the skipped steps since the last computed one.
        gaps: the last run of skipped steps, and how far it has moved the state, corrections included.
    """

    series: Trajectory
    dtype: torch.dtype
    skipped: list[tuple[float, float]] = field(default_factory=list)
    gaps: list[tuple[list[tuple[float, float]], Tensor]] = field(default_factory=list)


class _Outputs(OutputCache):
    """Predictions of the computed steps, as a polynomial."""

    def __init__(self, options: PredictCorrect) -> None:
        self.options = options
        self.tracks: dict[str, _Track] = {}
        self._full = self._forecast = 0
        self._uncorrected = self._end_unknown = False

    def nbytes(self) -> int:
        tracks = self.tracks.values()
        return sum(t.series.nbytes + sum(moved.nbytes for _, moved in t.gaps) for t in tracks)

    def skips(self, step: Step) -> bool:
        steps = step.num_steps if step.num_steps is not None else self.options.num_steps
        self._end_unknown |= steps is None
        skips = step.branch in self.tracks and not self.options.is_full(step.index, steps)
        self._forecast += skips
        self._full += not skips
        return skips

    def store(self, step: Step, output: Tensor) -> Tensor | None:
        options = self.options
        if options.interval == 1:
            return None
        track = self.tracks.get(step.branch)
        if track is None:
            highest = max(options.order, options.corrector)
            track = self.tracks[step.branch] = _Track(
                Trajectory(highest, "newton", torch.float32), output.dtype
            )
        x, to = step.at("sigma"), step.euler_to
        new = bool(track.skipped)
        if new:
            track.gaps.append((track.skipped, _moved(track.series, track.skipped, options.order)))
            track.skipped = []
        # Copied: what a pipeline does to its prediction must not reach the series.
        track.series.add(x, output.float().clone())
        if to is None or to == x or not track.gaps:
            return None
        moves = [(gap, _moved(track.series, gap, options.corrector)) for gap, _ in track.gaps]
        missing = sum(now - then for (_, now), (_, then) in zip(moves, track.gaps, strict=True))
        # Once more at the next computed step; after it, the gap no longer lies within the polynomial.
        track.gaps = moves[-1:] if new and options.corrector > 1 else []
        return (output.float() + missing / (to - x)).to(output.dtype)

    def recall(self, step: Step) -> Tensor:
        options, track = self.options, self.tracks[step.branch]
        x = step.at("sigma")
        forecast = track.series.at(x, options.order)
        if options.corrector:
            self._uncorrected |= step.euler_to is None
            if step.euler_to is not None:
                track.skipped.append((x, step.euler_to - x))
        forecast = forecast.to(track.dtype)
        # A lone value comes as it is kept, and the pipeline may write to what it gets.
        return forecast.clone() if forecast is track.series.factors[0] else forecast

    def notes(self) -> list[str]:
        """Why it could not help, or not fully."""
        options, total, notes = self.options, self._full + self._forecast, []
        if not total:
            return ["Predict and correct: the transformer was not called."]
        if self._forecast:
            notes.append(
                f"Predict and correct: {self._full} of {total} forwards were computed, so the transformer "
                f"can be at most {total / self._full:.2f} times faster."
            )
        elif options.interval == 1:
            notes.append("Predict and correct: interval=1 computes every step; nothing can be saved.")
        else:
            notes.append("Predict and correct: nothing was forecast: use more steps or a larger interval.")
        if self._uncorrected:
            notes.append(
                "Predict and correct: nothing was corrected, since the step is not known to be an Euler step "
                "in sigma; that takes a pipeline with FlowMatchEulerDiscreteScheduler or "
                "EulerDiscreteScheduler."
            )
        if self._end_unknown:
            notes.append(
                "Predict and correct: the end of a generation was not known, so computed steps lie "
                "evenly: without a pipeline's scheduler set num_steps."
            )
        return notes


def _moved(series: Trajectory, skipped: Sequence[tuple[float, float]], order: int) -> Tensor:
    """How far skipped steps move the state by a series."""
    return torch.stack([series.at(x, order).float() * length for x, length in skipped]).sum(0)


@functools.lru_cache(maxsize=64)
def _schedule(options: PredictCorrect, steps: int) -> frozenset[int]:
    return frozenset(options.full_steps(steps))
