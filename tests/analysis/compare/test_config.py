"""The file of a comparison: what is refused, and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from comparisons import TINY, written
from ditkit.analysis.compare.config import load
from ditkit.training.config import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgett": {}}, "budgett: no such key"),
        ({"budget": {"flops": 1.0, "steps": 3}}, "takes flops or reference and steps, got flops, steps"),
        ({"equal": "steps"}, "equal: steps takes steps, got reference, steps"),
        ({"budget": {"reference": "lti", "steps": 3}}, "no model 'lti' in dit, lit"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"models": TINY["models"][:1]}, "models"),
        ({"models": [TINY["models"][0]] * 2}, "names must differ"),
        ({"models": [{"name": "../up", "arch": "dit"}, TINY["models"][0]]}, "models.0.name"),
        ({"run": {"seed": 3}}, "the comparison sets seed itself"),
        ({"run": {"batchsize": 3}}, "dit: run.batchsize: no such key"),
        ({"run": {"optimizer": {"lr": -1}}}, r"run.optimizer.lr: .*\(got -1\)"),
        ({"evaluation": {"points": 0}}, "evaluation.points"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, **changes))


def test_overrides(tmp_path: Path) -> None:
    file = load(written(tmp_path), ["seeds=[4]", "lit.model.depth=3", "evaluation.points=1", "tolerance=1"])
    assert file.seeds == [4] and file.models[1].model["depth"] == 3 and file.tolerance == 1
    with pytest.raises(ConfigError, match="begin with one of"):
        load(written(tmp_path), ["lti.model.depth=3"])
