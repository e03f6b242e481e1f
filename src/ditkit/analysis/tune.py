"""The fastest setting within an error budget: a search over methods, their options, and steps.

Every trial draws the same prompts densely and with a setting, one after the other, so that what else the
machine does falls on both. The search (optuna, two objectives) keeps a study file and goes on from it. The
settings on the front are then drawn on prompts held out from the search, and the fastest that keeps the
budget there becomes the recipe; see `ditkit.analysis.selection`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ditkit import registry
from ditkit.analysis import contestants as who
from ditkit.analysis.bench import CLIP_PROMPTS, PROMPTS, Judge, Progress, bench, pipeline_of
from ditkit.analysis.explain import PipelineCost, expect, measure
from ditkit.analysis.metrics import relative_l2_each
from ditkit.analysis.result import BenchResult
from ditkit.analysis.sampling import Sample, Sampling, draws_classes, draws_clips, sample, some_classes
from ditkit.analysis.selection import Outcome, choose, pareto, shortlist
from ditkit.analysis.space import Space, search_of, space_for
from ditkit.files import write_text
from ditkit.recipes import Measured, ModelName, Recipe, Settings, class_name
from ditkit.seams.anatomy import describe

HELDOUT = (
    "green apple",
    "crying face",
    "airplane",
    "rose",
    "snowflake",
    "dog face",
    "umbrella",
    "ghost",
)
"""Captions that micro-flux knows, for validation beside `PROMPTS` of the bench."""
HELDOUT_CLIPS = (
    "banana moving right",
    "frog face moving down left",
    "tractor staying still, camera zooms out",
    "blue heart moving up",
)
"""The same for micro-wan."""
STUDY = "study.jsonl"
_ROUNDS = 3
"""Interleaved rounds that a trial gets whose first one puts it on the front."""
_FRONT = 10
"""So many points of the front are drawn on held-out prompts at most."""
_OTHER_NOISE = 10_000
"""Held-out pictures start from noise of seeds so far from those of the search."""


class TuneError(ValueError):
    """What a search can't do: the message says what differs or is missing."""


@dataclass(frozen=True)
class Trial:
    """A setting that was tried, and what it gave on the prompts of the search."""

    number: int
    recipe: Recipe
    outcome: Outcome


@dataclass
class TuneResult:
    """What a search found.

    Args:
        recipe: the fastest setting that keeps the budget; one without methods when there is none.
        chosen: its trial, None when dense sampling it is.
        front: trials that no other one beats in time and error, fastest first.
        trials: all of them.
        held: the front on held-out prompts, with pictures; None when the search was interrupted.
        max_error: the budget.
        space: what was searched, and what was left out.
        wanted: trials that were asked for.
    """

    recipe: Recipe
    chosen: Trial | None
    front: list[Trial]
    trials: list[Trial]
    held: BenchResult | None
    max_error: float
    space: Space
    wanted: int
    failures: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.held is not None

    def headline(self) -> str:
        """What came out, in a sentence."""
        if not self.complete:
            return f"Stopped after {len(self.trials)} of {self.wanted} trials; the same command continues."
        found = self.recipe.measured
        if self.chosen is None:
            return (
                f"No setting of {len(self.trials)} was both faster than dense sampling and surely within an "
                f"error of {self.max_error:g}: the recipe is dense sampling."
            )
        return (
            f"{self.recipe.describe()} takes {found.time_ratio:.2f} of dense sampling's time, with a "
            f"relative error of {found.error:.4f} on {found.prompts} held-out prompts; other prompts stay "
            f"below {found.error_bound:.4f} with 99 % confidence, the budget is {self.max_error:g}."
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "headline": self.headline(),
            "max_error": self.max_error,
            "recipe": self.recipe.model_dump(mode="json", by_alias=True),
            "front": [trial.number for trial in self.front],
            "trials": [
                {
                    "number": trial.number,
                    "recipe": trial.recipe.describe(),
                    "time_ratio": trial.outcome.time_ratio,
                    "error": trial.outcome.error,
                    "errors": trial.outcome.errors,
                }
                for trial in self.trials
            ],
            "left_out": dict(self.space.left_out),
            "failures": self.failures,
            "held_out": None if self.held is None else self.held.as_dict(),
        }


