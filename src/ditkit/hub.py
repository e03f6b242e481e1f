"""Open a pipeline: one of the bundled ones, a folder, or a repository of the hub."""

from __future__ import annotations

import difflib
import functools
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

BUNDLED = {
    "micro-flux": "text to 64 x 64 pictures of the emoji set, a FluxPipeline of a few million parameters",
}


def load(name: str | Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """A diffusers pipeline, ready to call.

    Args:
        name: a bundled pipeline (`"micro-flux"`), a folder that `save_pretrained` wrote, or a hub repository
            `owner/name`. Only safetensors weights are read and no code of a repository is run.
        dtype: of the weights.
        kwargs: passed on to `DiffusionPipeline.from_pretrained`, e.g. `revision`: repositories change.

    Raises:
        FileNotFoundError: neither a bundled name, nor a folder, nor of the form `owner/name`.
    """
    from diffusers import DiffusionPipeline

    if str(name) in BUNDLED:
        folder = files("ditkit") / "assets" / str(name)
        return _with_defaults_of_its_parts(
            DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, **kwargs)
        )
    path = Path(name)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise FileNotFoundError(f"{path} is no pipeline folder: it has no model_index.json")
    elif str(name).count("/") != 1 or path.exists() or str(name)[0] in "/.~":
        near = difflib.get_close_matches(str(name), BUNDLED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"bundled are {', '.join(BUNDLED)}"
        raise FileNotFoundError(f"no pipeline {str(name)!r}: no such folder, and {hint}")
    pipe = DiffusionPipeline.from_pretrained(str(name), dtype=dtype, use_safetensors=True, **kwargs)
    small = getattr(getattr(pipe, "tokenizer_2", None), "model_max_length", 512) < 77
    return _with_defaults_of_its_parts(pipe) if small else pipe


def _with_defaults_of_its_parts(pipe: Any) -> Any:
    """Let a plain call draw at the size and text length that a small pipeline was trained with.

    `FluxPipeline` assumes FLUX.1's: 128 latents a side and 512 text tokens. The size is an attribute of the
    pipeline; a longer text length than the tokenizer's own is cut to that.
    """
    size = getattr(pipe.vae.config, "sample_size", None)
    if size:
        pipe.default_sample_size = size // pipe.vae_scale_factor
    encode = pipe.encode_prompt
    longest = pipe.tokenizer_2.model_max_length

    @functools.wraps(encode)
    def encode_prompt(*args: Any, max_sequence_length: int = longest, **kwargs: Any) -> Any:
        return encode(*args, max_sequence_length=min(max_sequence_length, longest), **kwargs)

    pipe.encode_prompt = encode_prompt
    return pipe
