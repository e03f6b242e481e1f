"""Runs that take turns, so that other load on the machine hits them alike."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Seconds = dict[str, list[float]]


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options of every script that takes times this way."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a machine that is busy")


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int, clock: str = "wall") -> Seconds:
    """Seconds of each run in each round, after one warm-up each."""
    now = CLOCKS[clock]
    seconds: Seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = now()
            run()
            seconds[name].append(now() - start)
    return seconds


def times_as_fast(seconds: Seconds, name: str, other: str) -> float:
    """How many times as fast `name` is as `other`: the median over rounds of the quotient within a round."""
    pairs = zip(seconds[name], seconds[other], strict=True)
    return statistics.median(theirs / ours for ours, theirs in pairs)


def milliseconds(seconds: Seconds) -> dict[str, float]:
    """The median of each run."""
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
