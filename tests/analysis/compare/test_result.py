"""What is said about figures and their spread."""

from __future__ import annotations

from ditkit.analysis.compare.result import QUANTITIES, Entry, Point, Run, beyond_spread, shown, verdict


def entry(name: str, *losses: float) -> Entry:
    runs = [
        Run(seed, [Point(1, 1.0, 1.0, loss, 1.0, 0.5)], finished=True) for seed, loss in enumerate(losses)
    ]
    return Entry(name, name, runs=runs)


def test_words_about_differences() -> None:
    loss = QUANTITIES[0]
    text = verdict(loss, [entry("a", 1.0, 1.2), entry("b", 0.5, 0.7), entry("c", 0.6, 0.9), entry("d", 2.0)])
    assert text == (
        "Held-out loss: b is lowest with 0.6 (0.5 to 0.7); the difference exceeds the spread of the seeds "
        "against a; it does not exceed it against c; with a single seed it cannot be told from chance "
        "against d."
    )
    assert verdict(loss, [entry("a", 1.0)]) == ""
    worse, better = entry("a", 1.0, 2.0).spread("loss"), entry("b", 3.0, 4.0).spread("loss")
    assert worse is not None and better is not None
    assert beyond_spread(better, worse, lower=False) is True
    assert beyond_spread(better, worse, lower=True) is False
    assert shown(QUANTITIES[2], worse) == "150.0 % (100.0 % to 200.0 %)"
