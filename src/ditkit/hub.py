"""Open a pipeline: one of the bundled ones, a folder, or a repository of the hub."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import pkgutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ditkit import registry

BUNDLED = {
    "micro-flux": "text to 64 x 64 pictures of the emoji set, a FluxPipeline of a few million parameters",
    "micro-wan": "text to clips of 17 frames of 64 x 64, one emoji moving, a WanPipeline of 7 million",
}
CALL_FILE = "call.json"
"""Arguments of a plain call, beside model_index.json: the sizes that a small pipeline was trained with."""


def load(name: str | Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """A diffusers pipeline, ready to call.

    Args:
        name: a bundled pipeline (`"micro-flux"`, `"micro-wan"`), a folder that `save_pretrained` wrote, or a
            hub repository `owner/name`. Only safetensors weights are read and no code of a repository is run.
        dtype: of the weights.
        kwargs: passed on to `DiffusionPipeline.from_pretrained`, e.g. `revision`: repositories change.

    Raises:
        FileNotFoundError: neither a bundled name, nor a folder, nor of the form `owner/name`.
    """
    from diffusers import DiffusionPipeline

    if str(name) in BUNDLED:
        name = str(files("ditkit") / "assets" / str(name))
    path = Path(name)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise FileNotFoundError(f"{path} is no pipeline folder: it has no model_index.json")
    elif str(name).count("/") != 1 or path.exists() or str(name)[0] in "/.~":
        near = difflib.get_close_matches(str(name), BUNDLED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"bundled are {', '.join(BUNDLED)}"
        raise FileNotFoundError(f"no pipeline {str(name)!r}: no such folder, and {hint}")
    index = _index(path)
    if (own := _own_pipeline(index)) is not None:
        return own.from_pretrained(str(path), dtype=dtype, use_safetensors=True, **kwargs)
    if not index or any(
        isinstance(part, list) and str(part[0]).startswith("ditkit.models.") for part in index.values()
    ):
        registry.entries("model")  # diffusers loads no class whose module is not imported yet
    pipe = DiffusionPipeline.from_pretrained(str(name), dtype=dtype, use_safetensors=True, **kwargs)
    call = path / CALL_FILE
    if call.is_file():
        _with_arguments(pipe, json.loads(call.read_text(encoding="utf-8")))
    tokenizer = getattr(pipe, "tokenizer_2", None) or getattr(pipe, "tokenizer", None)
    small = getattr(tokenizer, "model_max_length", 512) < 77
    return _with_defaults_of_its_parts(pipe, tokenizer) if small else pipe


def _index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of its parts; nothing for repositories."""
    file = folder / "model_index.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _own_pipeline(index: dict[str, Any]) -> Any:
    """The class of `ditkit.pipelines` that a folder is of; None for diffusers' own and for repositories."""
    from ditkit import pipelines

    name = str(index.get("_class_name"))
    for found in pkgutil.iter_modules(pipelines.__path__) if index else ():
        cls = getattr(importlib.import_module(f"{pipelines.__name__}.{found.name}"), name, None)
        if isinstance(cls, type) and cls.__module__.startswith(pipelines.__name__):
            return cls
    return None


def _with_arguments(pipe: Any, arguments: dict[str, Any]) -> None:
    """Let a plain call use these arguments where it says nothing.

    Python looks `__call__` up on the class, so the pipeline gets a subclass of its own class and of the same
    name; it saves as what it was.
    """
    plain = type(pipe)
    signature = inspect.signature(plain.__call__)

    @functools.wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        return plain.__call__(self, *args, **{k: v for k, v in arguments.items() if k not in given} | kwargs)

    known = {"__call__": call, "__module__": plain.__module__, "plain_call": arguments}
    pipe.__class__ = type(plain.__name__, (plain,), known)


def call_defaults(pipe: Any) -> dict[str, Any]:
    """What a plain call of a pipeline uses where it says nothing."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    own = {name: parameter.default for name, parameter in parameters.items()}
    return {**own, **getattr(pipe, "plain_call", {})}


def _with_defaults_of_its_parts(pipe: Any, tokenizer: Any) -> Any:
    """Let a plain call draw at the size and text length that a small pipeline was trained with.

    `FluxPipeline` assumes FLUX.1's: 128 latents a side and 512 text tokens. The size is an attribute of the
    pipeline; a longer text length than the tokenizer's own is cut to that.
    """
    size = getattr(pipe.vae.config, "sample_size", None)
    if size:
        pipe.default_sample_size = size // pipe.vae_scale_factor
    encode = pipe.encode_prompt
    longest = tokenizer.model_max_length

    @functools.wraps(encode)
    def encode_prompt(*args: Any, max_sequence_length: int = longest, **kwargs: Any) -> Any:
        return encode(*args, max_sequence_length=min(max_sequence_length, longest), **kwargs)

    pipe.encode_prompt = encode_prompt
    return pipe
