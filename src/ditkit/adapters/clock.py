"""The embedding of the running timestep, for layers that depend on it.

B batch, D width of the embedding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TimeEmbedding:
    """Keeps what a model's time embedder gave last; all layers of the model read the same one."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """The forward hook of the embedder; a bound method, so that a copied model reads its own."""
        self.value = output

    def __deepcopy__(self, memo: dict[int, Any]) -> TimeEmbedding:
        return TimeEmbedding()  # a value that has gradients can't be copied; deepcopy itself keeps the memo

    def read(self, batch: int, rows: Tensor | None = None) -> Tensor:
        """The embedding of each of `batch` samples, (B, D).

        Args:
            batch: samples of the layer's input.
            rows: which samples of the model's batch these are; None: all of them.

        Raises:
            RuntimeError: no forward ran yet, or the times are not one for each sample.
        """
        if self.value is None:
            raise RuntimeError("the model's time embedder did not run before this layer")
        value = self.value if rows is None or len(self.value) == 1 else self.value[rows]
        if value.ndim != 2 or len(value) not in (1, batch):
            raise RuntimeError(
                f"the time embedder gave {tuple(self.value.shape)} for a batch of {batch}; "
                "one time for each sample is needed"
            )
        return value.expand(batch, -1)


def watch(embedder: nn.Module) -> TimeEmbedding:
    """The record of that embedder's output; the one that it has, or a new one."""
    for hook in embedder._forward_hooks.values():
        if isinstance(owner := getattr(hook, "__self__", None), TimeEmbedding):
            return owner
    embedding = TimeEmbedding()
    embedder.register_forward_hook(embedding.see)
    return embedding


def unwatch(model: nn.Module) -> None:
    """Take every such record off a model."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), TimeEmbedding):
                del module._forward_hooks[key]


def embedding_width(embedder: nn.Module) -> int:
    """D, what its last linear map gives."""
    widths = [part.out_features for part in embedder.modules() if isinstance(part, nn.Linear)]
    if not widths:
        raise ValueError(
            f"time_embedder: a {type(embedder).__name__} has no linear map to take the width from"
        )
    return widths[-1]
