"""Architectures: one paper, one file; what they share is in `layers`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ditkit import registry


def create(name: str, **config: Any) -> Any:
    """A freshly initialised model by name.

    Args:
        name: a registered architecture, alone (`"dit"`: its defaults) or with a variant (`"dit-xl/2"`).
        **config: changes to the configuration, e.g. `input_size=64`.

    Returns:
        The diffusers `ModelMixin`.

    Raises:
        UnknownNameError: no such architecture; the message lists the nearest ones.
        ValueError: no such variant of it; the message lists the variants.
    """
    architecture, variant = split(name)
    return registry.get("model", architecture).target(variant, **config)


def split(name: str) -> tuple[str, str | None]:
    """Architecture and variant of a name: ("dit", "xl/2") of "DiT-XL/2"; an unknown name is left whole."""
    wanted = name.lower()
    # The longest name wins: an architecture's own name may hold a dash and begin with another's.
    known = sorted(registry.entries("model"), key=len, reverse=True)
    architecture = next((k for k in known if wanted == k or wanted.startswith(f"{k}-")), name)
    return architecture, wanted[len(architecture) + 1 :] or None


def model_folder(folder: str | Path) -> Path:
    """Where a model's config.json is: in the folder, or in `transformer/` of a pipeline's folder."""
    inside = Path(folder) / "transformer"
    return inside if (inside / "config.json").is_file() else Path(folder)


def load(folder: str | Path, **options: Any) -> Any:
    """The model of ours in a folder that `save_pretrained` wrote, whatever its class; or of diffusers, where
    one of ours starts from it.

    Args:
        folder: of the model, or of a pipeline with it.
        **options: of `from_pretrained`.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it names no such class.
    """
    folder = model_folder(folder)
    return class_of(folder).from_pretrained(folder, **options)


def class_of(folder: Path) -> Any:
    """The class that the config.json of a folder names: one of ours, or one that a file of ours starts from.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it names no class of ours.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no model folder at {folder}: it has no config.json")
    name = json.loads(config.read_text()).get("_class_name")
    for entry in registry.entries("model").values():
        cls = getattr(sys.modules[entry.target.__module__], str(name), None)
        if cls is not None:
            return cls
    raise ValueError(f"{config} names the class {name!r}, which is no architecture of ours")


def autoencoder_class(folder: Path) -> Any:
    """The class of the autoencoder in a folder: diffusers' `AutoencoderKL`, or one of ours.

    Raises:
        FileNotFoundError, ValueError: see `class_of`; also where it is no autoencoder.
    """
    from diffusers import AutoencoderKL

    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("_class_name") == AutoencoderKL.__name__:
        return AutoencoderKL
    cls = class_of(folder)
    if not hasattr(cls, "decode"):
        raise ValueError(f"{folder} is a {cls.__name__}, which is no autoencoder")
    return cls
