"""CG-Taylor: forecast the last block's output, at steps where the first block's was forecast well.

"Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor", arXiv 2508.02240.
The first block runs at every step, and its output h_1 is forecast too: e = mean|forecast - h_1| / mean|h_1|
tells how far this step can be trusted. While e is below a threshold the other blocks are skipped and the
output h_L of the last one is forecast; else they run and both series get a new sample. So two tensors are
kept, where TaylorSeer keeps one for every module.

The rules are those of the authors' code for DiT. Their port to FLUX and Wan compares a tensor with
`is False`, which never holds, so that its first-block series is not renewed after the warm-up; that is not
repeated here.

B batch, L tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ditkit.registry import Choice, Paper, Range, Search, register
from ditkit.seams.apply import Host
from ditkit.seams.blocks import StackCache
from ditkit.seams.cost import ModelCost
from ditkit.seams.errors import SeamError
from ditkit.seams.extrapolate import DTYPES, Expansion, FactorDtype, Trajectory
from ditkit.seams.steps import Coordinate, Step

GATE_ERROR = "CG-Taylor gate error"


@register(
    "method",
    "cg-taylor",
    summary="forecast the last block's output wherever the first block's forecast proves right",
    paper=Paper(
        "Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor",
        "2508.02240",
        2025,
    ),
    seam=("blocks",),
    neutral={"threshold": 0.0},
)
@dataclass(frozen=True)
class CGTaylor:
    """Forecast the stack's output while the first block's forecast is good. For inference.

    The authors' settings: DiT-XL/2 0.008 to 0.014, first_order 3, last_order 1, warmup 3; FLUX.1-dev 0.03 or
    0.13, 1, 1, 5 (the defaults); Wan 2.1 0.36, 3, 1, 6.

    Args:
        threshold: skip while the relative error of the first block's forecast is below it; 0 never skips.
        first_order: order of the first block's series, >= 0.
        last_order: order of the last block's series, >= 0; 0 is plain reuse.
        warmup: steps computed at the start of a generation, >= 1. The last step is computed too.
        per_sample: every sample of the batch decides for itself, so that none depends on its neighbours. The
            blocks run while any sample asks for it. False: one decision by the mean over the batch, as the
            authors do, both halves together where guidance doubles the batch.
        passes: guidance by separate forwards: `"first"`: the first forward of a step, which is the
            conditional one, decides for all (authors); `"each"` decides for itself.
        num_steps: length of a generation, for a loop of one's own over a bare transformer; a pipeline's
            scheduler tells it.
        forecast: `"hidden"`: h_L (authors); `"residual"`: h_L - h_1, to which the skipped step's own h_1 is
            added.
        expansion: of the last block's series, see `ditkit.seams.extrapolate.Trajectory`.
        coordinate: what the features are a function of: the step's `"index"` (authors) or its `"sigma"`.
        factor_dtype: of what is kept; `"model"` keeps the model's, as the authors do.

    Raises:
        ValueError: an option out of range.
    """

    threshold: float = 0.03
    first_order: int = 1
    last_order: int = 1
    warmup: int = 5
    per_sample: bool = False
    passes: Literal["first", "each"] = "first"
    num_steps: int | None = None
    forecast: Literal["hidden", "residual"] = "hidden"
    expansion: Expansion = "authors"
    coordinate: Coordinate = "index"
    factor_dtype: FactorDtype = "float32"

    claims: ClassVar[frozenset[str]] = frozenset({"blocks"})
    search: ClassVar[Search] = {
        "threshold": Range(0.01, 0.6, log=True),
        "first_order": Choice((1, 0, 2)),
        "last_order": Choice((1, 0, 2)),
        "expansion": Choice(("newton", "authors"), when={"last_order": (2,)}),
        "warmup": Range(1, 5),
        "forecast": Choice(("hidden", "residual")),
    }

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be a number of at least 0; got {self.threshold!r}")
        for name, least in (("first_order", 0), ("last_order", 0), ("warmup", 1), ("num_steps", 1)):
            value = getattr(self, name)
            if name == "num_steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
        choices = {
            "passes": ("first", "each"),
            "forecast": ("hidden", "residual"),
            "expansion": get_args(Expansion),
            "coordinate": get_args(Coordinate),
            "factor_dtype": tuple(DTYPES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")

    def computed_steps(self, num_steps: int) -> int:
        """How many steps of a generation are computed at least: the warm-up and the last one. How many more
        is known afterwards only: `run.report().computed_at`."""
        return min(num_steps, self.warmup + 1) if self.threshold else num_steps

    def ceiling(self, cost: ModelCost) -> float:
        """At most so many times less work: at a skipped step the first block runs."""
        return cost.skipping(self.computed_steps(cost.steps), blocks=1)

    @property
    def tensors_held(self) -> int:
        """Tensors (B, L, C) kept between steps at most; one set of `last_order + 1` more for each further
        forward of guidance."""
        return (self.first_order + 1) + (self.last_order + 1)

    def attach(self, host: Host) -> None:
        """Own the host's blocks.

        Raises:
            SeamError: the model has a single block.
        """
        if host.blocks.depth < 2:
            raise SeamError(
                f"{type(host.model).__name__} has {host.blocks.depth} block; CG-Taylor runs the first one at "
                "every step and skips the others: there are none"
            )
        cache = _Gate(self, host)
        host.clock.on_reset(cache.reset)
        host.stats.holds(cache.nbytes)
        host.note(cache.notes)
        host.blocks.cache_stack(cache)


@dataclass
class _Track:
    """One guidance branch of one generation; a series for each row, or for the batch as one."""

    visits: int = 0
    entered: Tensor | None = None
    trusted: list[bool] = field(default_factory=list)
    first: list[Trajectory] = field(default_factory=list)
    last: list[Trajectory] = field(default_factory=list)


class _Gate(StackCache):
    """Both series, and the decision of the step."""

    after = 1

    def __init__(self, options: CGTaylor, host: Host) -> None:
        self.options = options
        self._stats = host.stats
        self._tracks: dict[str, _Track] = {}
        self._decision: tuple[Step, list[bool]] | None = None
        self._forwards = self._skipped = self._longest = 0
        self._end_unknown = False

    def reset(self) -> None:
        self._tracks.clear()
        self._decision = None

    def nbytes(self) -> int:
        tracks = self._tracks.values()
        return sum(series.nbytes for track in tracks for series in (*track.first, *track.last))

    def skips(self, step: Step, hidden_states: Tensor | None) -> bool:
        """Decide by the output (B, L, C) of the first block."""
        assert hidden_states is not None
        track = self._tracks.setdefault(step.branch, _Track())
        rows = self._rows(hidden_states)
        decided = self._decision if self.options.passes == "first" else None
        if decided is not None and _of_one_step(decided[0], step) and len(decided[1]) == len(rows):
            trusted = list(decided[1])
        else:
            trusted = self._judge(step, track, rows)
            self._decision = (step, trusted)
        if len(track.last) != len(rows):
            # A pass of guidance that was left out until now has nothing to forecast from.
            trusted = [False] * len(rows)
        track.trusted = trusted
        track.visits += 1
        if self.options.forecast == "residual":
            track.entered = hidden_states
        self._longest = max(self._longest, track.visits)
        self._forwards += 1
        self._skipped += all(trusted)
        return all(trusted)

    def store(self, step: Step, hidden_states: Tensor) -> Tensor | None:
        """Renew the series of the rows that did not trust; the others stay with their forecast, as if
        they had been alone."""
        track, options = self._tracks[step.branch], self.options
        if options.threshold == 0:
            return None
        if len(track.last) != len(track.trusted):
            track.last = [self._series(options.last_order) for _ in track.trusted]
        forecast = self._forecast(step, track, hidden_states) if any(track.trusted) else None
        values = hidden_states if track.entered is None else hidden_states - track.entered
        for row, series, trusted in zip(self._rows(values), track.last, track.trusted, strict=True):
            if not trusted:
                series.add(step.at(options.coordinate), row)
        track.entered = None
        if forecast is None:
            return None
        chosen = torch.tensor(track.trusted, device=hidden_states.device).reshape(-1, 1, 1)
        return torch.where(chosen, forecast, hidden_states)

    def recall(self, step: Step, hidden_states: Tensor) -> Tensor:
        track = self._tracks[step.branch]
        forecast = self._forecast(step, track, hidden_states)
        track.entered = None
        return forecast

    def _forecast(self, step: Step, track: _Track, hidden_states: Tensor) -> Tensor:
        """The forecast (B, L, C); zeros for rows without a series yet."""
        x = step.at(self.options.coordinate)
        rows = [
            series.at(x) if series.factors else torch.zeros_like(row)
            for series, row in zip(track.last, self._rows(hidden_states), strict=True)
        ]
        forecast = rows[0] if len(rows) == 1 else torch.cat(rows)
        return forecast if track.entered is None else forecast + track.entered

    def _judge(self, step: Step, track: _Track, rows: Sequence[Tensor]) -> list[bool]:
        """Which rows may be forecast; renews the first block's series of those that may not."""
        options = self.options
        if options.threshold == 0:
            return [False] * len(rows)
        x = step.at(options.coordinate)
        if len(track.first) != len(rows):
            track.first = [self._series(options.first_order, "authors") for _ in rows]
        trusted = [False] * len(rows)
        if track.visits >= options.warmup and track.first[0].factors:
            errors = [_relative(series.at(x), row) for series, row in zip(track.first, rows, strict=True)]
            # The one wait for the device in a step.
            figures: list[float] = torch.stack(errors).tolist()
            trusted = [figure < options.threshold for figure in figures]
            if not self._is_last(step):
                finite = [figure for figure in figures if math.isfinite(figure)]
                self._stats.record(GATE_ERROR, step.generation, step.index, max(finite, default=math.inf))
        for series, row, fine in zip(track.first, rows, trusted, strict=True):
            if not fine:
                series.add(x, row)
        return [False] * len(rows) if self._is_last(step) else trusted

    def _is_last(self, step: Step) -> bool:
        if step.num_steps is None and self.options.num_steps is not None:
            return step.index >= self.options.num_steps - 1
        self._end_unknown |= step.num_steps is None
        return step.is_last

    def _rows(self, hidden_states: Tensor) -> Sequence[Tensor]:
        """The parts that decide apart: samples (1, L, C), or the batch (B, L, C)."""
        return hidden_states.split(1) if self.options.per_sample else [hidden_states]

    def _series(self, order: int, expansion: Expansion | None = None) -> Trajectory:
        dtype = DTYPES[self.options.factor_dtype]
        return Trajectory(order, expansion or self.options.expansion, dtype)

    def notes(self) -> list[str]:
        """Why it could not help, or not fully."""
        options = self.options
        if not self._forwards:
            return ["CG-Taylor: the transformer was not called."]
        if not options.threshold:
            return ["CG-Taylor: threshold=0 computes every step; nothing can be saved."]
        notes = []
        if self._skipped:
            notes.append(
                f"CG-Taylor: {self._skipped} of {self._forwards} forwards ran the first block only. Steps "
                f"computed in the last generation: {_ranges(self._stats.computed_at)}."
            )
        elif self._longest <= options.warmup + 1:
            notes.append(
                f"CG-Taylor: nothing was forecast in {self._longest} steps: warmup={options.warmup} and the "
                f"last step are computed. Use at least {options.warmup + 2} steps or a shorter warm-up."
            )
        errors = sorted(self._stats.series.get(GATE_ERROR, {}).values())
        if errors:
            middle = errors[len(errors) // 2]
            notes.append(
                f"CG-Taylor: the first block's forecast was off by {errors[0]:.2g} to {errors[-1]:.2g}, "
                f"median {middle:.2g}; threshold={options.threshold:g}."
            )
        if self._end_unknown:
            notes.append(
                "CG-Taylor: the last step could not be told from the others, so it may have been forecast: "
                "without a pipeline's scheduler set num_steps."
            )
        return notes


def _of_one_step(one: Step, other: Step) -> bool:
    return (one.generation, one.index) == (other.generation, other.index) and one.branch != other.branch


def _relative(forecast: Tensor, value: Tensor) -> Tensor:
    """mean|forecast - value| / mean|value|, a scalar in float32."""
    return (forecast - value).abs().mean(dtype=torch.float32) / value.abs().mean(dtype=torch.float32)


def _ranges(indices: Sequence[int]) -> str:
    """Rising numbers as text, e.g. `"0-4, 9, 12"`."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], index]
        else:
            parts.append([index])
    return ", ".join("-".join(map(str, part)) for part in parts)
