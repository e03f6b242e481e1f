"""What a run leaves in its folder, and that it goes on from nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import ditkit
from ditkit.training import provenance
from ditkit.training.config import ConfigError, load_run
from ditkit.training.trainer import train
from training_recipes import interrupted, records, weights


def test_the_folder_says_what_made_it(training_file, tmp_path, monkeypatch):
    path = training_file()
    interrupted(path, monkeypatch, at=4)
    folder = tmp_path / "run" / "tiny"
    starts = json.loads((folder / "run.json").read_text())
    assert [start["from_step"] for start in starts] == [0, 4]
    assert starts[0]["libraries"]["torch"] == torch.__version__
    assert starts[0]["ditkit"] == ditkit.__version__ and starts[0]["processes"] == 1
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 6


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_revision_is_that_of_the_repository_that_keeps_the_code(tmp_path):
    code = tmp_path / "package" / "code.py"
    code.parent.mkdir()
    code.write_text("x = 1\n")
    assert provenance.revision(code) is None
    git(tmp_path, "init", "-q")
    assert provenance.revision(code) is None  # lies in one, and is not kept by it: an installed package
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    assert provenance.revision(code) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    code.write_text("x = 2\n")
    found = provenance.revision(code)
    assert found is not None and found["dirty"]


def test_the_folder_is_enough_to_go_on(training_file, tmp_path):
    """Moved, without the file it was begun with, overrides kept."""
    train(training_file("whole"), ["seed=5"])
    path = training_file("begun", steps=6)
    train(path, ["seed=5"])
    path.unlink()
    begun, moved = tmp_path / "begun", tmp_path / "elsewhere"
    shutil.rmtree(begun / "tiny" / "export")
    shutil.rmtree(begun / "tiny" / "checkpoints" / "step-00000006")
    begun.rename(moved)
    command = [sys.executable, "-m", "ditkit", "train", "--resume", str(moved)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(moved / "tiny" / "export") and not begun.exists()
    assert "continues after step 4" in done.stderr
    assert records(moved) == records(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(moved)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_that_is_no_run(tmp_path):
    for resume in (True, False):
        with pytest.raises(ConfigError, match=r"is a folder: .*--resume.*training\.yaml"):
            load_run(tmp_path, (), resume)
