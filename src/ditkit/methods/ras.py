"""RAS: each step runs the transformer on the tokens in focus; the others keep their last velocity.

"Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389. After each step a metric of the
guided velocity ranks the tokens (section 3.3, equation 1) and the next step runs on a part of them. These
ask all keys and values, of which the other tokens' are those of their last run (section 3.4); at
`error_reset_steps` all tokens run. Defaults are those of the authors' code, apart from `starvation`.

Where we differ: the term against starvation has the wrong sign in equation 1 and in the code, so that a token
which was skipped is skipped all the more; on a toy model it loses even to a random choice (error 0.030
against 0.014, mended 0.010), so `starvation="corrected"` is the default and `"released"` gives the authors'
numbers. Kept velocities enter at the model's output, for each guidance branch, instead of in one scheduler:
the same for guidance that is linear in them, and any scheduler works. Other than there, pictures need not be
square, patches may have any size, each sample of a batch has its own tokens, resets scale with the number of
steps, and clips work. `inactive="forecast"` is ours.

B samples, N tokens, K tokens that run, C channels, T steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ditkit.registry import Choice, Paper, Range, Search, register
from ditkit.seams.apply import Host
from ditkit.seams.cost import ModelCost
from ditkit.seams.errors import ConflictError, SeamError
from ditkit.seams.extrapolate import ahead
from ditkit.seams.keys import KeptKeys, KeyPolicy
from ditkit.seams.patches import Patches
from ditkit.seams.steps import Step
from ditkit.seams.tokens import TokenChoice

Metric = Literal["std", "l2norm", "random"]
Starvation = Literal["corrected", "released"]
Inactive = Literal["reuse", "forecast"]

# The authors' resets, 12 and 22 of 30 steps, as parts of the steps from `start` = 4 on: with 14 steps
# they are 7 and 11, the paper's own choice there (its ablation of resets).
_RESETS = (8 / 26, 18 / 26)
_RESETS_OF_30 = (12, 22)


@register(
    "method",
    "ras",
    summary="each step runs the tokens whose prediction is least settled, the others keep their velocity",
    paper=Paper("Region-Adaptive Sampling for Diffusion Transformers", "2502.10389", 2025),
    seam=("tokens", "attention"),
    # Re-ttention keeps ratios and residuals for a batch as a whole, whose samples run on tokens of their own
    # here.
    conflicts=("re-ttention",),
    neutral={"sample_ratio": 1.0},
)
@dataclass(frozen=True)
class RAS:
    """Region-adaptive sampling. For inference: what is kept carries no gradient.

    Args:
        sample_ratio: share of the tokens that run at a RAS step, above 0; 1 runs all of them.
        start: first step, >= 1, that may run on some tokens.
        end: the last step that may; it runs on the tokens chosen for the step before, as in the authors'
            code. None: the last of all, which has tokens of its own.
        error_reset_steps: steps at which all tokens run; those that a generation does not have are ignored.
            As text: `"12+20"`. None: at about a third and two thirds of the steps from `start` on, one for 5
            to 9 such steps and none for fewer; 12 and 22 where the number of steps isn't known.
        metric: of the velocity's channels at each pixel, averaged over the token: `"std"` or `"l2norm"`;
            `"random"` ranks the tokens by chance, the paper's ablation.
        high_ratio: 0 to 1, which share of the skipped tokens is taken from the highest ranks; the others from
            the lowest.
        starvation_scale: k, usually >= 0; a token skipped n times is ranked by metric exp(-k n) among the
            highest and by metric exp(+k n) among the lowest, so that it runs sooner
            (`starvation="corrected"`).
        starvation: `"released"`: metric exp(k n) for both, as published: at high_ratio 1 it keeps skipped
            tokens skipped.
        skip_num_step: dynamic counts: the number of skipped tokens rises by so many ...
        skip_num_step_length: ... every so many steps, 0: never, rounded down to a multiple of
            `skip_multiple`. The mean over the steps is about that of `sample_ratio`.
        skip_multiple: 64 in the authors' code.
        empty_slice: the authors' slice for the highest `int(K high_ratio)` ranks, which takes all tokens when
            that number is 0. No token runs then.
        key_value_cache: tokens that run also read the keys and values of the others, as these last were.
            False (the paper's ablation): those of each other only.
        inactive: `"reuse"` the last velocity, keys and values (the paper), or `"forecast"` them: continue the
            lines through a token's last two computed ones over the noise level (ours; twice the memory).
        reach: how many times the distance of these two noise levels a forecast may look ahead; beyond it the
            line ends.
        seed: of the random metric.

    Raises:
        ValueError: an option out of its range.
    """

    sample_ratio: float = 0.5
    start: int = 4
    end: int | None = None
    error_reset_steps: tuple[int, ...] | str | None = None
    metric: Metric = "std"
    high_ratio: float = 1.0
    starvation_scale: float = 0.1
    starvation: Starvation = "corrected"
    skip_num_step: int = 0
    skip_num_step_length: int = 0
    skip_multiple: int = 64
    empty_slice: bool = False
    key_value_cache: bool = True
    inactive: Inactive = "reuse"
    reach: float = 1.0
    seed: int = 0

    claims: ClassVar[frozenset[str]] = frozenset({"tokens"})
    search: ClassVar[Search] = {
        "sample_ratio": Choice((0.5, 0.25, 0.75)),
        "start": Range(1, 6),
        "inactive": Choice(("forecast", "reuse")),
    }

    def __post_init__(self) -> None:
        if not 0 < self.sample_ratio <= 1:
            raise ValueError(f"sample_ratio must be above 0 and at most 1; got {self.sample_ratio}")
        if not 0 <= self.high_ratio <= 1:
            raise ValueError(f"high_ratio must be 0 to 1; got {self.high_ratio}")
        least = {"start": 1, "skip_num_step_length": 0, "skip_multiple": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be a whole number of at least {lowest}; got {value!r}")
        if self.end is not None and self.end < 0:
            raise ValueError(f"end must be a step index or None; got {self.end}")
        if not math.isfinite(self.starvation_scale):
            raise ValueError(f"starvation_scale must be a finite number; got {self.starvation_scale}")
        if not self.reach >= 0:
            raise ValueError(f"reach must be at least 0; got {self.reach}")
        choices = {"metric": Metric, "starvation": Starvation, "inactive": Inactive}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(known))}; got {getattr(self, name)!r}"
                )
        self._given_resets()

    def _given_resets(self) -> tuple[int, ...] | None:
        given = self.error_reset_steps
        if given is None:
            return None
        parts = given.replace("+", " ").split() if isinstance(given, str) else given
        try:
            resets = tuple(int(part) for part in parts)
        except (TypeError, ValueError):
            resets = (-1,)
        if any(step < 0 for step in resets):
            raise ValueError(
                f'error_reset_steps must be step indices, e.g. (12, 20) or "12+20"; got {given!r}'
            )
        return resets

    def resets(self, num_steps: int | None) -> frozenset[int]:
        """Steps at which all tokens run between those that run some."""
        given = self._given_resets()
        if given is not None:
            return frozenset(step for step in given if num_steps is None or step < num_steps)
        if num_steps is None:
            return frozenset(_RESETS_OF_30)
        span = num_steps - self.start
        shares = _RESETS if span >= 10 else (0.5,) if span >= 5 else ()
        return frozenset(self.start + round(share * span) for share in shares)

    def runs_some(self, index: int, num_steps: int | None) -> bool:
        """Does this step run on some tokens?"""
        end = math.inf if self.end is None else self.end
        return self.start <= index <= end and index not in self.resets(num_steps)

    def chooses_for(self, index: int, num_steps: int | None) -> bool:
        """Are tokens chosen for this step? Otherwise one that runs on some takes those of the step before."""
        # Before step 1 the authors' other test of the range has run last: it includes the end.
        end = math.inf if self.end is None else self.end + (index == 1)
        return index < end and self.runs_some(index, num_steps)

    def skip_counts(self, num_steps: int, tokens: int) -> list[int]:
        """How many of N tokens each step is to skip (section 3.5).

        Raises:
            ValueError: a dynamic count leaves 0 .. N.
        """
        average = int((1 - self.sample_ratio) * tokens)
        counts = [average] * num_steps
        length = self.skip_num_step_length
        if length:
            middle = (num_steps + self.start) // length // 2
            for index in range(num_steps):
                count = average + self.skip_num_step * (index // length - middle)
                counts[index] = count // self.skip_multiple * self.skip_multiple
        dense = self.resets(num_steps) | set(range(min(self.start, num_steps)))
        counts = [0 if index in dense else count for index, count in enumerate(counts)]
        for index, count in enumerate(counts):
            if not 0 <= count <= tokens:
                raise ValueError(
                    f"skip_num_step={self.skip_num_step} makes step {index} of {num_steps} skip {count} of "
                    f"{tokens} tokens; use a smaller one"
                )
        return counts

    def skip_count(self, index: int, num_steps: int | None, tokens: int) -> int:
        """The same for one step; only the static count is known without the number of steps."""
        if num_steps is not None:
            return self.skip_counts(num_steps, tokens)[index]
        if self.skip_num_step_length:
            raise SeamError(
                "skip_num_step_length needs the number of steps, which only a pipeline's scheduler tells; "
                "leave it 0 for a transformer without a pipeline"
            )
        return int((1 - self.sample_ratio) * tokens)

    def computed_tokens(self, num_steps: int, height: int, width: int, frames: int = 1) -> list[int]:
        """How many tokens each step of a generation runs on.

        Args:
            num_steps: T.
            height, width, frames: of the token grid.
        """
        tokens = frames * height * width
        skips, counts = self.skip_counts(num_steps, tokens), []
        chosen = tokens
        for index in range(num_steps):
            if self.chooses_for(index, num_steps):
                low, high = self._ends(skips[index])
                chosen = 1 if self.empty_slice and not high else max(tokens - low - high, 1)
            counts.append(chosen if self.runs_some(index, num_steps) else tokens)
        return counts

    def flops(self, num_steps: int, height: int, width: int, text_length: int = 0, frames: int = 1) -> float:
        """The blocks' FLOPs of a generation as a share of those of dense sampling: token-wise layers and
        attention, whose queries alone are fewer, both scale with (K + text) / (N + text).

        Args:
            text_length: of the text in the joint sequence; 0 where it is read by cross-attention.
        """
        counts = self.computed_tokens(num_steps, height, width, frames)
        whole = frames * height * width + text_length
        return sum(count + text_length for count in counts) / (whole * num_steps)

    def ceiling(self, cost: ModelCost) -> float | None:
        """At most so many times less work; None where the tokens are no grid."""
        if cost.grid is None:
            return None
        frames, height, width = cost.grid
        return cost.on_tokens(self.flops(cost.steps, height, width, cost.text_length, frames))

    def _ends(self, skip: int) -> tuple[int, int]:
        """How many of the lowest and of the highest ranks are skipped; each is cut to a whole number."""
        return int(skip * (1 - self.high_ratio)), int(skip * self.high_ratio)

    def rank(self, velocity: Tensor, patches: Patches, step: int = 0) -> Tensor:
        """The metric (B, N) of a velocity in the form of `patches`."""
        if self.metric == "random":
            samples, tokens = velocity.shape[0], math.prod(patches.grid)
            generator = torch.Generator().manual_seed(self.seed * 100_003 + step)
            ranks = torch.rand(tokens, generator=generator).expand(samples, -1)
            return ranks.to(velocity.device)
        channels = patches.by_channel(velocity)
        if channels.shape[1] == 1:
            return patches.average(channels[:, 0].abs()).float()
        pixels = channels.std(dim=1) if self.metric == "std" else channels.norm(p=2, dim=1)
        return patches.average(pixels).float()

    def choose(self, metric: Tensor, drops: Tensor, skip: int, offset: int = 0) -> tuple[Tensor, Tensor]:
        """The tokens that run and those that don't, in ascending order of the metric.

        Args:
            metric: (B, N).
            drops: (B, N), how often each token was skipped.
            skip: how many to skip.
            offset: added to `drops` by the released form, which begins to count at -(T + 1).

        Returns:
            indices (B, K) and (B, N - K).
        """
        low, high = self._ends(skip)
        tokens = metric.shape[1]
        if self.starvation == "released":
            order = (metric * torch.exp(self.starvation_scale * (drops + offset))).sort(dim=1).indices
            if self.empty_slice and not high:
                return order[:, :0], order
            return order[:, low : tokens - high], torch.cat([order[:, :low], order[:, tokens - high :]], 1)
        revived = torch.exp(-self.starvation_scale * drops)
        skipped = torch.zeros_like(metric, dtype=torch.bool)
        highest = (metric * revived).sort(dim=1).indices[:, tokens - high :]
        skipped.scatter_(1, highest, True)
        lowest = (metric / revived).masked_fill(skipped, math.inf).sort(dim=1).indices[:, :low]
        skipped.scatter_(1, lowest, True)
        order = metric.sort(dim=1).indices
        left_out = skipped.gather(1, order)
        samples = metric.shape[0]
        return order[~left_out].view(samples, -1), order[left_out].view(samples, -1)

    def attach(self, host: Host) -> None:
        """Own the host's tokens, and have its keys and values kept."""
        if self.sample_ratio == 1 and not self.skip_num_step_length:
            host.note(lambda: ["RAS: sample_ratio=1 runs all tokens at every step; nothing can be saved."])
            return
        state = _State(self, host)
        host.tokens.choose(state)
        if self.key_value_cache:
            state.kept = host.attention.keep_keys(state)
        elif "attention" in vars(host) and host.attention.strategy is not None:
            raise ConflictError(
                f"{host.attaching} can't be combined with {host.attention.strategy!r}, which needs the whole "
                "grid of queries and keys; leave key_value_cache on"
            )
        host.clock.on_reset(state.reset)
        host.clock.on_prediction(state.predicted)
        host.finish(state.finish)
        host.stats.holds(state.nbytes)
        host.stats.modes.append(lambda: state.running)
        host.note(state.notes)


class Focus:
    """Which tokens run, for the samples of one loop: the ranks and how often each was skipped."""

    def __init__(self, options: RAS) -> None:
        self.options = options
        self.step = -1
        self.active: Tensor | None = None  # (B, K), ascending in the metric; K may be 0
        self.drops: Tensor | None = None  # (B, N)

    def choose(self, index: int, num_steps: int | None, velocity: Tensor, patches: Patches) -> Tensor:
        """Choose the tokens (B, K) of step `index` by the velocity, times the step in noise, of the last
        one."""
        metric = self.options.rank(velocity, patches, index)
        if self.drops is None or self.drops.shape != metric.shape:
            self.drops = torch.zeros_like(metric)
        skip = self.options.skip_count(index, num_steps, metric.shape[1])
        offset = 0 if num_steps is None else -(num_steps + 1)
        self.active, skipped = self.options.choose(metric, self.drops, skip, offset)
        self.drops.scatter_add_(1, skipped, torch.ones_like(skipped, dtype=self.drops.dtype))
        self.step = index
        return self.active

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.active, self.drops) if tensor is not None)


