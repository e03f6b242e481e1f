"""Time at equal error: every method of ours, every peer, plain sampling with fewer steps, in one process.

First every setting of everyone draws some of the prompts once, for a first error and time. Then those that
are next to the wanted errors on the front of their family draw all prompts in interleaved rounds. A family's
time at an error is read off its front, between the two settings around it (linearly in log error).

    python -m benchmarks.methods.equal_error [--model micro-flux] [--steps 28] [--tuned 60]

cache-dit takes part when it can be imported; the result says so when it can't.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.progress import track

import ditkit
from benchmarks.record import Claim, arguments, write
from ditkit import registry
from ditkit.analysis import contestants as who
from ditkit.analysis import peers
from ditkit.analysis.bench import PROMPTS, machine
from ditkit.analysis.contestants import Contestant
from ditkit.analysis.explain import expect, measure
from ditkit.analysis.meter import count
from ditkit.analysis.metrics import relative_l2
from ditkit.analysis.sampling import Sampling, sample
from ditkit.analysis.selection import pareto
from ditkit.analysis.space import search_of, space_for
from ditkit.analysis.tune import HELDOUT, tune
from ditkit.files import whole_file
from ditkit.recipes import Recipe
from ditkit.registry import Choice, Range

matplotlib.use("Agg")
from matplotlib import pyplot as plt

console = Console()
AT = (0.01, 0.02, 0.05)
PEER, SINGLE, PLAIN, TUNED = "peer", "ours", "plain", "tuned"


@dataclass
class Entry:
    """One setting of one family."""

    family: str
    kind: str
    contestant: Contestant
    error: float = math.nan
    ratio: float = math.nan
    flops: float = math.nan
    failed: str = ""

    def fail(self, failure: Exception) -> None:
        """Out of the comparison, for this reason."""
        self.failed = f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"
        self.error = self.ratio = math.nan


def grid(name: str, most: int) -> list[dict[str, Any]]:
    """At most so many combinations of a method's options worth trying, drawn from all."""
    options: list[dict[str, Any]] = [{}]
    for option, way in search_of(registry.get("method", name)).items():
        longer = []
        for known in options:
            if any(known.get(other) not in allowed for other, allowed in way.when.items()):
                longer.append(known)
                continue
            longer += [{**known, option: value} for value in values(way)]
        options = longer
    return random.Random(0).sample(options, min(most, len(options)))


def values(way: Choice | Range) -> Sequence[Any]:
    if isinstance(way, Choice):
        return way.values
    if isinstance(way.low, int) and isinstance(way.high, int):
        return range(way.low, way.high + 1)
    shares = (i / 7 for i in range(8))
    return [way.low * (way.high / way.low) ** share for share in shares]


def everyone(pipe: Any, sampling: Sampling, cost: Any, options: argparse.Namespace) -> list[Entry]:
    """All settings of all families."""
    found = [
        Entry("plain sampling", PLAIN, who.plain(steps))
        for steps in range(2, sampling.steps)
        if steps <= 12 or steps % 2 == 0
    ]
    weights = dict(pair.split("=", 1) for pair in options.weights)
    space = space_for(pipe, cost.flops, weights=weights)
    for name, why in space.left_out.items():
        console.print(f"not compared: {name}: {why}", highlight=False)
    for name, fixed in space.methods.items():
        for choice in grid(name, options.grid):
            method = registry.construct("method", name, {**choice, **fixed})
            found.append(Entry(name, SINGLE, who.ours(method)))
    if not peers.has_cache_dit():
        console.print("cache-dit can't be imported: it is missing in this comparison")
    for family, group in peers.sweep(pipe, sampling, options.texts[: options.prompts]).items():
        few = random.Random(0).sample(group, min(options.peers or len(group), len(group)))
        found += [Entry(family, PEER, contestant) for contestant in few]
    return found


def draw(pipe: Any, entry: Entry, prompts: Sequence[str], sampling: Sampling) -> Any:
    steps = entry.contestant.steps or sampling.steps
    with entry.contestant.attach(pipe, False):
        return sample(pipe, prompts, replace(sampling, steps=steps))


