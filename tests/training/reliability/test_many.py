"""A hundred thousand pictures are listed in little memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COUNT = 100_000
LIST = """
import sys
from pathlib import Path
from ditkit.data.config import DataConfig
from ditkit.data.pictures import open_records

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

before = resident()
records = open_records(DataConfig(kind="folder", path=sys.argv[1]))
print(len(records), len(records.of("heldout")), resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="resident memory is read from Linux's /proc"
)
def test_a_listing_of_100000_pictures_stays_small(tmp_path):
    for group in range(100):
        folder = tmp_path / f"group {group:02d}"
        folder.mkdir()
        for number in range(COUNT // 100):
            (folder / f"picture of something {number:05d}.png").touch()
    done = subprocess.run(
        [sys.executable, "-c", LIST, str(tmp_path)], capture_output=True, text=True, check=True
    )
    count, heldout, growth = done.stdout.split()
    assert int(count) == COUNT and 0.04 * COUNT < int(heldout) < 0.06 * COUNT
    assert float(growth) < 200, f"{growth} MiB"
