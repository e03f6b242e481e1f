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
    """When they were changed last; what goes away in between is not there."""
    found = {}
    for path in paths:
        try:
            found[path] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return found


def wait_for(child: int, look: list[Path], pattern: str, changes: int) -> None:
    """Until files have changed so often, or one that fits the pattern came up."""
    folder = look[0].parent / "checkpoints"
    before = times([*look, *folder.glob(pattern)]) if pattern else times(look)
    while changes:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit("a life came to its end by itself: give the run more steps")
        now = times([*look, *folder.glob(pattern)]) if pattern else times(look)
        if now != before:
            changes, before = changes - 1, now
        time.sleep(0.0003)


def main() -> None:
    file, kills, chance = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
    folder = load(file).output / "tiny"
    left = 0
    for number in range(kills):
        child = born(file)
        if number % 2:
            wait_for(child, [folder / "none"], ".step-*.part", 1)
        else:
            wait_for(child, [folder / "metrics.jsonl"], "", chance.randint(1, 7))
        time.sleep(chance.random() * 0.003)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left += any((folder / "checkpoints").glob(".step-*.part"))
    status = os.waitpid(born(file), 0)[1]
    print(json.dumps({"kills": kills, "half_written": left, "status": status}))


if __name__ == "__main__":
    main()
