"""What a fit leaves behind: a folder with `config.json` and `weights.safetensors`, bound to a method and a
model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import torch as files
from torch import Tensor, nn

from ditkit.files import whole_file, write_text
from ditkit.seams.anatomy import describe
from ditkit.seams.attention import attention_modules
from ditkit.seams.errors import SeamError
from ditkit.seams.weights import heads_of

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"


class ArtifactError(ValueError):
    """A folder that is no fit of this method, or a damaged one."""


@dataclass(frozen=True)
class Artifact:
    """What was learned.

    Args:
        folder: where it lies.
        method: registered name of the method.
        options: of the method, those it was fitted with; JSON values.
        model: what `model_facts` said of the model it was fitted on, and more where the method needs it.
        tensors: by name, on the CPU.
    """

    folder: Path
    method: str
    options: dict[str, Any]
    model: dict[str, Any]
    tensors: dict[str, Tensor]

    def check(self, model: nn.Module) -> None:
        """Make sure that it belongs to a model of this kind.

        Raises:
            SeamError: it does not; the message has both sides.
        """
        here = model_facts(model)
        unlike = [f"{name} is {self.model[name]!r} there, {here[name]!r} here"
                  for name in here if name in self.model and self.model[name] != here[name]]  # fmt: skip
        if unlike:
            raise SeamError(
                f"{self.folder} was fitted on another model than this {type(model).__name__}: "
                f"{'; '.join(unlike)}. Fit this model with `ditkit fit {self.method}`"
            )


def save(
    folder: str | Path,
    method: str,
    options: Mapping[str, Any],
    model: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Write a fit; a reader finds the old one, or the new one, or an error, never a mixture.

    Args:
        folder: made when it is not there.
        options: of the method, JSON values.
        model: `model_facts` and, where the method needs them, more facts that must match.
    """
    folder = Path(folder)
    with whole_file(folder / WEIGHTS) as part:
        files.save_file({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}, part)
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
    config = {"method": method, "options": dict(options), "model": dict(model), "sha256": digest}
    write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    return folder


def load(folder: str | Path, method: str) -> Artifact:
    """Read a fit of a method.

    Raises:
        FileNotFoundError: no such folder, or no fit in it.
        ArtifactError: a fit of another method, or files that do not belong together.
    """
    folder = Path(folder)
    found = facts(folder, method)
    try:
        content = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder} is damaged: {error}. Fit again") from error
    if hashlib.sha256(content).hexdigest() != found["sha256"]:
        raise ArtifactError(f"{folder}: {WEIGHTS} is not the file that {CONFIG} names. Fit again")
    return Artifact(folder, method, found["options"], found["model"], files.load(content))


def facts(folder: str | Path, method: str) -> dict[str, Any]:
    """The `config.json` of a fit, without its tensors.

    Raises:
        FileNotFoundError: no such folder, or no fit in it.
        ArtifactError: a fit of another method, or a damaged file.
    """
    folder = Path(folder)
    config = folder / CONFIG
    if not config.is_file():
        unfinished = (folder / ".progress").exists()
        hint = "its fit is not finished: run the same `ditkit fit` again" if unfinished else "no config.json"
        raise FileNotFoundError(f"{folder} holds no fit of {method}: {hint}")
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        if found["method"] != method:
            raise ArtifactError(f"{folder} is a fit of {found['method']}, not of {method}")
        return {name: found[name] for name in ("method", "options", "model", "sha256")}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{folder} is damaged: {type(error).__name__}: {error}. Fit again") from error


T = TypeVar("T")


def fitted(method: T, options: Mapping[str, Any]) -> T:
    """The method with the options it was fitted with, wherever its own are at their defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(method)}  # pyright: ignore[reportArgumentType]
    changes = {
        name: value
        for name, value in options.items()
        if name in defaults and getattr(method, name) == defaults[name]
    }
    return dataclasses.replace(method, **changes)  # pyright: ignore[reportArgumentType]


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What must be equal for a fit to serve a model: class, blocks, attention modules, width and heads.

    Raises:
        UnsupportedModelError: the anatomy does not know the class.
    """
    blocks = describe(model).blocks(model)
    modules = [module for _, kind, module in attention_modules(model) if kind != "cross"]
    return {
        "class": type(model).__name__,
        "blocks": len(blocks),
        "attention": len(modules),
        "width": sorted({_width(module) for module in modules}),
        "heads": sorted({_heads(module) for module in modules}),
    }


def _heads(module: nn.Module) -> int:
    try:
        return heads_of(module)[0]
    except SeamError:
        return 0


def _width(module: nn.Module) -> int:
    """What the first projection reads."""
    first = next((part for part in module.modules() if isinstance(part, nn.Linear)), None)
    return 0 if first is None else first.in_features