def look(pipe: Any, entries: list[Entry], prompts: Sequence[str], sampling: Sampling) -> None:
    """Everyone's error, and a first time against the median of dense runs in between."""
    reference = sample(pipe, prompts, sampling)
    dense = [reference.seconds]
    for number, entry in enumerate(track(entries, "errors", console=console)):
        if number % 10 == 0:
            dense.append(sample(pipe, prompts, sampling).seconds)
        try:
            drawn = draw(pipe, entry, prompts, sampling)
        except Exception as failure:
            entry.fail(failure)
            continue
        entry.error = relative_l2(drawn.latents, reference.latents)
        entry.ratio = drawn.seconds / statistics.median(dense[-5:])


def fronts(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The settings of each family that no other one of it beats, fastest first; only errors up to 0.2."""
    found: dict[str, list[Entry]] = {}
    for family in dict.fromkeys(entry.family for entry in entries):
        mine = [e for e in entries if e.family == family and math.isfinite(e.error) and 0 < e.error < 0.2]
        found[family] = [mine[i] for i in pareto([(e.ratio, e.error) for e in mine])]
    return found


def around(front: Sequence[Entry], errors: Sequence[float], beside: int = 2) -> list[Entry]:
    """The settings of a front that lie next to the wanted errors."""
    kept: dict[str, Entry] = {}
    for error in errors:
        near = sorted(front, key=lambda e: abs(math.log(e.error / error)))
        for side in ([e for e in near if e.error <= error], [e for e in near if e.error > error]):
            kept |= {e.contestant.label: e for e in side[:beside]}
    return list(kept.values())


def clock(pipe: Any, entries: list[Entry], prompts: Sequence[str], sampling: Sampling, rounds: int) -> None:
    """Interleaved rounds: the errors of the first, the median of the ratios to dense within each. Who fails
    when it is drawn again is out, with its reason."""
    ratios: dict[int, list[float]] = {id(entry): [] for entry in entries}
    reference = sample(pipe, prompts, sampling)
    for turn in track(range(rounds), f"timing {len(entries)} settings", console=console):
        before = sample(pipe, prompts, sampling).seconds
        for entry in entries:
            if entry.failed:
                continue
            try:
                drawn = draw(pipe, entry, prompts, sampling)
            except Exception as failure:
                entry.fail(failure)
                continue
            ratios[id(entry)].append(drawn.seconds)
            if turn == 0:
                entry.error = relative_l2(drawn.latents, reference.latents)
        dense = (before + sample(pipe, prompts, sampling).seconds) / 2
        for entry in entries:
            if not entry.failed:
                ratios[id(entry)][-1] /= dense
    for entry in entries:
        if not entry.failed:
            entry.ratio = statistics.median(ratios[id(entry)])


def work(pipe: Any, entries: list[Entry], prompts: Sequence[str], sampling: Sampling) -> None:
    """Counted FLOPs, relative to dense."""
    with count(pipe.transformer) as whole:
        sample(pipe, prompts, sampling)
    for entry in entries:
        with count(pipe.transformer) as spent:
            draw(pipe, entry, prompts, sampling)
        entry.flops = spent.flops / whole.flops


def at(front: Sequence[Entry], error: float, of: str = "ratio") -> float | None:
    """A family's time (or FLOPs) at an error; None where it has no setting that good.

    Beyond its fastest setting a front stays as fast as that.
    """
    good = sorted(front, key=lambda e: e.error)
    lower = [e for e in good if e.error <= error]
    if not lower:
        return None
    below = min(lower, key=lambda e: getattr(e, of))
    upper = [e for e in good if e.error > error and getattr(e, of) < getattr(below, of)]
    if not upper:
        return getattr(below, of)
    above = min(upper, key=lambda e: e.error)
    share = math.log(error / below.error) / math.log(above.error / below.error)
    return getattr(below, of) + share * (getattr(above, of) - getattr(below, of))


def compare(pipe: Any, steps: int, options: argparse.Namespace) -> tuple[list[Claim], dict[str, Any]]:
    """One number of steps: claims and figures."""
    console.rule(f"{options.model}, {steps} steps")
    sampling, prompts = Sampling(steps, options.guidance), options.texts[: options.prompts]
    cost = measure(pipe, prompts, sampling)
    entries = everyone(pipe, sampling, cost, options)
    entries += tuned_entries(pipe, sampling, options)
    look(pipe, entries, prompts[: options.look], sampling)
    found = {family: around(front, AT) for family, front in fronts(entries).items() if front}
    timed = list(itertools.chain(*found.values()))
    names = {id(entry) for entry in timed}
    clock(pipe, timed, prompts, sampling, options.rounds)
    timed = [entry for entry in timed if not entry.failed]
    work(pipe, [e for e in timed if e.kind in (SINGLE, PLAIN)], prompts, sampling)
    found = {family: front for family, front in fronts(timed).items() if front}
    for entry in sorted(timed, key=lambda e: (e.family, e.ratio)):
        console.print(f"{entry.ratio:.3f}  {entry.error:.4f}  {entry.contestant.label}", highlight=False)
    where = f"{options.model}, {steps} steps"
    plot(found, where, options.json.with_name(f"{options.json.stem}_{options.model}_{steps}.png"))
    figures = {
        "settings": [
            {
                "family": e.family,
                "kind": e.kind,
                "label": e.contestant.label,
                "error": e.error,
                "time_ratio": e.ratio,
                "flops_ratio": None if math.isnan(e.flops) else e.flops,
                "timed": id(e) in names,
                "failed": e.failed,
            }
            for e in entries
        ],
        "at": {f"{error:g}": {family: at(front, error) for family, front in found.items()} for error in AT},
    }
    return [*time_claims(found, where), *work_claims(found, where), *prediction(timed, cost, where)], figures


def tuned_entries(pipe: Any, sampling: Sampling, options: argparse.Namespace) -> list[Entry]:
    """The front that `tune` finds with other prompts, one search for each error."""
    if not options.tuned:
        return []
    found: dict[str, Entry] = {}
    others = options.texts[-(len(options.texts) // 2) :]  # every other prompt, from here, is searched with
    with tempfile.TemporaryDirectory() as folder:
        for error in AT:
            result = tune(
                pipe,
                error,
                Path(folder) / f"{error:g}",
                trials=options.tuned // len(AT),
                prompts=list(itertools.chain(*zip(others, options.texts[: len(others)], strict=True))),
                sampling=replace(sampling, seed=777),
                repeats=1,
            )
            recipes: list[Recipe] = [result.recipe, *(trial.recipe for trial in result.front)]
            for recipe in recipes:
                if recipe.methods or recipe.steps:
                    contestant = replace(who.from_recipe(recipe), kind="method")
                    found[contestant.label] = Entry("tuned recipes", TUNED, contestant)
    return list(found.values())


def time_claims(found: dict[str, list[Entry]], where: str) -> list[Claim]:
    """Best single method against the best peer; best recipe against the best single method."""
    claims = []
    kinds = {front[0].kind for front in found.values()}
    for error in AT:
        best: dict[str, tuple[float, str]] = {}
        for family, front in found.items():
            time = at(front, error)
            kind = front[0].kind
            if time is not None and time < best.get(kind, (math.inf, ""))[0]:
                best[kind] = (time, family)
        pairs = ((SINGLE, PEER, 1.3, "best single method"), (TUNED, SINGLE, 1.5, "best recipe of `tune`"))
        for mine, theirs, target, what in pairs:
            if mine not in kinds or theirs not in kinds or not {mine, theirs} & set(best):
                continue
            against = "the best peer" if theirs == PEER else "the best single method"
            none = (math.inf, "none reaches it:")
            fast, slow = best.get(mine, none), best.get(theirs, none)
            gain = slow[0] / fast[0]
            claims.append(
                Claim(
                    "equal error",
                    f"{where}, error {error:g}: {what} at least {target} times faster than {against}",
                    "ditkit",
                    f"{gain:.2f} times: {fast[1]} {fast[0]:.3f} of dense, {slow[1]} {slow[0]:.3f}; "
                    f"plain sampling {_figure(at(found.get('plain sampling', ()), error))}",
                    gain >= target,
                    "interpolated between settings; text encoder and decoder included"
                    + ("" if peers.has_cache_dit() else "; cache-dit was not installed"),
                )
            )
    return claims


def work_claims(found: dict[str, list[Entry]], where: str) -> list[Claim]:
    """Every training-free method against plain sampling at equal counted FLOPs."""
    plain = sorted(found.get("plain sampling", ()), key=lambda e: e.flops)
    claims = []
    for family, front in found.items():
        if front[0].kind != SINGLE:
            continue
        gains = []
        for entry in front:
            error = plain_error(plain, entry.flops)
            if error is None and plain and entry.flops > plain[-1].flops and entry.error >= plain[-1].error:
                error = plain[-1].error  # even plain sampling with fewer FLOPs is nearer
            if error is not None:
                gains.append((error / entry.error, entry, error))
        if not gains:
            continue
        gain, entry, error = max(gains, key=lambda each: each[0])
        claims.append(
            Claim(
                family,
                f"{where}: at some setting nearer to dense than plain sampling with as many FLOPs",
                "ditkit",
                f"{entry.contestant.label}: error {entry.error:.4f} at {entry.flops:.3f} of dense FLOPs; "
                f"plain sampling {error:.4f}",
                gain > 1,
                "plain sampling interpolated between numbers of steps",
            )
        )
    return claims


def plain_error(plain: Sequence[Entry], flops: float) -> float | None:
    """Plain sampling's error at so many FLOPs, between two numbers of steps; none at those of dense."""
    if flops >= 1:
        return 0.0
    for less, more in itertools.pairwise(plain):
        if less.flops <= flops <= more.flops:
            share = (flops - less.flops) / (more.flops - less.flops)
            return math.exp((1 - share) * math.log(less.error) + share * math.log(more.error))
    return None


def prediction(timed: Sequence[Entry], cost: Any, where: str) -> list[Claim]:
    """Predicted time against measured time, for the caches whose computed steps are known beforehand."""
    off = []
    for entry in timed:
        if entry.kind == SINGLE and entry.family == "taylorseer":
            said = expect(entry.contestant.label, cost).time_ratio
            assert said is not None
            off.append((abs(said / entry.ratio - 1), entry, said))
    if not off:
        return []
    middle = statistics.median(each[0] for each in off)
    worst, entry, said = max(off, key=lambda each: each[0])
    return [
        Claim(
            "taylorseer",
            f"{where}: the time predicted before the run is within 15 % of the measured one",
            "ditkit",
            f"off by {100 * middle:.0f} % in the middle of {len(off)} settings, {100 * worst:.0f} % at most: "
            f"{entry.contestant.label}, predicted {said:.3f}, measured {entry.ratio:.3f}",
            worst <= 0.15,
            "from a few timed dense steps; the forecast's own time is not in the prediction",
        )
    ]


def _figure(value: float | None) -> str:
    return "has none" if value is None else f"{value:.3f}"


def plot(found: dict[str, list[Entry]], where: str, path: Path) -> None:
    colours = {SINGLE: "#0f8a5f", PEER: "#c05a1c", PLAIN: "#5b76b8", TUNED: "#1d1c1a"}
    figure, axes = plt.subplots(figsize=(9, 6))
    marks = itertools.cycle("osD^v<>P*X")
    for family, front in found.items():
        line = sorted(front, key=lambda e: e.ratio)
        axes.plot(
            [e.ratio for e in line],
            [e.error for e in line],
            marker=next(marks),
            color=colours[line[0].kind],
            linestyle="--" if line[0].kind == PLAIN else "-",
            label=family,
        )
    axes.set(yscale="log", xlabel="time, relative to dense", ylabel="error of the final latents", title=where)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120, bbox_inches="tight")
    plt.close(figure)
    console.print(str(path))


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--model", default="micro-flux")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--texts", type=Path, help="a file with a prompt a line; None: the bench's own")
    parser.add_argument("--look", type=int, default=4, help="of them, for the first look")
    parser.add_argument("--grid", type=int, default=60, help="settings of each method of ours")
    parser.add_argument("--peers", type=int, default=0, help="settings of each peer; 0: all there are")
    parser.add_argument("--tuned", type=int, default=60, help="trials of `tune` over all errors; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=FOLDER")
    options = parser.parse_args()
    lines = options.texts.read_text(encoding="utf-8").splitlines() if options.texts else (*PROMPTS, *HELDOUT)
    options.texts = [line for line in lines if line.strip()]
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    for steps in options.steps:
        pipe = ditkit.load(options.model)  # anew: not every peer leaves a pipeline as it found it
        pipe.set_progress_bar_config(disable=True)
        more, figures[str(steps)] = compare(pipe, steps, options)
        claims += more
        settings = {"prompts": options.prompts, "grid": options.grid, "peers": options.peers}
        found = {"claims": [asdict(claim) for claim in claims], "settings": settings, "figures": figures}
        keep(options.json, options.model, found, machine(pipe))


def keep(path: Path, model: str, found: dict[str, Any], on: dict[str, Any]) -> None:
    """Write what was found for a model, beside what the file has for others."""
    known = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else {}
    models = dict(sorted({**known, model: found}.items()))
    claims = [Claim(**claim) for each in models.values() for claim in each["claims"]]
    write(path, claims, on, cache_dit=peers.has_cache_dit(), models=models)


if __name__ == "__main__":
    main()
