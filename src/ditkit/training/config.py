"""One YAML file per training run, validated: what a run is made of, with errors that name the key.

A file holds one run, or `stages:` with several that run one after the other (an autoencoder before the
transformer that works in its latents). `a.b=value` on the command line overrides a key; `stages.1.steps=100`
reaches into a stage by its number, `transformer.steps=100` by its name; a key that one stage alone has
(`objective.haste.stop_at=0.3`) needs neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ditkit.data.config import DataConfig, Section
from ditkit.files import write_text
from ditkit.training.chosen import read_options

ODD = (ValueError, RecursionError)
"""What PyYAML raises beside its own errors: for other bytes than UTF-8, a 13th month, a thousand brackets."""

KEPT = "training.yaml"

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class ConfigError(ValueError):
    """A training file that can't be used; the message names the key and what was seen."""


class OptimizerConfig(Section):
    """`skip_grad_norm`: a step whose gradient is longer, or not finite, is not taken (not with fp16, which
    skips by itself)."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad_norm: float | None = Field(default=None, gt=0)
    skip_grad_norm: float | None = Field(default=None, gt=0)


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then constant, cosine, or constant with a linear end.

    `decay_steps` is the length of the linear end of `constant` (0: none); all end at `final_factor` x lr.
    """

    kind: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    final_factor: float = Field(default=0.0, ge=0, le=1)


class EMAConfig(Section):
    decay: float = Field(default=0.999, gt=0, lt=1)
    warmup: bool = True


class EvaluationConfig(Section):
    """Pictures drawn during the training against the data's, see `ditkit.training.evaluation`.

    Args:
        every: steps; also at the end.
        pictures: drawn each time, with classes as frequent as in the data.
        steps: of drawing one; None: the task's `preview_steps`.
        teacher: a vision transformer whose features count: a stage, a folder, or `owner/name` of the hub;
            None: hand-made ones.
        neighbours: k of precision and recall.
        inception: file or folder of the Inception network's weights, for FID and inception score.
        data: the pictures that cached latents came from, on which alone the run is trained otherwise.
    """

    every: int = Field(ge=1)
    pictures: int = Field(default=256, ge=2)
    steps: int | None = Field(default=None, ge=1)
    teacher: str | None = None
    neighbours: int = Field(default=3, ge=1)
    inception: Path | None = None
    data: DataConfig | None = None

    @model_validator(mode="after")
    def _enough(self) -> EvaluationConfig:
        if self.pictures <= self.neighbours:
            raise ValueError(f"pictures={self.pictures}: more than neighbours={self.neighbours} are needed")
        return self


class AdapterConfig(Section):
    """An adapter to be trained in place of the network, which `task_options.start_from` names.

    Args:
        kind: one of `ditkit adapters`.
        options: its own.
        layers: names of layers, or their endings; None: those of every block.
    """

    kind: str
    options: dict[str, Any] = {}
    layers: list[str] | None = None


class RunConfig(Section):
    """One run of the trainer.

    `task` names what is trained; `task_options` are its own keys. `objective` are changes to its loss: names
    (`ditkit objectives`) and their options, in any order. With an `adapter`, that alone is trained and
    exported. `compile`: true, or a mode of `torch.compile`.
    """

    name: str
    task: str
    task_options: dict[str, Any] = {}
    seed: int = 0
    steps: int = Field(ge=1)
    batch_size: int = Field(default=64, ge=1, description="over all processes and accumulation steps")
    accumulation: int = Field(default=1, ge=1)
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = Field(default=False, description="compute blocks again for the backward")
    compile: CompileMode | None = None
    data: DataConfig = DataConfig()
    objective: dict[str, dict[str, Any]] = {}
    adapter: AdapterConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EMAConfig | None = EMAConfig()
    log_every: int = Field(default=20, ge=1)
    sample_every: int = Field(default=0, ge=0, description="0: never")
    checkpoint_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    heldout_every: int = Field(default=0, ge=0, description="0: never")
    evaluation: EvaluationConfig | None = None
    tracker: str | None = "tensorboard"

    @field_validator("objective", mode="before")
    @classmethod
    def _known_objectives(cls, chosen: Any) -> Any:
        if not isinstance(chosen, dict) or not chosen:
            return chosen
        chosen = {name: {} if options is None else options for name, options in chosen.items()}
        read_options(chosen)
        return chosen

    @field_validator("precision", mode="before")
    @classmethod
    def _no_of_yaml(cls, chosen: Any) -> Any:
        return "no" if chosen is False else chosen  # YAML reads an unquoted `no` as false

    @field_validator("compile", mode="before")
    @classmethod
    def _yes_or_no(cls, chosen: Any) -> Any:
        return {True: "default", False: None}.get(chosen, chosen) if isinstance(chosen, bool) else chosen

    @model_validator(mode="after")
    def _divisible(self) -> RunConfig:
        if self.optimizer.skip_grad_norm and self.precision == "fp16":
            raise ValueError("optimizer.skip_grad_norm: fp16 skips steps by itself; leave one of them out")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}"
            )
        return self


