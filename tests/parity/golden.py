"""Golden tensors: files written by running the authors' own code; see the README of each golden folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ditkit.models.layouts import LAYOUTS

_TESTS = Path(__file__).resolve().parents[1]


def _folders(system: str) -> list[Path]:
    """Where the system's files may lie, the first to win."""
    chosen = os.environ.get("DITKIT_GOLDEN")
    if chosen:
        return [Path(chosen) / system]
    return [_TESTS / "golden" / system, _TESTS.parents[1] / "shared" / "golden" / system]


def cases(system: str) -> list[Any]:
    """One `pytest.param(path)` for every golden file of a system, each file name once.

    With `DITKIT_GOLDEN` set only `$DITKIT_GOLDEN/<system>/` is read; otherwise the files shipped in
    `tests/golden` and those of the shared folder beside the repository, where there is one.
    """
    found: dict[str, Path] = {}
    for folder in _folders(system):
        for path in sorted(folder.glob("*.safetensors")):
            found.setdefault(path.name, path)
    return [pytest.param(path, id=path.stem) for path in found.values()]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The case of a golden file, from its metadata, and all its tensors by name."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "case" not in metadata:
            raise ValueError(f"{path}: no `case` in its metadata, which has {sorted(metadata)}")
        return json.loads(metadata["case"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `name.`, without it."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def load(architecture: str, model: Any, weights: dict[str, Tensor]) -> Any:
    """The model in eval mode with the authors' weights, renamed as `ditkit convert` renames them."""
    model.load_state_dict(LAYOUTS[architecture].rename(weights))
    return model.eval().requires_grad_(False)


@contextmanager
def record(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the named modules in a forward; a name that is no module's is left out."""
    modules, seen = dict(model.named_modules()), {}

    def keep(name: str) -> Any:
        return lambda module, arguments, output: seen.__setitem__(name, output.clone())

    hooks = [modules[name].register_forward_hook(keep(name)) for name in names if name in modules]
    yield seen
    for hook in hooks:
        hook.remove()


def compare(computed: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    """Every expected output within `atol`; relative to its size where that is above 1, for float32."""
    assert expected
    assert not set(expected) - set(computed), f"not interpreted: {sorted(set(expected) - set(computed))}"
    for name, value in expected.items():
        actual = computed[name].detach().to(value.dtype)
        bound = atol * max(1.0, value.abs().max().item()) if value.is_floating_point() else 0.0
        torch.testing.assert_close(actual, value, atol=bound, rtol=0.0, msg=lambda m, n=name: f"{n}: {m}")