@dataclass
class _Branch:
    """What is kept of one guidance branch: outputs in the model's form, times for each token."""

    last: Tensor | None = None  # as handed on by the last forward
    reused: Tensor | None = None  # the same when tokens were last chosen
    values: list[Tensor] = field(default_factory=list)  # computed, the latest first
    times: list[Tensor] = field(default_factory=list)  # (B, N), of these

    def tensors(self) -> list[Tensor]:
        kept = [tensor for tensor in (self.last, self.reused) if tensor is not None]
        return [*kept, *self.values, *self.times]

    def learn(self, level: float, output: Tensor, ran: Tensor, patches: Patches) -> None:
        """Take an output, of which the tokens `ran` (B, N) were computed."""
        output, where = output.detach().clone(), patches.spread(ran)
        time = torch.full(ran.shape, level, device=output.device)
        if not self.values:
            self.values, self.times = [output] * 2, [time] * 2
            return
        (new, old), (recent, past) = self.values, self.times
        self.values = [torch.where(where, output, new), torch.where(where, new, old)]
        self.times = [torch.where(ran, time, recent), torch.where(ran, recent, past)]

    def forecast(self, level: float, reach: float, patches: Patches) -> Tensor:
        """Every token's line through its last two values, at most `reach` times their distance ahead."""
        (new, old), (recent, past) = self.values, self.times
        weight = 1 + ahead(level, recent, past, reach)
        return torch.lerp(old, new, patches.spread(weight).to(new.dtype))


