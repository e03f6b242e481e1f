"""What changes the loss of a training run: one file a system, chosen by name in the file's `objective:`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditkit import registry
from ditkit.training.chosen import read_options
from ditkit.training.objectives.base import Objective, Setting, Term, TrainingStep
from ditkit.training.objectives.combined import Objectives


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


__all__ = ["Objective", "Objectives", "Setting", "Term", "TrainingStep", "create"]
