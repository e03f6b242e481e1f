"""Two processes at the same whole batch are one: copies (DDP) and shared-out parameters (FSDP2), on a CPU.

Losses and weights agree to 1e-6 over twenty steps: the halves of a batch are summed apart, and a norm over
parts is summed in another order, so a gradient differs in its last bits.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditkit.training import checkpoint as ckpt
from ditkit.training.sharding import part_like, whole
from ditkit.training.trainer import train
from training_recipes import records, weights

STEPS, HALF = 20, 10
CHANGES = {"steps": STEPS, "checkpoint_every": HALF, "keep_checkpoints": 9, "heldout_every": HALF}
LAUNCH = {
    "copies": [sys.executable, "-m", "torch.distributed.run"],
    "shared-out": [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp"],
}
COUNT = {"copies": "--nproc_per_node=2", "shared-out": "--num_processes=2"}
ways = pytest.mark.parametrize("way", LAUNCH)


def launch(way: str, port: int, *arguments: object) -> None:
    """`ditkit train` in two processes."""
    command = [*LAUNCH[way], COUNT[way], f"--{'master' if way == 'copies' else 'main_process'}_port={port}"]
    done = subprocess.run(
        [*command, "-m", "ditkit", "train", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def alike(one: Path, other: Path) -> None:
    """Both runs logged the same losses and exported the same weights."""
    for first, second in zip(records(one), records(other), strict=True):
        assert set(first) == set(second)
        assert all(abs(first[name] - second[name]) <= 1e-6 * max(1, abs(first[name])) for name in first)
    close(weights(one), weights(other))


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


def stopped_half_way(folder: Path, to: Path) -> None:
    """A copy of a run as it was when it had saved its first half."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / "tiny" / "export")
    shutil.rmtree(to / "tiny" / "checkpoints" / f"step-{STEPS:08d}")


@pytest.mark.slow
@ways
def test_two_processes_equal_one(way, training_file, tmp_path):
    """From the start to the end; and each goes on with what the other saved."""
    port = 29512 if way == "copies" else 29514
    train(training_file("one", **CHANGES))
    launch(way, port, training_file("two", accumulation=2, **CHANGES))
    alike(tmp_path / "one", tmp_path / "two")
    saved = [ckpt.newest(tmp_path / name / "tiny" / "checkpoints") for name in ("one", "two")]
    assert saved[0] is not None and saved[1] is not None
    assert set(saved[0].tensors) == set(saved[1].tensors)
    for part in ("model", "ema", "optimizer-0"):
        close(saved[0].tensors[part], saved[1].tensors[part])  # whole tensors, in both
    stopped_half_way(tmp_path / "one", tmp_path / "then_two")
    launch(way, port + 1, training_file("then_two", **CHANGES), "--resume")
    stopped_half_way(tmp_path / "two", tmp_path / "then_one")
    train(training_file("then_one", **CHANGES), resume=True)
    alike(tmp_path / "one", tmp_path / "then_two")
    alike(tmp_path / "one", tmp_path / "then_one")


def test_whole_tensors_stay_as_they_are():
    tensor = torch.arange(6.0)
    assert whole(tensor) is tensor and part_like(tensor, torch.zeros(6)) is tensor
