"""What changes the loss of a training run: one file a system, chosen by name in the file's `objective:`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ditkit import registry
from ditkit.data.config import Section
from ditkit.training.objectives.base import Objective, Setting, Term, TrainingStep
from ditkit.training.objectives.combined import Objectives


def read_options(chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Section]:
    """The validated options of each objective of a training file.

    Raises:
        ValueError: an unknown objective or key, with the near ones, or a value that it does not take.
    """
    read: dict[str, Section] = {}
    for name, options in chosen.items():
        try:
            kind: type[Objective] = registry.get("objective", str(name)).target  # type: ignore[assignment]
            read[name] = kind.Options.model_validate(options)
        except registry.UnknownNameError as error:
            raise ValueError(str(error)) from error
        except ValidationError as error:
            raise ValueError("; ".join(_explain(name, kind, e) for e in error.errors())) from error
    return read


def _explain(name: str, kind: type[Objective], error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = list(kind.Options.model_fields)
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        return f"{name}.{key}: no such key; {'it has ' + ', '.join(near) if near else 'it has none'}"
    if error["type"] == "missing":
        return f"{name}.{key}: needed"
    return f"{name}{'.' if key else ''}{key}: {error['msg']} (got {error['input']!r})"


def create(chosen: Mapping[str, Mapping[str, Any]], setting: Setting) -> Objectives:
    """The objectives of a run.

    Args:
        chosen: names and options; their order does not matter.
        setting: what they are built for.

    Raises:
        ValueError: an unknown name or key, one that the model or the process does not allow, or two that
            exclude each other; the message begins with the objective's name.
    """
    made: dict[str, Objective] = {}
    for name, options in sorted(read_options(chosen).items()):
        kind: type[Objective] = registry.get("objective", name).target  # type: ignore[assignment]
        try:
            if not (setting.labels or kind.without_labels):
                raise ValueError("it is for networks of classes, and the conditions here are texts")
            made[name] = kind(options, setting)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: {error}") from error
    return Objectives(made)


__all__ = ["Objective", "Objectives", "Setting", "Term", "TrainingStep", "create", "read_options"]
