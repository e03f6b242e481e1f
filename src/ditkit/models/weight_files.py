"""Weights from files of others, read without running anything that is in them.

A `.pt` file is read with the weights-only loader and nothing else: when that refuses a file, the file is
refused. The one class let through beside tensors is `argparse.Namespace`, plain attributes in which the
authors' training scripts keep their options.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_LISTED = 8  # names shown in a message


class ConversionError(ValueError):
    """The file can't be converted; the message says why and what to do."""


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def read_weights(
    source: Path, weights: Literal["ema", "model"]
) -> tuple[dict[str, Tensor], dict[str, Any], Literal["ema", "model", "only"]]:
    """The tensors of a `.safetensors` or PyTorch file by name, on the CPU; large ones may be mapped files.

    Args:
        source: a state dict, or a training checkpoint {"model", "ema", "args", ...}.
        weights: which set of a training checkpoint to take.

    Returns:
        The tensors, the training options if the file holds them, and which set was taken.

    Raises:
        ConversionError: an unsafe or damaged file, one without tensors, or without the set asked for.
    """
    if source.suffix == ".safetensors":
        try:
            with safe_open(source, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, {}, "only"  # noqa: SIM118
        except SafetensorError as error:
            raise ConversionError(f"{source} is not a readable safetensors file: {error}") from error
    content = _load_torch(source)
    taken: Literal["ema", "model", "only"] = "only"
    options: dict[str, Any] = {}
    sets = [name for name in ("ema", "model") if isinstance(content.get(name), Mapping)]
    if sets:
        if weights not in sets:
            raise ConversionError(f"{source} holds no {weights!r} weights; it has {', '.join(sets)}")
        options = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
        content, taken = content[weights], weights
    strange = [
        str(name) for name, value in content.items() if not (isinstance(name, str) and _is_plain(value))
    ]
    if strange or not content:
        raise ConversionError(
            f"{source} is neither a state dict nor a training checkpoint with 'model' and 'ema': "
            + (f"not tensors: {listed(strange)}" if strange else "it is empty")
        )
    if sum(value.nbytes for value in content.values()) > 2 * source.stat().st_size:
        # Packed entries, or views that repeat a few stored values: either could be made to fill the memory.
        raise ConversionError(f"{source} claims to hold more than twice its own size and is refused")
    return {name.removeprefix("module."): value for name, value in content.items()}, options, taken


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _load_torch(source: Path) -> Mapping[str, Any]:
    zipped = zipfile.is_zipfile(source)
    if zipped and not _is_stored(source):
        # PyTorch never compresses; a compressed file may be made to fill the memory.
        raise ConversionError(f"{source} is damaged or compressed: it was not written by PyTorch")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of several unrelated classes, some of them private
        # Only what was found: PyTorch's own message goes on to advise an unsafe load.
        reason = str(error.__context__ or error).strip().partition("\n")[0].partition(". ")[0]
        raise ConversionError(
            f"{source} can't be loaded safely and is refused: it is damaged, or holds more than tensors and "
            f"plain values ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(content, Mapping):
        raise ConversionError(f"{source} holds a {type(content).__name__}, not a state dict")
    return content


def _is_stored(source: Path) -> bool:
    try:
        with zipfile.ZipFile(source) as archive:
            return all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
