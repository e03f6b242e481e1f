"""`ditkit compare` from the command line, at a size of seconds."""

from __future__ import annotations

from pathlib import Path

FILE = """
budget: {reference: dit, steps: 9}
run:
  batch_size: 4
  data: {groups: [keycap, flag]}
  task_options: {process: flow, pixels: 8}
evaluation: {points: 1, pictures: 4, draws: 1, sampling_steps: 2}
models:
  - {name: dit, arch: dit, model: {patch_size: 4, hidden_size: 32, depth: 1, num_heads: 2}}
  - {name: lit, arch: lit, model: {patch_size: 4, hidden_size: 32, depth: 1, num_heads: 2}}
  - {name: broken, arch: dit, model: {hidden_size: 33}}
"""


def test_compare_writes_a_report(ditkit) -> None:
    Path("archs.yaml").write_text(FILE)
    result = ditkit("compare archs.yaml budget.steps=2")
    assert result.exit_code == 0, result.output
    written = ["runs/archs/report.html", "runs/archs/result.json"]
    assert result.stdout.splitlines()[-2:] == written
    assert all(Path(path).is_file() for path in written)
    assert "Held-out loss: " in result.stdout
    assert "failed: broken: " in result.stderr
    again = ditkit("compare archs.yaml budget.steps=2")
    assert again.exit_code == 2 and "--resume" in again.stderr


def test_wrong_use_is_told_before_any_work(ditkit) -> None:
    Path("archs.yaml").write_text(FILE)
    for arguments, told in (
        ("absent.yaml", "absent.yaml"),
        ("archs.yaml budget", "key=value"),
        ("archs.yaml equal=time", "equal"),
        ("archs.yaml dit.arch=dito", "dito"),
        ("archs.yaml budget.reference=broken", "cannot be built"),
    ):
        result = ditkit(f"compare {arguments}")
        assert result.exit_code == 2, result.output
        assert told in result.stderr
    assert not Path("runs").exists()
