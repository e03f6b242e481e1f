"""Architectures trained at equal cost on the same data under the same seeds, and one report of them all.

Every run has a folder of its own and is the trainer's, so it continues after a stop. A model that cannot be
built or trained is reported with the reason and does not keep the others from running.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ditkit import models, registry
from ditkit.analysis.bench import machine
from ditkit.analysis.compare.config import CompareFile, Contender, load
from ditkit.analysis.compare.report import render
from ditkit.analysis.compare.result import CompareResult, Entry, Run
from ditkit.analysis.compare.runs import (
    Cost,
    Measure,
    check_settings,
    execute,
    folder_of,
    outcome,
    training_cost,
)
from ditkit.files import write_text
from ditkit.training.config import ConfigError

Told = Callable[[str], None]


class CompareError(RuntimeError):
    """Not one model could be trained."""


def compare(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    resume: bool = False,
    told: Told = lambda text: None,
) -> CompareResult:
    """Train all models of a file under all seeds, measure them and write `report.html` and `result.json`.

    Both files are written anew after every run, so they hold what is there when it is stopped.

    Args:
        path: YAML file, see `ditkit.analysis.compare.config`.
        overrides: `key=value` texts.
        resume: continue in the output folder; finished runs are not repeated, failed ones are tried again.
        told: gets a line before and after every run.

    Raises:
        ConfigError: a bad key or value, or models whose parameters differ too much.
        UnknownNameError: no such architecture.
        FileExistsError: the output folder holds runs and `resume` is False, or runs with other settings.
        CompareError: every model failed.
    """
    file = load(path, overrides)
    for contender in file.models:
        registry.get("model", models.split(contender.arch)[0])
    if not resume and (file.output / "runs").exists():
        raise FileExistsError(
            f"{file.output} holds a comparison already: pass --resume to continue it or choose another output"
        )
    entries = plan(file, told)
    jobs = [
        (contender, entry, run)
        for index in range(len(file.seeds))  # seed by seed: a stop leaves whole comparisons
        for contender, entry in zip(file.models, entries, strict=True)
        if entry.steps is not None
        for run in [entry.runs[index]]
    ]
    for contender, entry, run in jobs:
        assert entry.steps is not None
        settings = file.training_run(contender, run.seed, entry.steps)
        check_settings(file, settings, folder_of(file, entry.name, run.seed))
    measure = Measure(file)
    result = CompareResult(
        file.equal, entries, file.model_dump(mode="json"), machine(), classes=measure.classes
    )
    took: list[float] = []  # seconds of the runs that were not finished before
    for number, (contender, entry, run) in enumerate(jobs, start=1):
        if (folder_of(file, entry.name, run.seed) / "export").is_dir():
            _train(file, contender, entry, run, measure)
            continue
        told(f"run {number} of {len(jobs)}: {entry.name}, seed {run.seed}, {entry.steps} steps")
        began = time.perf_counter()
        _train(file, contender, entry, run, measure)
        took.append(time.perf_counter() - began)
        left = (len(jobs) - number) * sum(took) / len(took) / 60
        told(f"{run.failure or 'finished'}; {took[-1]:.0f} s, about {left:.0f} minutes left")
        write(result, file, measure)
    if not took:
        write(result, file, measure)
    if not any(entry.finished for entry in entries):
        reasons = "; ".join(f"{entry.name}: {entry.state}" for entry in entries)
        raise CompareError(f"every model failed: {reasons}")
    return result


def plan(file: CompareFile, told: Told = lambda text: None) -> list[Entry]:
    """Count every model's parameters and FLOPs and give it its steps; what cannot be built gets a failure.

    Raises:
        ConfigError: the reference of the budget cannot be built, or parameters differ too much.
    """
    entries = [Entry(model.name, model.arch) for model in file.models]
    costs: dict[str, Cost] = {}
    for contender, entry in zip(file.models, entries, strict=True):
        told(f"counting {entry.name}")
        try:
            costs[entry.name] = cost = training_cost(file, contender)
            entry.parameters, entry.flops_per_step = cost.parameters, cost.flops_per_step
        except Exception as error:
            entry.failure = _reason(error)
    budget = file.budget.flops
    if file.budget.reference is not None:
        assert file.budget.steps is not None
        if file.budget.reference not in costs:
            failed = next(entry for entry in entries if entry.name == file.budget.reference)
            raise ConfigError(f"budget.reference: {failed.name} cannot be built: {failed.failure}")
        budget = costs[file.budget.reference].flops_per_step * file.budget.steps
    if file.equal == "parameters":
        _check_parameters(file, costs)
    for entry in entries:
        if entry.flops_per_step is None:
            continue
        entry.steps = file.budget.steps if budget is None else round(budget / entry.flops_per_step)
        if not entry.steps:
            entry.failure = f"one step takes {entry.flops_per_step:.3g} FLOPs, the budget is {budget:.3g}"
            entry.steps = None
        else:
            entry.runs = [Run(seed) for seed in file.seeds]
    return entries


def _check_parameters(file: CompareFile, costs: dict[str, Cost]) -> None:
    counts = {name: cost.parameters for name, cost in costs.items()}
    first = next(iter(counts.values()), 0)
    if any(abs(number - first) > file.tolerance * first for number in counts.values()):
        have = ", ".join(f"{name} {number:,}" for name, number in counts.items())
        raise ConfigError(
            f"models: equal: parameters, but there are {have}: change the sizes to lie within "
            f"{file.tolerance:.0%} of the first one's, or raise tolerance"
        )


def _train(file: CompareFile, contender: Contender, entry: Entry, run: Run, measure: Measure) -> None:
    """Train a run and fill in its figures, or its failure."""
    assert entry.steps is not None and entry.flops_per_step is not None
    settings = file.training_run(contender, run.seed, entry.steps)
    folder = folder_of(file, entry.name, run.seed)
    try:
        execute(file, settings, folder, measure)
        run.finished = True
    except Exception as error:
        run.failure = _reason(error)
    if (folder / "metrics.jsonl").is_file():
        run.points, run.losses = outcome(folder, entry.flops_per_step)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def write(result: CompareResult, file: CompareFile, measure: Measure) -> None:
    """`result.json`, `report.html` and `truth.png` in the output folder."""
    grids = grids_of(result, file)
    if grids and not result.truth:
        with Image.open(next(iter(grids.values()))[-1]) as strip:
            side = strip.height
        result.truth = measure.truth((side, side), file.output / "truth.png")
    result.to_json(file.output / "result.json")
    write_text(file.output / "report.html", render(result, grids, file.output / "truth.png"))


def grids_of(result: CompareResult, file: CompareFile) -> dict[str, list[Path]]:
    """The sample grids of each model along its first finished run, in order."""
    found: dict[str, list[Path]] = {}
    for entry in result.entries:
        for run in entry.finished[:1]:
            folder = folder_of(file, entry.name, run.seed)
            found[entry.name] = sorted(folder.glob("grid-*.png"))
    return found
