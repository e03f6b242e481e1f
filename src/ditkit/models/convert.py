"""Checkpoints in the authors' layout to diffusers folders.

Nothing is written before every key is known to fit. How files are read: `weight_files`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ditkit import registry
from ditkit.files import whole_file
from ditkit.models import load, split
from ditkit.models.layouts import LAYOUTS, Layout, origin, way_from
from ditkit.models.weight_files import ConversionError, listed, read_weights

INDEX = "model_index.json"
Progress = Callable[[str, int, int], None]
"""`(stage, bytes done, bytes in all)`; the stages are "read" and "write"."""


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Args:
        output: the folder written.
        architecture: its registered name, with the variant where the dimensions are a named one's.
        weights: which set was taken: "ema", "model", or "only" when the file holds one set.
        config: the model's configuration.
        parameters: their number.
        bytes: size of the weights.
        notes: what had to be assumed, in plain words.
    """

    output: Path
    architecture: str
    weights: Literal["ema", "model", "only"]
    config: dict[str, Any]
    parameters: int
    bytes: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output), "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [
            f"{self.architecture}: {self.parameters:,} parameters ({self.bytes / 1e6:,.1f} MB, "
            f"weights: {self.weights}) in {self.output}"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def convert(
    source: str | Path,
    arch: str | None,
    output: str | Path,
    weights: Literal["ema", "model"] = "ema",
    *,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write the diffusers folder (config.json and safetensors) of an authors' checkpoint.

    Args:
        source: a `.pt` or `.pth` file (a state dict, or the training script's {"model", "ema", ...}) or a
            `.safetensors` file.
        arch: an architecture, alone or with a variant ("dit-xl/2"). None: what the file's own options say,
            else "dit" (a SiT has the same keys). What the name leaves open is read from the shapes.
        output: a folder that does not exist yet, or is empty.
        weights: which set of a training checkpoint to take.
        config: settings that neither the name nor the shapes tell, e.g. {"num_heads": 8}; they win.
        progress: called as bytes are read and written.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there is no such source.
        FileExistsError: the output is there already.
        UnknownNameError: an architecture that does not exist.
        ConversionError: an unsafe, damaged or foreign file; a set of weights it lacks; missing, unexpected
            and mis-shaped keys, listed; a dimension that can't be told.
    """
    source, output = Path(source), Path(output)
    if weights not in ("ema", "model"):
        raise ConversionError(f"weights={weights!r} is not 'ema' or 'model'")
    if not source.is_file():
        raise FileNotFoundError(f"no checkpoint file at {source}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already; remove it or choose another output folder")
    family, variant = _architecture(arch)
    state, options, taken = read_weights(source, weights)
    notes = []
    if family is None:
        family, variant = _from_options(options)
        if family is None:
            family = "dit"
            notes.append(
                "nothing in the file tells a DiT from a SiT; a DiT was assumed (name the architecture)"
            )
    layout = LAYOUTS[family]
    assert layout.infer is not None  # `_architecture` has looked
    settings = {
        **layout.infer(state, {**options, **(config or {})}),
        **(layout.variants[variant] if variant else {}),
        **(config or {}),
    }
    _complete(layout, settings, state, notes)
    model = _fill(family, settings, layout.rename(_copy(state, progress)))
    _write(model, output, progress)
    size = sum(value.nbytes for value in model.state_dict().values())
    return Conversion(
        output=output,
        architecture="-".join(filter(None, (family, _named(layout, settings)))),
        weights=taken,
        config={name: value for name, value in model.config.items() if not name.startswith("_")},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=size,
        notes=tuple(notes),
    )


def inherit(
    source: str | Path,
    arch: str,
    output: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write a model of another architecture that starts from the weights of a trained one.

    Args:
        source: a folder written by `save_pretrained` or `convert`; of a pipeline, the output is one too.
        arch: the new architecture, such as "lit"; its sizes are the old model's.
        output: a folder that does not exist yet, or is empty.
        config: changes to the new model's configuration.
        progress: called as bytes are written.

    Raises:
        FileNotFoundError: there is no such folder.
        FileExistsError: the output is there already.
        UnknownNameError: an architecture that does not exist.
        ConversionError: an architecture that inherits from no such model.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already; remove it or choose another output folder")
    family, variant = split(arch)
    registry.get("model", family)
    try:
        old = load(source)
        way = way_from(family, variant, old)
    except ValueError as error:
        raise ConversionError(f"arch={arch!r}: {error}") from error
    try:
        model = way(old, **(config or {}))
    except (TypeError, ValueError) as error:
        raise ConversionError(f"no {family} from {source} with {dict(config or {})}: {error}") from error
    _write(model, output, progress, source if (source / INDEX).is_file() else None)
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return Conversion(
        output=output,
        architecture="-".join(filter(None, (family, _named(LAYOUTS[family], settings)))),
        weights="only",
        config=settings,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(value.nbytes for value in model.state_dict().values()),
        notes=(f"what a {family} has in place of the {origin(old)}'s parts starts afresh: train it",),
    )


def _copy(state: Mapping[str, Tensor], progress: Progress | None) -> dict[str, Tensor]:
    """The tensors in memory of their own: until here they may be views of the file, or of each other."""
    total = sum(value.nbytes for value in state.values())
    copied, done = {}, 0
    for name, value in state.items():
        copied[name] = value.contiguous().clone()
        done += value.nbytes
        if progress:
            progress("read", done, total)
    return copied


# --- which network it is ------------------------------------------------------------------------------


def _architecture(arch: str | None) -> tuple[str | None, str | None]:
    """Family and variant: ("dit", "xl/2") of "dit-xl/2"."""
    if arch is None:
        return None, None
    family, variant = split(arch)
    registry.get("model", family)
    known = sorted(name for name, layout in LAYOUTS.items() if layout.infer is not None)
    if family not in known:
        raise ConversionError(
            f"arch={arch!r}: there is no converter for {family!r}; there are {', '.join(known)}"
        )
    variants = LAYOUTS[family].variants
    if variant and variant not in variants:
        raise ConversionError(f"arch={arch!r}: no variant {variant!r}; there are {', '.join(variants)}")
    return family, variant


def _from_options(options: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The architecture that a training script's options name, as "DiT-XL/2"."""
    try:
        return _architecture(str(options["model"])) if "model" in options else (None, None)
    except (ConversionError, registry.UnknownNameError):
        return None, None


def _complete(
    layout: Layout, settings: dict[str, Any], state: Mapping[str, Tensor], notes: list[str]
) -> None:
    """Refuse what can't be told from a state dict, rather than guess it."""
    for name, why in layout.needs(settings):
        if name not in settings:
            raise ConversionError(
                f"{name} can't be told from the checkpoint ({why}); its keys: {listed(state)}"
            )
    if layout.null_class and settings.get("class_dropout_prob", 0.1) > 0:
        notes.append(f"the last of {settings['num_classes'] + 1} label rows was taken for the null class")


def _named(layout: Layout, settings: Mapping[str, Any]) -> str | None:
    """The variant with these dimensions."""
    for name, dimensions in layout.variants.items():
        if all(settings.get(key) == value for key, value in dimensions.items()):
            return name
    return None


def _fill(family: str, settings: Mapping[str, Any], state: dict[str, Tensor]) -> Any:
    """The model with these tensors.

    Raises:
        ConversionError: with the keys that are missing, unexpected or of another shape.
    """
    try:
        with torch.device("meta"):
            model = registry.get("model", family).target(None, **settings)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"no {family} can be built with {dict(settings)}: {error}") from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "mis-shaped": [
            f"{name} {found[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise ConversionError(f"the checkpoint does not fit a {family} of {dict(settings)}: {text}")
    model.load_state_dict(state, assign=True)
    return model.eval()


# --- writing ------------------------------------------------------------------------------------------


def _write(model: Any, output: Path, progress: Progress | None, pipeline: Path | None = None) -> None:
    """Save aside, then rename: the folder is whole or not there.

    Args:
        pipeline: folder of one whose other parts go with the model, in place of its transformer.
    """
    total = sum(value.nbytes for value in model.state_dict().values())
    if progress:
        progress("write", 0, total)
    with whole_file(output) as part:  # a folder here; an empty one in its place is replaced
        if pipeline is None:
            model.save_pretrained(part)
        else:
            shutil.copytree(pipeline, part, ignore=lambda folder, names: _old_transformer(pipeline, folder))
            model.save_pretrained(part / "transformer")
            index = json.loads((pipeline / INDEX).read_text(encoding="utf-8"))
            index["transformer"] = [type(model).__module__, type(model).__name__]
            (part / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if progress:
        progress("write", total, total)


def _old_transformer(pipeline: Path, folder: str | os.PathLike[str]) -> list[str]:
    """What of a pipeline's folder is not copied."""
    return ["transformer"] if Path(folder) == pipeline else []