class _State(TokenChoice, KeyPolicy):
    """One model and its generation."""

    def __init__(self, options: RAS, host: Host) -> None:
        self.options = options
        self.host = host
        self.kept: KeptKeys | None = None
        self.reach = options.reach if options.inactive == "forecast" else None
        # A line needs two values before the first step that runs on some tokens.
        self._first_kept = options.start - (1 if self.reach is None else 2)
        self.running = 0
        self._tokens = 0
        self._indices: Tensor | None = None  # (B, K) of the forward that runs
        self._nothing = False
        self._keeps = False
        self._patches: Patches | None = None
        self._sample_channels = 0
        self._guided = Focus(options)
        self._own: dict[str, Focus] = {}
        self._branches: dict[str, _Branch] = {}
        # For the report, over all generations.
        self._forwards = 0
        self._partial = 0
        self._share = 0.0
        self._unguided = False
        self._longest = 0
        self._beyond: set[int] = set()

    def reset(self) -> None:
        self._indices, self._patches = None, None
        self._guided = Focus(self.options)
        self._own.clear()
        self._branches.clear()

    def nbytes(self) -> int:
        tensors = [tensor for branch in self._branches.values() for tensor in branch.tensors()]
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        return sum(unique.values()) + sum(focus.nbytes() for focus in (self._guided, *self._own.values()))

    # Choosing.

    def start(self, step: Step, arguments: dict[str, Any]) -> None:
        options = self.options
        sample = arguments[self.host.anatomy.sample]
        layout = self.host.layout()
        self._tokens = layout.image_length
        self._indices, self._keeps = None, False
        if options.runs_some(step.index, step.num_steps):
            self._indices = self._chosen(step, sample.shape[0])
        needed = self._needed_after(step)
        self._keeps = self._indices is None and needed and step.index >= self._first_kept
        self.running = self._tokens if self._indices is None else self._indices.shape[-1]

    def _needed_after(self, step: Step) -> bool:
        """May a later step run on some tokens?"""
        ends = [end for end in (self.options.end, None if step.num_steps is None else step.num_steps - 1)]
        return all(end is None or step.index < end for end in ends)

    def _chosen(self, step: Step, batch: int) -> Tensor | None:
        """The tokens (B, K) of this forward; None where all have to run: for all of its rows there must be
        an earlier output and keys."""
        branch = self._branches.get(step.branch)
        if branch is None or branch.last is None or branch.last.shape[0] != batch:
            return None
        if self.kept is not None and not self.kept.holds(step.branch, self.host.attention.layers):
            return None
        focus = self._guided
        if self.options.chooses_for(step.index, step.num_steps):
            if focus.step != step.index:
                focus = self._by_own_output(step, branch)
        elif focus.active is None:
            focus = self._own.get(step.branch, focus)
        active = focus.active
        if (
            active is None
            or branch.reused is None
            or batch % active.shape[0]
            or active.shape[1] == self._tokens
        ):
            return None
        # Where no token is to run nothing of this forward is used, but a sequence needs one.
        self._nothing = not active.shape[1]
        active = active.new_zeros(active.shape[0], 1) if self._nothing else active
        return active.repeat(batch // active.shape[0], 1)

    def _by_own_output(self, step: Step, branch: _Branch) -> Focus:
        """No scheduler has shown the guided velocity: rank by the transformer's own output."""
        assert self._patches is not None and branch.last is not None
        self._unguided = True
        focus = self._own.setdefault(step.branch, Focus(self.options))
        # A learned variance follows the prediction.
        axis = self._patches.axis
        predicted = branch.last.narrow(axis, 0, min(self._sample_channels, branch.last.shape[axis]))
        focus.choose(step.index, step.num_steps, predicted, self._patches)
        branch.reused = branch.last
        return focus

    def predicted(self, step: Step, following: float | None, velocity: Tensor) -> None:
        """The scheduler is given the guided velocity of a step."""
        patches = self._patches
        if patches is None or not patches.matches(velocity):
            return
        if self.options.chooses_for(step.index + 1, step.num_steps) and self._needed_after(step):
            change = 1.0 if following is None or step.sigma is None else following - step.sigma
            self._guided.choose(step.index + 1, step.num_steps, change * velocity.detach(), patches)
            for branch in self._branches.values():
                branch.reused = branch.last

    def level(self) -> float:
        return _level(self.host.clock.step)

    def select(self, step: Step, hidden_states: Tensor) -> Tensor | None:
        return self._indices

    def keys(self) -> Literal["pass", "keep"]:
        return "keep" if self._keeps else "pass"

    # The output.

    def finish(self, step: Step, output: Tensor) -> Tensor:
        anatomy, partial = self.host.anatomy, self.host.tokens.partial
        self._note(step, partial)
        try:
            patches = Patches(self.host.layout().grid, tuple(output.shape), anatomy.channels, anatomy.packed)
        except SeamError as refusal:
            raise SeamError(
                f"{type(self.host.model).__name__}: RAS can't tell which token gave what: {refusal}"
            ) from None
        self._patches = patches
        self._sample_channels = self.host.arguments[anatomy.sample].shape[patches.axis]
        branch = self._branches.setdefault(step.branch, _Branch())
        if partial:
            output = self._completed(step, branch, output, patches)
        elif self.reach is not None and step.index >= self._first_kept:
            branch.learn(_level(step), output, self._where(output, everywhere=True), patches)
        if not self._needed_after(step):
            self._branches.pop(step.branch)
            if self.kept is not None:
                self.kept.drop(step.branch)
        elif step.index >= self.options.start - 1:
            # A pipeline may work in place on what it gets.
            branch.last = output.detach().clone()
            if self.options.end is None:
                branch.reused = None  # otherwise the last step may want an old one again
        return output

    def _completed(self, step: Step, branch: _Branch, output: Tensor, patches: Patches) -> Tensor:
        """The output, with what is known of the tokens that did not run."""
        assert branch.reused is not None
        ran = self._where(output, everywhere=False)
        if self.reach is None:
            return torch.where(patches.spread(ran), output, branch.reused)
        others = branch.forecast(_level(step), self.reach, patches)
        output = torch.where(patches.spread(ran), output, others)
        branch.learn(_level(step), output, ran, patches)
        return output

    def _where(self, output: Tensor, *, everywhere: bool) -> Tensor:
        """(B, N): which tokens of each row were computed."""
        ran = output.new_full((output.shape[0], self._tokens), everywhere, dtype=torch.bool)
        if not everywhere and not self._nothing:
            assert self._indices is not None
            ran.scatter_(1, self._indices, True)
        return ran

    def _note(self, step: Step, partial: bool) -> None:
        share = self.running / self._tokens if partial else 1.0
        self.host.stats.ran(share)
        self._forwards += 1
        self._partial += partial
        self._share += share
        self._longest = max(self._longest, step.index + 1)
        given = self.options._given_resets() or ()
        if step.num_steps is not None:
            self._beyond.update(reset for reset in given if reset >= step.num_steps)

    def notes(self) -> list[str]:
        """Why it could not help, or not fully."""
        if not self._forwards:
            return ["RAS: the transformer was not called."]
        notes = []
        if self._partial:
            notes.append(
                f"RAS: {self._partial} of {self._forwards} forwards ran on some of the tokens; over all, "
                f"{100 * self._share / self._forwards:.1f} % of the tokens ran."
            )
        else:
            notes.append(
                f"RAS: all tokens ran in each of {self._longest} steps. Some are left out from step "
                f"start={self.options.start} on, except at the resets: use more steps or a smaller start."
            )
        if self._beyond:
            steps = ", ".join(map(str, sorted(self._beyond)))
            notes.append(f"RAS: error_reset_steps {steps} lie beyond the last step and were ignored.")
        if self._unguided:
            notes.append(
                "RAS: no scheduler showed the guided velocity, so tokens were chosen by the transformer's "
                "own output, apart for each guidance branch."
            )
        return notes


def _level(step: Step) -> float:
    """The noise level of a step; the timestep stands in for it."""
    return step.timestep if step.sigma is None else step.sigma
