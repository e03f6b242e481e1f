"""TaylorSeer: most denoising steps forecast the transformer's features from those of past steps.

"From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", arXiv 2503.06923. A fixed
schedule marks steps as full. At a full step every module runs and leaves its differences over the past full
steps; at the others it does not run, its output F is forecast (equation 7, order O, distance k) and only
modulation, gates and residuals are computed. O = 0 is plain reuse (FORA).

Beyond the paper: `granularity="last-block"` forecasts one tensor, the whole stack's output. Two weaknesses of
the authors' series can be mended: it lags, so that orders above 1 gain little (`expansion="newton"`), and it
continues the slope of two neighbouring warm-up steps over a whole interval (`reach=1`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ditkit.registry import Choice, Paper, Range, Search, register
from ditkit.seams.apply import Host
from ditkit.seams.blocks import Outputs, StackCache, UnitCache, UnitRef
from ditkit.seams.extrapolate import DTYPES, Expansion, FactorDtype, Trajectory
from ditkit.seams.steps import Coordinate, Step

Granularity = Literal["module", "last-block"]
Schedule = Literal["dit", "flux", "hunyuan", "wan", "diffusers"]

# Full steps at the start of a generation (first_enhance in the authors' code; diffusers' default).
_WARMUP: dict[str, int] = {"dit": 2, "flux": 3, "hunyuan": 1, "wan": 1, "diffusers": 3}


@register(
    "method",
    "taylorseer",
    summary="compute every N-th step, forecast the features of the others by a Taylor series over past steps",
    paper=Paper(
        "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", "2503.06923", 2025
    ),
    seam=("blocks",),
    neutral={"interval": 1},
)
@dataclass(frozen=True)
class TaylorSeer:
    """Forecast features between computed steps. For inference: forecasts carry no gradient.

    Args:
        interval: N >= 1; after the warm-up every N-th step is computed. 1 computes all of them.
        order: O >= 0, the highest difference used. An order needs as many computed steps before it works.
        granularity: `"module"` forecasts the output of every attention and feed-forward module before its
            gate (the paper); `"last-block"` forecasts the output of the last block only, and no block runs.
        schedule: whose full steps: those of the authors' code for DiT, FLUX, HunyuanVideo or Wan, which
            differ in their warm-up, or of diffusers' TaylorSeerCacheConfig.
        warmup: W >= 0, full steps at the start; None: the schedule's own (2, 3, 1, 1, 3).
        last_steps: so many steps at the end are computed too; needs a pipeline, whose scheduler tells where
            the end is.
        factor_dtype: of the differences; `"model"` keeps the model's, as the authors do. In bfloat16
            differences of nearly equal tensors lose their digits.
        expansion: `"authors"` or `"newton"`, see `ditkit.seams.extrapolate.Trajectory`.
        reach: forecast with differences at most so many times the last gap between computed steps ahead,
            beyond that by plain reuse; None: always, as the authors do. After the warm-up, whose steps are
            one apart, their first interval continues that slope for N - 1 steps; `reach=1` does not.
        coordinate: what the features are a function of: the step's `"index"` (authors) or the scheduler's
            noise level `"sigma"` (the timestep where there is none).

    Raises:
        ValueError: an option out of range.
    """

    interval: int = 4
    order: int = 1
    granularity: Granularity = "module"
    schedule: Schedule = "flux"
    warmup: int | None = None
    last_steps: int = 0
    factor_dtype: FactorDtype = "float32"
    expansion: Expansion = "authors"
    reach: float | None = None
    coordinate: Coordinate = "index"

    claims: ClassVar[frozenset[str]] = frozenset({"blocks"})
    search: ClassVar[Search] = {
        "interval": Range(2, 10),
        "granularity": Choice(("last-block", "module")),
        "order": Choice((0, 1, 2)),
        "expansion": Choice(("newton", "authors"), when={"order": (2,)}),
        "reach": Choice((None, 1.0), when={"order": (1, 2)}),
        "warmup": Range(1, 3),
        "last_steps": Choice((0, 1)),
    }

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("order", 0), ("last_steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
        if self.warmup is not None and (not isinstance(self.warmup, int) or self.warmup < 0):
            raise ValueError(f"warmup must be a whole number of at least 0 or None; got {self.warmup!r}")
        if self.reach is not None and not self.reach > 0:
            raise ValueError(f"reach must be a number above 0 or None; got {self.reach!r}")
        choices = {
            "granularity": get_args(Granularity),
            "schedule": get_args(Schedule),
            "factor_dtype": tuple(DTYPES),
            "expansion": get_args(Expansion),
            "coordinate": get_args(Coordinate),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")

    @property
    def warmup_steps(self) -> int:
        """W: full steps at the start of a generation."""
        return _WARMUP[self.schedule] if self.warmup is None else self.warmup

    def is_full(self, visit: int, since_full: int) -> bool:
        """Is the visit-th forward of a generation (0, 1, ...) computed, when the `since_full` forwards right
        before it were forecast? Leaves out `last_steps`."""
        if visit == 0 or visit < self.warmup_steps:
            return True
        if self.schedule == "diffusers":
            return (visit - self.warmup_steps - 1) % self.interval == 0
        return since_full == self.interval - 1

    def full_steps(self, num_steps: int) -> list[int]:
        """Indices (0 = the noisiest step) of the steps that a generation of `num_steps` computes."""
        full: list[int] = []
        for index in range(num_steps):
            since = index - full[-1] - 1 if full else 0
            if self.is_full(index, since) or index >= num_steps - self.last_steps:
                full.append(index)
        return full

    def computed_steps(self, num_steps: int) -> int:
        """How many steps a generation of `num_steps` computes."""
        return len(self.full_steps(num_steps))

    def highest_order(self, visit: int) -> int:
        """Highest difference that may be taken at this forward: none during the authors' warm-up, except at
        its last step; diffusers has no such guard.

        It matters at order 2: features of the first step, pure noise, are far from all others, and a second
        difference that contains them made micro-flux, half trained, worse over 28 steps than order 1 at
        intervals 2 to 6.
        """
        if self.schedule == "diffusers" or visit > self.warmup_steps - 2:
            return self.order
        return 0

    def attach(self, host: Host) -> None:
        """Own the host's blocks."""
        state = _State(self)
        host.clock.on_reset(state.reset)
        host.stats.holds(state.nbytes)
        host.note(state.notes)
        if self.granularity == "module":
            host.blocks.cache_units(_Units(state))
        else:
            host.blocks.cache_stack(_Stack(state))


