"""SIGKILLs at random moments, half of them while a checkpoint is written, cost nothing but time.

`DITKIT_KILLS=30` sets how many; twenty otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditkit.training.trainer import train
from training_recipes import records, weights

KILLS = int(os.environ.get("DITKIT_KILLS", "20"))


@pytest.mark.slow
def test_kills_end_in_the_same_weights(training_file, tmp_path):
    run = {"steps": 8 * KILLS, "checkpoint_every": 3, "heldout_every": 50}
    train(training_file("whole", **run))
    command = [sys.executable, Path(__file__).with_name("lives.py"), training_file("killed", **run), KILLS, 7]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] == KILLS and told["status"] == 0
    assert told["half_written"] >= KILLS // 4, told  # else they did not hit the writing
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
