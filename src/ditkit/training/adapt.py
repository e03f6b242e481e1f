"""Train an adapter: the tasks that train networks, started from a pipeline whose own weights stay as they
are (`ditkit.training.tasks.adapted`).

`run_for` writes the run's settings for a pipeline and a data set, `adapt` runs them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditkit import registry
from ditkit.adapters import store
from ditkit.files import whole_file
from ditkit.training.config import AdapterConfig, RunConfig
from ditkit.training.continuing import run_on, train_into


def adapt(run: RunConfig, out: Path, resume: bool = False) -> Path:
    """Train an adapter into a folder: its two or three files, and the run under `run/`.

    Args:
        run: see `run_for`.
        out: for the adapter.
        resume: go on after a stop.

    Raises:
        FileExistsError, ConfigError, TrainingError: see `train_into`.
    """
    exported = train_into(run, out, store.CONFIG_NAME, resume)
    for file in sorted(exported.iterdir()):
        with whole_file(out / file.name) as part:
            shutil.copyfile(file, part)
    return out


def run_for(
    model: str,
    pipe: Any,
    adapter: AdapterConfig,
    data: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of a run that adapts a pipeline to pictures, as a training file has them.

    Args:
        model: a pipeline: bundled, a folder or a repository of the hub.
        pipe: the same, opened.
        adapter: what is trained.
        data: keys of the data section; the size is the pipeline's own where there is none.
        settings: other keys of the run.

    Raises:
        FileNotFoundError: no such data.
        ConfigError: a kind of pipeline that no task goes on from.
    """
    own = {
        "name": "adapter",
        "adapter": adapter.model_dump(),
        "optimizer": {"lr": registry.get("adapter", adapter.kind).target.learning_rate},
    }
    return run_on(model, pipe, data, {**own, **(settings or {})})