def tune(
    model: Any,
    max_error: float,
    out: str | os.PathLike[str],
    *,
    trials: int = 60,
    prompts: Sequence[str] | None = None,
    sampling: Sampling | None = None,
    methods: Sequence[str] | None = None,
    weights: Mapping[str, str | Path] | None = None,
    batch: int = 8,
    repeats: int = 3,
    name: str | None = None,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Find the fastest setting whose error stays within a budget.

    Writes into `out`: the study file (from which a second call goes on), `recipe.yaml`, `front/*.yaml`,
    `tune.json` and `report.html`. Ctrl-C keeps the finished trials and returns what there is.

    Args:
        model: a text-to-image pipeline, a class-conditional one of ours, or what `ditkit.load` takes.
        max_error: the budget: relative L2 distance of the final latents to dense sampling from the same
            noise, over a set of prompts.
        out: folder, made when it is not there.
        trials: settings to try, those of an earlier call among them.
        prompts: every other one is held out from the search; fewer than eight are used for both, from other
            noise. None: sixteen that micro-flux knows, or of the pipeline's classes.
        sampling: of dense sampling.
        methods: names to consider, None for all of the registry.
        weights: method -> folder of its learned parts.
        repeats: timed rounds on held-out prompts.

    Raises:
        TuneError: the study in `out` is of another search; the message names what differs.
        ValueError, TypeError: before any work, naming the argument.
    """
    if not 0 < max_error < math.inf:
        raise ValueError(f"max_error={max_error}: a number above 0 is needed, e.g. 0.05")
    if trials < 1:
        raise ValueError(f"trials={trials}: at least 1 is needed")
    pipe, sampling, out = pipeline_of(model), sampling or Sampling(), Path(out)
    search, heldout = split(prompts, pipe)
    name = name or (str(model) if isinstance(model, (str, Path)) else type(model).__name__)
    facts = {
        "model": name,
        "class": class_name(pipe.transformer),
        "prompts": search,
        "held out": heldout,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "size": list(sampling.size) if sampling.size else None,
        "seed": sampling.seed,
        "weights": {key: str(folder) for key, folder in (weights or {}).items()},
        "options": _choices(methods),
    }
    describe(getattr(pipe.transformer, "_orig_mod", pipe.transformer))  # refuses a class before any work
    study = _study(out, facts, sampling.seed)
    cost = measure(pipe, search[:batch], sampling)
    space = space_for(pipe, cost.flops, methods, weights)
    objective = Objective(pipe, search, sampling, batch)
    failures: list[str] = []
    finished = _search(study, space, objective, trials, max_error, failures, progress)
    found = _trials(study)
    front = [found[i] for i in thinned(found, pareto([_point(trial) for trial in found]))]
    result = TuneResult(Recipe(), None, front, found, None, max_error, space, trials, failures)
    if finished:
        _validate(result, pipe, heldout, sampling, batch, repeats, cost, name, judge, progress)
        _write(result, out, pipe, name, sampling)
    return result


def _choices(methods: Sequence[str] | None) -> dict[str, dict[str, str]]:
    """What is tried of each method's options: a study goes on only among the choices it began with."""
    entries = [registry.get("method", name) for name in methods or registry.entries("method")]
    return {entry.name: {option: str(way) for option, way in search_of(entry).items()} for entry in entries}


def split(prompts: Sequence[str] | None, pipe: Any) -> tuple[list[str], list[str]]:
    """Prompts of the search, and those held out from it; captions or classes for the pipeline where none are
    given. A pipeline of few classes draws all of them in both, from other noise."""
    if prompts is None and draws_classes(pipe):
        count = len(PROMPTS)
        spread = some_classes(pipe, 2 * count)
        few = [some_classes(pipe, count)] * 2
        return (spread[::2], spread[1::2]) if len(set(spread)) == 2 * count else (few[0], few[1])
    if prompts is None:
        clips = draws_clips(pipe)
        return (list(CLIP_PROMPTS), list(HELDOUT_CLIPS)) if clips else (list(PROMPTS), list(HELDOUT))
    if not prompts:
        raise ValueError("prompts is empty; at least one is needed")
    if len(prompts) < 8:
        return list(prompts), list(prompts)
    return list(prompts[::2]), list(prompts[1::2])


class Objective:
    """Draws the prompts densely and with a setting, in turns."""

    def __init__(self, pipe: Any, prompts: Sequence[str], sampling: Sampling, batch: int) -> None:
        self._pipe, self._prompts, self._sampling, self._batch = pipe, list(prompts), sampling, batch
        self._reference = self._draw(Recipe())
        if self._reference.latents is None:
            raise TypeError(f"{type(pipe).__name__} does not show its latents, so no error can be measured")
        self._dense: list[float] = []

    def __call__(self, recipe: Recipe, promising: Callable[[Outcome], bool]) -> Outcome:
        """Errors against the first dense run; time relative to the median of the last dense ones.

        Args:
            promising: an outcome worth `_ROUNDS` rounds, since a lucky one would lead the search astray.
        """
        seconds, errors = self._round(recipe)
        taken = [seconds]
        while True:
            near = self._dense[-max(5, len(taken)) :]
            outcome = Outcome(statistics.median(taken) / statistics.median(near), tuple(errors))
            if len(taken) == _ROUNDS or not promising(outcome):
                return outcome
            taken.append(self._round(recipe)[0])

    def _round(self, recipe: Recipe) -> tuple[float, list[float]]:
        self._dense.append(self._draw(Recipe()).seconds)
        drawn = self._draw(recipe)
        assert drawn.latents is not None
        assert self._reference.latents is not None
        return drawn.seconds, relative_l2_each(drawn.latents, self._reference.latents)

    def _draw(self, recipe: Recipe) -> Sample:
        contestant = who.from_recipe(recipe)
        sampling = replace(self._sampling, steps=contestant.steps or self._sampling.steps)
        with contestant.attach(self._pipe, False):
            return sample(self._pipe, self._prompts, sampling, batch=self._batch)


def _study(out: Path, facts: Mapping[str, Any], seed: int) -> Any:
    """The study in a folder, new or continued."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / STUDY)))
    study = optuna.create_study(
        study_name="tune", storage=storage, directions=["minimize", "minimize"], load_if_exists=True
    )
    known = study.user_attrs
    differing = [key for key, value in facts.items() if known and known.get(key) != value]
    if differing:
        key = differing[0]
        then, now = (textwrap.shorten(repr(value), 120) for value in (known.get(key), facts[key]))
        raise TuneError(
            f"{out / STUDY} is of another search: its {key} is {then}, now it is {now}. "
            "Use another folder, or remove that file"
        )
    for key, value in facts.items():
        if key not in known:
            study.set_user_attr(key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(
            multivariate=True,
            group=True,
            n_startup_trials=12,
            seed=seed + len(study.trials),
        )
    return study


def _search(
    study: Any,
    space: Space,
    objective: Objective,
    trials: int,
    max_error: float,
    failures: list[str],
    progress: Progress | None,
) -> bool:
    """Try settings until there are enough; False when it was interrupted."""
    import optuna

    done = {trial.recipe.describe(): trial.outcome for trial in _trials(study)}
    if not study.trials:
        for start in space.starts():
            study.enqueue_trial(start, skip_if_exists=True)
    repeated, best = 0, ""
    trial = None
    try:
        while len(done) + len(failures) < trials and repeated < 5 * trials:
            if progress is not None:
                progress(f"trial {len(done) + 1}{best}", len(done), trials)
            trial = study.ask()
            recipe = space.suggest(trial)
            label = recipe.describe()
            trial.set_user_attr("recipe", recipe.model_dump(mode="json", by_alias=True))
            if label in done:
                repeated += 1
                trial.set_user_attr("repeats", True)
                outcome = done[label]
            else:
                try:
                    outcome = objective(recipe, lambda found: _leads(found, done.values()))
                except (ValueError, TypeError, RuntimeError) as error:
                    failures.append(f"{label}: {' '.join(str(error).split())[:200]}")
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    continue
                if not math.isfinite(outcome.error):
                    failures.append(f"{label}: its latents are not finite")
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    continue
                done[label] = outcome
            trial.set_user_attr("errors", list(outcome.errors))
            # Settings far beyond the budget are of no use, however fast.
            trial.set_constraint("error", outcome.error - 1.5 * max_error)
            study.tell(trial, [outcome.time_ratio, outcome.error])
            trial = None
            within = [one.time_ratio for one in done.values() if one.error <= max_error]
            best = f", {min(within):.2f} x time so far" if within else ""
    except KeyboardInterrupt:
        if trial is not None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
        return False
    if progress is not None:
        progress("trials done", trials, trials)
    return True


def _leads(outcome: Outcome, others: Iterable[Outcome]) -> bool:
    """Would it be on the front of those that are faster than dense?"""
    beaten = any(one.time_ratio <= outcome.time_ratio and one.error <= outcome.error for one in others)
    return outcome.time_ratio < 1 and not beaten


def _trials(study: Any) -> list[Trial]:
    """The finished trials, each setting once."""
    import optuna

    found: dict[str, Trial] = {}
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        recipe = Recipe.model_validate(trial.user_attrs["recipe"])
        outcome = Outcome(trial.values[0], tuple(trial.user_attrs["errors"]))
        found.setdefault(recipe.describe(), Trial(trial.number, recipe, outcome))
    return list(found.values())


def _point(trial: Trial) -> tuple[float, float]:
    return trial.outcome.time_ratio, trial.outcome.error


def thinned(trials: Sequence[Trial], front: Sequence[int], most: int = _FRONT) -> list[int]:
    """At most so many of a front's points: those that lie closest to their neighbour in time go first."""
    kept = list(front)
    while len(kept) > most:
        gaps = [
            trials[kept[i + 1]].outcome.time_ratio - trials[kept[i - 1]].outcome.time_ratio
            for i in range(1, len(kept) - 1)
        ]
        del kept[1 + gaps.index(min(gaps))]
    return kept


def _validate(
    result: TuneResult,
    pipe: Any,
    heldout: Sequence[str],
    sampling: Sampling,
    batch: int,
    repeats: int,
    cost: PipelineCost,
    name: str,
    judge: Judge | None,
    progress: Progress | None,
) -> None:
    """Draw the front and the likely choices on held-out prompts; choose."""
    trials = result.trials
    outcomes = [trial.outcome for trial in trials]
    wanted = shortlist(outcomes, result.max_error)
    numbers = {trial.number for trial in result.front}
    drawn = [*result.front, *(trials[i] for i in wanted if trials[i].number not in numbers)]
    drawn = sorted({trial.recipe.describe(): trial for trial in drawn}.values(), key=_point)
    other = replace(sampling, seed=sampling.seed + _OTHER_NOISE)
    result.held = bench(
        pipe,
        [trial.recipe for trial in drawn],
        heldout,
        sampling=other,
        repeats=repeats,
        batch=batch,
        peers=False,
        plain=False,
        judge=judge,
        name=name,
        progress=progress,
        expected=[expect(trial.recipe, cost) for trial in drawn],
    )
    held = {row.label: row for row in result.held.rows}

    def outcome(index: int) -> Outcome:
        row = held[who.from_recipe(trials[index].recipe).label]
        return Outcome(row.time_ratio or math.inf, tuple(row.latent_errors))

    taken = choose(wanted, outcomes, result.max_error, outcome)
    settings = Settings(steps=sampling.steps, guidance=sampling.guidance, size=sampling.size)
    about = {"model": ModelName.of(name, pipe.transformer), "settings": settings}
    result.recipe = Recipe(**about)
    if taken is None:
        return
    index, found, limit = taken
    result.chosen = trials[index]
    measured = Measured(
        error=found.error,
        time_ratio=found.time_ratio,
        error_bound=limit,
        prompts=len(heldout),
        device=result.held.machine["device"],
    )
    result.recipe = result.chosen.recipe.model_copy(update={**about, "measured": measured})


def front_recipes(result: TuneResult) -> Iterator[Recipe]:
    """The front's recipes with what each gave on held-out prompts, fastest first."""
    assert result.held is not None
    rows = {row.label: row for row in result.held.rows}
    for trial in result.front:
        row = rows[who.from_recipe(trial.recipe).label]
        measured = Measured(
            error=row.latent_error,
            time_ratio=row.time_ratio,
            prompts=len(row.latent_errors),
            device=result.held.machine["device"],
        )
        about = {"model": result.recipe.model, "settings": result.recipe.settings, "measured": measured}
        yield trial.recipe.model_copy(update=about)


def _write(result: TuneResult, out: Path, pipe: Any, name: str, sampling: Sampling) -> None:
    from ditkit.analysis.report import render_tune

    folder = out / "front"
    for old in folder.glob("*.yaml"):  # of an earlier, shorter search
        old.unlink()
    for number, recipe in enumerate(front_recipes(result), start=1):
        recipe.save(folder / f"{number:02d}.yaml")
    write_text(out / "tune.json", json.dumps(result.as_dict(), indent=1, ensure_ascii=False) + "\n")
    write_text(out / "report.html", render_tune(result))
    result.recipe.save(out / "recipe.yaml")
