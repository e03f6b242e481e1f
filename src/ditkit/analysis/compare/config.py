"""One YAML file per comparison of architectures: the runs' common keys, the models, and what is equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ditkit.data.config import Section
from ditkit.training.config import ConfigError, RunConfig, assign, explain, read

TASK = "class-to-image"
PLANNED = ("name", "task", "seed", "steps", "log_every", "heldout_every", "sample_every", "checkpoint_every")
"""Keys of a run that the comparison sets itself."""


class Budget(Section):
    """How long each run trains: one of `flops`, `steps`, or the FLOPs of `reference` over `steps`.

    Args:
        flops: of training, in each run (`equal: flops`).
        reference: name of a model whose FLOPs over `steps` steps are the budget (`equal: flops`).
        steps: optimizer steps, of the reference or (`equal: parameters`, `equal: steps`) of every run.
    """

    flops: float | None = Field(default=None, gt=0)
    reference: str | None = None
    steps: int | None = Field(default=None, ge=1)


class Evaluation(Section):
    """What is measured along a run.

    Args:
        points: times at which a run is measured, evenly spread; the last is its end.
        pictures: drawn at each, with classes as frequent as in the data.
        draws: noises over which the held-out loss is averaged.
        loss: which of the task's held-out losses is compared.
        seed: of all noise here; it is the same for every model and every seed of training.
        per_class: pictures of each class in the report's samples.
        sampling_steps: of drawing a picture.
    """

    points: int = Field(default=5, ge=1)
    pictures: int = Field(default=256, ge=2)
    draws: int = Field(default=4, ge=1)
    loss: str = "loss"
    seed: int = 0
    per_class: int = Field(default=2, ge=1)
    sampling_steps: int = Field(default=25, ge=1)


class Contender(Section):
    """A model of the comparison.

    Args:
        name: in the report and of its folder; letters, digits, `-`, `_` and `.`.
        arch: registered architecture, see `ditkit models`.
        model: its configuration.
        run: keys of the run that differ from the common ones, such as a learning rate of its own.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    arch: str
    model: dict[str, Any] = {}
    run: dict[str, Any] = {}


class CompareFile(Section):
    """A whole file.

    Args:
        output: folder of the runs and of the report.
        equal: what the runs have in common: training FLOPs; parameters and steps; or steps alone.
        tolerance: with `equal: parameters`, how far a model may be from the first one's number.
        run: keys of a class-to-image run, see `ditkit.training.config`.
    """

    output: Path
    equal: Literal["flops", "parameters", "steps"] = "flops"
    tolerance: float = Field(default=0.05, ge=0)
    budget: Budget
    seeds: list[int] = Field(default=[0], min_length=1)
    run: dict[str, Any] = {}
    evaluation: Evaluation = Evaluation()
    models: list[Contender] = Field(min_length=2)

    @model_validator(mode="after")
    def _fits_together(self) -> CompareFile:
        names = [model.name for model in self.models]
        for key, values in (("models: names", names), ("seeds", self.seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"{key} must differ, got {values}")
        given = {key for key, value in self.budget.model_dump().items() if value is not None}
        wanted = [{"flops"}, {"reference", "steps"}] if self.equal == "flops" else [{"steps"}]
        if given not in wanted:
            asked = " or ".join(" and ".join(sorted(keys)) for keys in wanted)
            raise ValueError(
                f"budget: equal: {self.equal} takes {asked}, got {', '.join(sorted(given)) or 'nothing'}"
            )
        if self.budget.reference is not None and self.budget.reference not in names:
            raise ValueError(f"budget.reference: no model {self.budget.reference!r} in {', '.join(names)}")
        for where, run in (("run", self.run), *((f"{m.name}.run", m.run) for m in self.models)):
            if planned := sorted(set(run) & set(PLANNED)):
                raise ValueError(f"{where}: the comparison sets {', '.join(planned)} itself")
        for model in self.models:
            self.training_run(model, self.seeds[0], 1)
        return self

    def training_run(self, model: Contender, seed: int, steps: int) -> RunConfig:
        """The run of one model under one seed.

        Raises:
            ValueError: a bad key; the message begins with the model's name.
        """
        every = -(-steps // self.evaluation.points)
        keys = _merged({"precision": "no", "tracker": None, "keep_checkpoints": 1}, self.run)
        keys = _merged(keys, model.run)
        options = {"preview_steps": self.evaluation.sampling_steps, **keys.get("task_options", {})}
        planned = {
            "name": f"{model.name}, seed {seed}",
            "task": TASK,
            "seed": seed,
            "steps": steps,
            "heldout_every": every,
            "checkpoint_every": every,
            # The seconds up to a point are known when a record falls on it.
            "log_every": max(n for n in range(1, 26) if every % n == 0),
            "task_options": {**options, "arch": model.arch, "model": model.model},
        }
        try:
            return RunConfig.model_validate({**keys, **planned})
        except ValidationError as error:
            raise ValueError(f"{model.name}: run.{explain(error)}") from error


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> CompareFile:
    """Read and validate a comparison's file.

    Args:
        path: a YAML file with the keys of `CompareFile`.
        overrides: `key.path=value`, the value read as YAML; `dit.model.depth=6` reaches into the model of
            that name.

    Raises:
        FileNotFoundError: the file is not there.
        ConfigError: names each bad key and what was seen.
    """
    path = Path(path)
    raw = {"output": f"runs/{path.stem}", **read(path, "comparison file")}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {text!r} is not of the form key=value")
        parts, node = key.strip().split("."), raw
        if parts[0] not in CompareFile.model_fields:
            named = {m.get("name"): m for m in raw.get("models") or () if isinstance(m, dict)}
            if parts[0] not in named or len(parts) == 1:
                known = ", ".join([*CompareFile.model_fields, *(f"{name}.…" for name in named)])
                raise ConfigError(f"override {text!r}: begin with one of {known}")
            node, parts = named[parts[0]], parts[1:]
        assign(node, parts, value, text)
    try:
        return CompareFile.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from error


def _merged(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`common` with `changes`, mapping by mapping."""
    merged = dict(common)
    for key, value in changes.items():
        there = merged.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            value = _merged(there, value)
        merged[key] = value
    return merged
