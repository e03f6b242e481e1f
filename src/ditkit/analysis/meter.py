"""FLOPs and bytes of a model, counted while it runs.

Both counts are taken at the level of single operators, so they hold for any method and any peer, whatever
it patches; what runs outside of PyTorch's dispatcher (a compiled kernel's inside) is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention_flop(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


# PyTorch's table has the CUDA kernels of attention but not the CPU's.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}


@dataclass
class Count:
    """What one run of a model took.

    Args:
        flops: floating-point operations inside the model's forwards (a multiply-add is two).
        bytes_peak: the largest sum of tensor bytes alive during the model's forwards, of the tensors made
            since the count began: activations and caches, not weights.
        forwards: calls of the model.
    """

    flops: int = 0
    bytes_peak: int = 0
    forwards: int = 0


@contextlib.contextmanager
def count(model: nn.Module) -> Iterator[Count]:
    """Count what `model` does while the body runs. Everything runs slower meanwhile; don't take times.

    Example:
        >>> with count(pipe.transformer) as spent:
        ...     pipe("red apple")
        >>> spent.flops
    """
    spent = Count()
    live = _LiveBytes()
    running: list[FlopCounterMode] = []

    def before(*_: Any) -> None:
        spent.forwards += 1
        live.watching = True
        live.note()
        counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        counter.__enter__()
        running.append(counter)

    def after(*_: Any) -> None:
        live.watching = False
        counter = running.pop()
        counter.__exit__(None, None, None)
        spent.flops += counter.get_total_flops()

    handles = [
        model.register_forward_pre_hook(before),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        with live:
            yield spent
    finally:
        spent.bytes_peak = live.peak
        for handle in handles:
            handle.remove()


class _LiveBytes(TorchDispatchMode):
    """Sum of the bytes of the storages made under this mode and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.watching = False
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {
            tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        }
        output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in inputs and storage not in self._known:
                    self._add(storage)
        self.note()
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self.live += size
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size

    def note(self) -> None:
        if self.watching:
            self.peak = max(self.peak, self.live)
