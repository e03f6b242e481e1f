"""The options of the objectives that a training file chooses, read before any is built.

A module of its own: a file is validated here, and objectives are built for a run that was read from a file.
The registry finds the objectives' files when there are any to read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ditkit import registry
from ditkit.data.config import Section


def read_options(chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Section]:
    """The validated options of each objective of a training file.

    Raises:
        ValueError: an unknown objective or key, with the near ones, or a value that it does not take.
    """
    read: dict[str, Section] = {}
    for name, options in chosen.items():
        try:
            kind: Any = registry.get("objective", str(name)).target
            read[name] = kind.Options.model_validate(options)
        except registry.UnknownNameError as error:
            raise ValueError(str(error)) from error
        except ValidationError as error:
            raise ValueError("; ".join(_explain(name, kind, e) for e in error.errors())) from error
    return read


def _explain(name: str, kind: Any, error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = list(kind.Options.model_fields)
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        return f"{name}.{key}: no such key; {'it has ' + ', '.join(near) if near else 'it has none'}"
    if error["type"] == "missing":
        return f"{name}.{key}: needed"
    return f"{name}{'.' if key else ''}{key}: {error['msg']} (got {error['input']!r})"
