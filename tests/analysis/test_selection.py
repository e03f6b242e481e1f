"""The choice keeps its budget on prompts it never saw, and never takes what is slower than dense."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ditkit.analysis.selection import (
    Outcome,
    bound,
    choose,
    likely,
    over,
    pareto,
    shortlist,
    student,
)


@pytest.mark.parametrize(
    ("confidence", "freedom", "expected"),
    [(0.9, 4, 1.533), (0.99, 7, 2.998), (0.99, 15, 2.602), (0.95, 30, 1.697), (0.99, 5, 3.365)],
)
def test_student(confidence: float, freedom: int, expected: float) -> None:
    assert student(confidence, freedom) == pytest.approx(expected, rel=0.02)


def test_few_prompts_promise_little() -> None:
    assert bound([0.01], 8) == math.inf
    assert student(0.99, 1) > student(0.99, 2) > student(0.99, 4)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("spread", [0.1, 0.3, 0.5])
def test_the_bound_is_kept_as_often_as_it_says(confidence: float, spread: float) -> None:
    random = np.random.default_rng(0)
    kept = []
    for errors in 0.02 * random.lognormal(0, spread, size=(1500, 24)):
        kept.append(over(errors[16:]) <= bound(errors[:16].tolist(), 8, confidence))
    assert confidence - 0.02 <= np.mean(kept)
    assert np.mean(kept) <= confidence + 0.06


def test_the_error_of_a_set() -> None:
    assert over([3.0, 4.0]) == pytest.approx(math.sqrt(12.5))


def test_pareto() -> None:
    points = [(0.5, 0.1), (0.3, 0.2), (0.4, 0.3), (0.2, 0.5), (0.5, 0.05), (0.9, 0.05)]
    assert pareto(points) == [3, 1, 4]
    assert pareto([]) == []


def fake(random: np.random.Generator, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Sixty settings: the faster the worse, prompts that differ, a clock that is noisy. (60,), (60, P)"""
    ratios = random.uniform(0.15, 1.1, size=60)
    level = 0.08 * np.exp(-3.0 * ratios) * random.lognormal(0, 0.5, size=60)
    difficulty = random.lognormal(0, 0.35, size=prompts)
    errors = level[:, None] * difficulty * random.lognormal(0, 0.25, size=(60, prompts))
    return ratios, errors


@pytest.mark.parametrize("max_error", [0.01, 0.03])
def test_forty_draws_keep_the_budget(max_error: float) -> None:
    random = np.random.default_rng(7)
    held, found = 0, 0
    for _ in range(40):
        ratios, errors = fake(random, 8 + 8 + 48)
        outcomes = [Outcome(r, tuple(e[:8])) for r, e in zip(ratios, errors, strict=True)]

        def validate(i: int, ratios=ratios, errors=errors) -> Outcome:
            return Outcome(ratios[i] * random.normal(1, 0.02), tuple(errors[i, 8:16]))

        taken = choose(shortlist(outcomes, max_error), outcomes, max_error, validate)
        if taken is None:
            held += 1  # dense has no error
            continue
        index, _, limit = taken
        assert limit <= max_error
        assert ratios[index] < 1
        found += 1
        held += over(errors[index, 16:]) <= max_error
    assert held >= 38
    assert found >= 36


def test_without_the_margin_the_budget_would_be_broken() -> None:
    """What the margin is for: the fastest setting that fits on eight prompts often does not on others."""
    random = np.random.default_rng(7)
    held = 0
    for _ in range(40):
        ratios, errors = fake(random, 8 + 8 + 48)
        fits = [i for i in range(60) if over(errors[i, :8]) <= 0.03]
        held += over(errors[min(fits, key=lambda i: ratios[i]), 16:]) <= 0.03
    assert held < 38


def test_what_fails_on_held_out_prompts_gives_way_to_the_next() -> None:
    outcomes = [Outcome(0.2, (0.01, 0.011) * 4), Outcome(0.3, (0.01, 0.011) * 4), Outcome(0.4, (0.001,) * 8)]
    assert likely(outcomes, 0.02) == [0, 1, 2]
    tried: list[int] = []

    def validate(i: int) -> Outcome:
        tried.append(i)
        return Outcome(0.99, (0.01,) * 8) if i == 0 else Outcome(0.3, ((0.05,) if i == 1 else (0.001,)) * 8)

    taken = choose([0, 1, 2], outcomes, 0.02, validate)
    assert taken is not None
    assert taken[0] == 2
    assert tried == [0, 1, 2]


def test_nothing_slower_than_dense_is_ever_taken() -> None:
    outcomes = [Outcome(1.01, (0.0,) * 8), Outcome(0.99, (0.0,) * 8)]
    assert likely(outcomes, 0.5) == []
    assert choose([0, 1], outcomes, 0.5, lambda i: outcomes[i]) is None


def test_the_shortlist_holds_something_safe() -> None:
    outcomes = [Outcome(0.2 + i / 100, (0.009, 0.0091) * 4) for i in range(20)]
    outcomes += [Outcome(0.6, (0.003,) * 8), Outcome(0.7, (0.001,) * 8)]
    assert shortlist(outcomes, 0.01) == [0, 1, 2, 3, 20, 21]