@dataclass
class _Track:
    """One guidance branch of one generation."""

    visits: int = 0
    since_full: int = 0
    x: float = 0.0
    order: int = 0
    trajectories: dict[int, list[Trajectory]] = field(default_factory=dict)


class _State:
    """Trajectories of one model, apart for each guidance branch, and what the report says on them."""

    def __init__(self, options: TaylorSeer) -> None:
        self.options = options
        self._dtype = DTYPES[options.factor_dtype]
        self._tracks: dict[str, _Track] = {}
        self._full = 0
        self._forecast = 0
        self._longest = 0
        self._order_reached = 0
        self._end_unknown = False

    def reset(self) -> None:
        self._tracks.clear()

    def nbytes(self) -> int:
        return sum(
            trajectory.nbytes
            for track in self._tracks.values()
            for outputs in track.trajectories.values()
            for trajectory in outputs
        )

    def forecasts(self, step: Step) -> bool:
        """Decide on this forward and move its branch on."""
        options = self.options
        track = self._tracks.setdefault(step.branch, _Track())
        full = options.is_full(track.visits, track.since_full) or not track.trajectories
        if options.last_steps and step.num_steps is None:
            self._end_unknown = True
        elif step.num_steps is not None and step.index >= step.num_steps - options.last_steps:
            full = True
        track.order = options.highest_order(track.visits)
        track.visits += 1
        track.since_full = 0 if full else track.since_full + 1
        track.x = step.at(options.coordinate)
        self._longest = max(self._longest, track.visits)
        self._full += full
        self._forecast += not full
        return not full

    def known(self, step: Step) -> dict[int, list[Trajectory]]:
        return self._tracks[step.branch].trajectories

    def store(self, step: Step, index: int, outputs: Sequence[Tensor]) -> None:
        if self.options.interval == 1:
            return
        track = self._tracks[step.branch]
        known = track.trajectories.get(index)
        if known is None or len(known) != len(outputs):
            options = self.options
            known = [
                Trajectory(options.order, options.expansion, self._dtype, options.reach) for _ in outputs
            ]
            track.trajectories[index] = known
        for trajectory, output in zip(known, outputs, strict=True):
            trajectory.add(track.x, output, track.order)
        self._order_reached = max(self._order_reached, len(known[0].factors) - 1)

    def recall(self, step: Step, index: int) -> Outputs:
        track = self._tracks[step.branch]
        return tuple(trajectory.at(track.x) for trajectory in track.trajectories[index])

    def notes(self) -> list[str]:
        """Why it could not help, or not fully."""
        options, notes = self.options, []
        if not self._full:
            return ["TaylorSeer: the transformer was not called."]
        if options.interval == 1:
            notes.append("TaylorSeer: interval=1 computes every step; nothing can be saved.")
        elif not self._forecast:
            first = max(options.warmup_steps, 1) + (2 if options.schedule == "diffusers" else 1)
            notes.append(
                f"TaylorSeer: nothing was forecast in {self._longest} steps. With "
                f"warmup={options.warmup_steps} and last_steps={options.last_steps} the first forecast comes "
                f"at step {first} of at least {first + options.last_steps}: use more steps or a shorter "
                "warm-up."
            )
        else:
            limit = (self._full + self._forecast) / self._full
            notes.append(
                f"TaylorSeer: {self._full} of {self._full + self._forecast} forwards were computed, so the "
                f"transformer can be at most {limit:.2f} times faster."
            )
        if self._forecast and self._order_reached < options.order:
            notes.append(
                f"TaylorSeer: order={options.order} was never reached: too few steps were computed; the "
                f"highest order used was {self._order_reached}."
            )
        if self._end_unknown:
            notes.append(
                f"TaylorSeer: last_steps={options.last_steps} had no effect: without a pipeline's scheduler "
                "the end of a generation is not known."
            )
        return notes


class _Units(UnitCache):
    """Every attention and feed-forward module, before its gate."""

    def __init__(self, state: _State) -> None:
        self._state = state

    def replaced(self, step: Step, units: Sequence[UnitRef]) -> Sequence[bool]:
        forecasts = self._state.forecasts(step)
        known = self._state.known(step)
        return [forecasts and unit.index in known for unit in units]

    def store(self, step: Step, unit: UnitRef, outputs: Outputs) -> None:
        self._state.store(step, unit.index, outputs)

    def recall(self, step: Step, unit: UnitRef) -> Outputs:
        return self._state.recall(step, unit.index)


class _Stack(StackCache):
    """The last block's output, image tokens only."""

    def __init__(self, state: _State) -> None:
        self._state = state

    def skips(self, step: Step, hidden_states: Tensor | None) -> bool:
        return self._state.forecasts(step)

    def store(self, step: Step, hidden_states: Tensor) -> None:
        self._state.store(step, 0, (hidden_states,))

    def recall(self, step: Step, hidden_states: Tensor) -> Tensor:
        return self._state.recall(step, 0)[0]
