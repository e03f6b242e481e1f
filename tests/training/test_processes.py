"""Two processes at the same whole batch are one: copies (DDP) and shared-out parameters (FSDP2), on a CPU.

Losses and weights agree to 1e-6 over twenty steps: the halves of a batch are summed apart, and a norm over
parts is summed in another order, so a gradient differs in its last bits.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ditkit.training import checkpoint as ckpt
from ditkit.training.sharding import part_like, whole
from ditkit.training.trainer import train
from training.conftest import TINY_DIT
from training_recipes import changes, records, weights

STEPS, HALF = 20, 10
CHANGES = {"steps": STEPS, "checkpoint_every": HALF, "keep_checkpoints": 9, "heldout_every": HALF}
LAUNCH = {
    "copies": [sys.executable, "-m", "torch.distributed.run"],
    "shared-out": [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp"],
}
COUNT = {"copies": "--nproc_per_node=2", "shared-out": "--num_processes=2"}
ways = pytest.mark.parametrize("way", LAUNCH)


def launched(way: str, port: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`ditkit train` in two processes."""
    command = [*LAUNCH[way], COUNT[way], f"--{'master' if way == 'copies' else 'main_process'}_port={port}"]
    return subprocess.run(
        [*command, "-m", "ditkit", "train", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def launch(way: str, port: int, *arguments: object) -> None:
    """The same, which succeeds."""
    done = launched(way, port, *arguments)
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


@pytest.mark.slow
def test_objectives_on_shared_out_parameters(tmp_path, teacher):
    """Those with parameters, readings and networks of their own; what needs the whole average says so."""
    stages = []
    for name in ("both", "switch-prior", "distillation", "haste", "sra"):
        stages.append({**TINY_DIT, "steps": 3, "name": name, **changes(name, teacher)})
    convolutions = {
        "arch": "dico",
        "process": "flow",
        "pixels": 8,
        "model": {"hidden_size": 8, "depth": [1] * 5},
    }
    stages.insert(0, {**TINY_DIT, "steps": 3, "name": "channels-last", "task_options": convolutions})
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "one"), "stages": stages[:-1]}))
    train(path)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "two"), "stages": stages}))
    done = launched("shared-out", 29520, path)
    assert done.returncode and "no process has whole: launch without --use_fsdp" in done.stderr
    for stage in stages[:-1]:
        logged = [tmp_path / output / stage["name"] / "metrics.jsonl" for output in ("one", "two")]
        one, two = ([json.loads(line) for line in file.read_text().splitlines()] for file in logged)
        assert len(one) == len(two) == 3
        for first, second in zip(one, two, strict=True):
            kept = set(first) - {"seconds_per_step"}
            assert all(abs(first[k] - second[k]) <= 1e-5 * max(1, abs(first[k])) for k in kept), stage["name"]


def test_whole_tensors_stay_as_they_are():
    tensor = torch.arange(6.0)
    assert whole(tensor) is tensor and part_like(tensor, torch.zeros(6)) is tensor
