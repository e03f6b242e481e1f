"""What a run may ask of the networks in a task: to hold less for the backward pass, to be compiled.

Both are the libraries' own: `enable_gradient_checkpointing` of diffusers and its namesake of transformers,
torch's compiler on one block, which then serves all of its kind. Neither changes a name in a checkpoint or an
export.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ditkit.training.config import CompileMode, ConfigError


def trained_networks(module: nn.Module) -> list[Any]:
    """The networks of diffusers or transformers that a module trains, none of them inside another."""
    if isinstance(module, ModelMixin | PreTrainedModel):
        return [module] if any(p.requires_grad for p in module.parameters()) else []
    return [network for part in module.children() for network in trained_networks(part)]


def checkpoint_gradients(module: nn.Module, where: str) -> None:
    """Let the trained networks hold the inputs of their blocks and compute the rest again for the backward.

    Args:
        module: a task.
        where: the key of the file that asks, for messages.

    Raises:
        ConfigError: a network can't, or there is none.
    """
    for network in _asked(module, where):
        if isinstance(network, ModelMixin):
            able = network._supports_gradient_checkpointing
            enable = network.enable_gradient_checkpointing
        else:
            able, enable = network.supports_gradient_checkpointing, network.gradient_checkpointing_enable
        if not able:
            raise ConfigError(
                f"{where}: a {type(network).__name__} can't compute its blocks again; leave it out"
            )
        enable()


def compile_networks(module: nn.Module, mode: CompileMode, where: str) -> None:
    """Compile the trained networks in place: their repeated blocks where they name them, else the whole.

    Args:
        module: a task.
        mode: of `torch.compile`.
        where: the key of the file that asks, for messages.

    Raises:
        ConfigError: there is no network.
    """
    for network in _asked(module, where):
        names = set(getattr(network, "_repeated_blocks", None) or ())
        blocks = [part for part in network.modules() if type(part).__name__ in names] or [network]
        for block in blocks:  # in place: `torch.compile(block)` would put `_orig_mod` into its names
            block.compile(mode=mode)


@contextlib.contextmanager
def as_written(compiled: CompileMode | None) -> Iterator[None]:
    """Compiled networks run as they are written: evaluation has other sizes, for each of which they would be
    compiled anew."""
    if compiled is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _asked(module: nn.Module, where: str) -> list[Any]:
    found = trained_networks(module)
    if not found:
        raise ConfigError(f"{where}: this task trains no network of diffusers or transformers; leave it out")
    return found