class TrainingFile(Section):
    """A whole file: where it writes, and its stages in order."""

    output: Path
    stages: list[RunConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique_names(self) -> TrainingFile:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ, got {names}")
        return self


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainingFile:
    """Read and validate a training file.

    Args:
        path: a YAML file: either `output:` and `stages:`, or `output:` and the keys of one run.
        overrides: `key.path=value`, the value read as YAML.

    Raises:
        FileNotFoundError: the file is not there.
        ConfigError: names each bad key and what was seen.
    """
    path = Path(path)
    raw = read(path, "training file")
    if "stages" not in raw:
        output = raw.pop("output", None)
        raw = {"output": output or f"runs/{raw.get('name', path.stem)}", "stages": [raw]}
    for override in overrides:
        _override(raw, override)
    try:
        return TrainingFile.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from error


def load_run(path: str | Path, overrides: list[str] | tuple[str, ...], resume: bool) -> TrainingFile:
    """A training file, or, to go on, what a run's output folder keeps of it; the folder may have been moved.

    Raises:
        FileNotFoundError, ConfigError: see `load`; a folder that keeps no run, or one without `resume`.
    """
    path = Path(path)
    if not path.is_dir():
        return load(path, overrides)
    if not resume or not (path / KEPT).is_file():
        raise ConfigError(
            f"{path} is a folder: name a training file, or, with --resume, the output folder of a run (which "
            f"has a {KEPT})"
        )
    return load(path / KEPT, overrides).model_copy(update={"output": path})


def keep(file: TrainingFile) -> None:
    """Write a training file, overrides and all, into its output folder."""
    write_text(file.output / KEPT, yaml.safe_dump(file.model_dump(mode="json"), sort_keys=False))


def read(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a YAML file; `what` it is, for messages.

    Raises:
        FileNotFoundError: the file is not there.
        ConfigError: it is no YAML, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, *ODD) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(raw).__name__}")
    return raw


def explain(error: ValidationError) -> str:
    """Every bad key, what is wrong with it and what was seen, in one line."""
    return "; ".join(map(_explain, error.errors()))


def _explain(error: Any) -> str:
    where = ".".join(map(str, error["loc"])) or "file"
    if error["type"] == "value_error":  # our own words, which say what was seen
        return f"{where}: {error['ctx']['error']}"
    seen = "" if error["type"] in ("missing", "extra_forbidden") else f" (got {error['input']!r})"
    if error["type"] == "extra_forbidden":
        return f"{where}: no such key"
    return f"{where}: {error['msg']}{seen}"


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form key=value")
    parts = key.strip().split(".")
    node: Any = raw
    if parts[0] != "stages" and parts[0] not in raw:
        named = {s.get("name"): s for s in raw["stages"] if isinstance(s, dict)}
        if parts[0] in named:
            node, parts = named[parts[0]], parts[1:]
        elif len(raw["stages"]) == 1:
            node = raw["stages"][0]
        elif len(owners := [stage for stage in named.values() if parts[0] in stage]) == 1:
            node = owners[0]
        else:
            raise ConfigError(
                f"override {text!r}: begin with a stage name ({', '.join(map(str, named))}) or output"
            )
    if not parts:
        raise ConfigError(f"override {text!r} names a stage, not a key in it")
    assign(node, parts, value, text)


def assign(node: Any, parts: list[str], value: str, text: str) -> None:
    """Set a key deep in a file's mappings and lists.

    Args:
        node: where `parts` begin.
        parts: keys, and numbers of list items.
        value: read as YAML.
        text: the whole override, for messages.

    Raises:
        ConfigError: there is no such place, or the value is no YAML.
    """
    *path, last = parts
    for part in path:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"override {text!r}: {part!r} is not one of the {len(node)} items' numbers")
            node = node[int(part)]
        else:
            node[part] = {} if node.get(part) is None else node[part]  # `min-snr:` alone is an empty section
            node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {text!r}: {part!r} holds a value, not keys")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, *ODD) as error:
        raise ConfigError(f"override {text!r}: {error}") from error
    if not isinstance(node, dict):
        raise ConfigError(f"override {text!r}: name a key of the item too")
    node[last] = parsed
