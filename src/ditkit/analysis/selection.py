"""Which setting to take: the fastest whose error stays within a budget on prompts that were not looked at.

A setting found by search looks better than it is, since it was chosen by the same prompts. So it must keep a
margin there, and then pass on prompts held out from the search; the next one is tried when it does not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

FASTER = 0.97
"""A time ratio that counts as faster than dense: what is above may be noise."""
_SURE, _LIKELY = 0.99, 0.9


@dataclass(frozen=True)
class Outcome:
    """What a setting gave.

    Args:
        time_ratio: time relative to dense.
        errors: relative error of each prompt's final latents.
    """

    time_ratio: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        return over(self.errors)


def over(errors: Sequence[float]) -> float:
    """The error over a set of prompts: the root of the mean square of theirs."""
    return math.sqrt(statistics.fmean(error * error for error in errors))


def bound(errors: Sequence[float], further: int, confidence: float = _SURE) -> float:
    """What the error over `further` other prompts stays below, with this confidence.

    Errors of prompts are skewed, about log-normal with some deviation sigma; that of the logarithm of their
    mean square over n of them is sqrt((exp(4 sigma^2) - 1) / n). The bound is the prediction bound of such a
    mean: error x exp(t / 2 sqrt((exp(4 sigma^2) - 1) (1/n + 1/m))). Infinite for one error.

    Args:
        errors: of n >= 1 prompts.
        further: m >= 1.
        confidence: one-sided, above 0.5.
    """
    n, error = len(errors), over(errors)
    if n < 2:
        return math.inf
    if not error:
        return 0.0
    sigma = statistics.stdev(math.log(max(each, 1e-3 * error)) for each in errors)
    spread = math.sqrt(math.expm1(4 * sigma**2) * (1 / n + 1 / further))
    return error * math.exp(student(confidence, n - 1) * spread / 2)


def student(confidence: float, freedom: int) -> float:
    """Quantile of Student's distribution, by Fisher's expansion; within 2 % from 4 degrees of freedom on.

    Below it is too small, and few prompts are no ground for a promise: their quantile is taken at 4 and
    grows with 4 / freedom.
    """
    z, nu = statistics.NormalDist().inv_cdf(confidence), max(freedom, 4)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / nu**power for power, term in enumerate(terms)) * max(1.0, 4 / freedom)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in both coordinates, by the first coordinate."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def likely(outcomes: Sequence[Outcome], max_error: float) -> list[int]:
    """Indices of the outcomes that probably keep the budget and are faster than dense, fastest first."""
    found = [
        index
        for index, outcome in enumerate(outcomes)
        if outcome.time_ratio < FASTER and bound(outcome.errors, len(outcome.errors), _LIKELY) <= max_error
    ]
    return sorted(found, key=lambda index: outcomes[index].time_ratio)


def shortlist(outcomes: Sequence[Outcome], max_error: float, most: int = 6) -> list[int]:
    """Whom to try on held-out prompts: the fastest likely ones, and safer ones to fall back on."""
    order = likely(outcomes, max_error)
    kept = order[: max(most - 2, 1)]
    for share in (0.7, 0.4):
        safer = [i for i in order if bound(outcomes[i].errors, 8) <= share * max_error and i not in kept]
        kept += safer[:1]
    return kept[:most]


def choose(
    candidates: Iterable[int],
    outcomes: Sequence[Outcome],
    max_error: float,
    validate: Callable[[int], Outcome],
) -> tuple[int, Outcome, float] | None:
    """The first candidate that keeps the budget on held-out prompts and is faster than dense there.

    Args:
        candidates: indices into `outcomes`, the most wanted first.
        outcomes: on the prompts of the search.
        max_error: the budget.
        validate: draws a candidate on held-out prompts.

    Returns:
        Its index, its held-out outcome and the bound of its error; None when none passes.
    """
    for index in candidates:
        held = validate(index)
        limit = bound((*outcomes[index].errors, *held.errors), len(held.errors))
        if held.time_ratio < FASTER and held.error <= max_error and limit <= max_error:
            return index, held, limit
    return None
