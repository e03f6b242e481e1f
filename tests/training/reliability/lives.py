"""A run of the trainer that is killed again and again at random moments, and then left to come to its end.

`python lives.py FILE KILLS SEED` forks each life from one process that has imported everything, so that a
life costs no imports. Every second one is killed while a checkpoint is being written. Prints a line of JSON:
how many kills, how many left a half-written checkpoint, and the status of the last life.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ditkit.training.config import load
from ditkit.training.trainer import train


def born(file: str) -> int:
    """A process that trains, from the newest checkpoint on."""
    child = os.fork()
    if child:
        return child
    try:
        train(file, resume=True)
    except BaseException:
        os._exit(1)
    os._exit(0)


def times(paths: list[Path]) -> dict[Path, int]:
    """When they were changed last; what is not there, or goes away in between, is left out."""
    found = {}
    for path in paths:
        try:
            found[path] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return found


def wait_for(child: int, look: Callable[[], list[Path]], changes: int) -> None:
    """Until the files that are looked at came, went or were changed so often."""
    before = times(look())
    while changes:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit("a life came to its end by itself: give the run more steps")
        now = times(look())
        if now != before:
            changes, before = changes - 1, now
        time.sleep(0.001)


def main() -> None:
    file, kills, chance = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
    folder = load(file).output / "tiny"
    half_written = 0
    for number in range(kills):
        child = born(file)
        if number % 2:  # a folder beside the checkpoints, and each file in it, is a change
            wait_for(child, lambda: list((folder / "checkpoints").glob(".step-*.part")), chance.randint(1, 9))
        else:
            wait_for(child, lambda: [folder / "metrics.jsonl"], chance.randint(1, 8))
        time.sleep(chance.random() * 0.003)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        half_written += any((folder / "checkpoints").glob(".step-*.part"))
        print(f"life {number + 1} is over", file=sys.stderr, flush=True)
    status = os.waitpid(born(file), 0)[1]
    print(json.dumps({"kills": kills, "half_written": half_written, "status": status}))


if __name__ == "__main__":
    main()
