"""No module of the training imports, over however many others, itself: each can be read before its users."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ditkit

SOURCE = Path(ditkit.__file__).parent


def modules() -> dict[str, Path]:
    """Every module of the package but the package itself, by name."""
    names = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    del names[SOURCE.name]  # it names its public parts, which are imported when they are asked for
    return names


def imported(code: str) -> Iterator[str]:
    """What is imported anywhere in a file, inside functions too."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def needs(known: dict[str, Path]) -> dict[str, set[str]]:
    """For each module, those of the package that it imports."""
    return {name: ({*imported(file.read_text())} & set(known)) - {name} for name, file in known.items()}


def test_training_has_no_circle():
    graph = {
        name: {other for other in others if other.startswith("ditkit.training.")}
        for name, others in needs(modules()).items()
        if name.startswith("ditkit.training.")
    }
    assert len(graph) > 30
    graphlib.TopologicalSorter(graph).prepare()


def test_a_circle_is_found():
    graph = {"a": {*imported("def f():\n    from b import c")}, "b": {*imported("import a")}}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()
