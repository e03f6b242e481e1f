"""FLOPs and bytes of a model, counted while it runs.

Both counts are taken at the level of single operators, so they hold for any method and any peer, whatever
it patches; what runs outside of PyTorch's dispatcher (a compiled kernel's inside) is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(tuple(query.shape), tuple(key.shape), tuple(value.shape))


def _attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    shapes = (tuple(x.shape) for x in (gradient, query, key, value))
    return sdpa_backward_flop_count(*shapes)


_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    # PyTorch's table has the CUDA kernels of attention but not the CPU's.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass
class Count:
    """What one run of a model took.

    Args:
        flops_by_forward: floating-point operations of each call of the model (a multiply-add is two).
        bytes_peak: the largest sum of tensor bytes alive during the model's calls, of the tensors made
            since the count began: activations and caches, not weights.
    """

    flops_by_forward: list[int] = field(default_factory=list)
    bytes_peak: int = 0
    _meter: _Meter | None = field(default=None, repr=False)

    @property
    def flops(self) -> int:
        return sum(self.flops_by_forward)

    @property
    def flops_everywhere(self) -> int:
        """Of all that ran since the count began, in the model's calls or not: losses, backward passes."""
        return self._meter.flops if self._meter is not None else 0

    @property
    def bytes_live(self) -> int:
        """Bytes of the tensors that were made since the count began and are alive now."""
        return self._meter.bytes_live if self._meter is not None else 0


@contextlib.contextmanager
def count(model: nn.Module) -> Iterator[Count]:
    """Count what `model` does while the body runs. Everything runs slower meanwhile; don't take times.

    Example:
        >>> with count(pipe.transformer) as spent:
        ...     pipe("red apple")
        >>> spent.flops
    """
    meter = _Meter()
    spent = Count(_meter=meter)
    flops_before: list[int] = []

    def before(*_: Any) -> None:
        flops_before.append(meter.flops)
        meter.inside += 1
        meter.note()

    def after(*_: Any) -> None:
        meter.inside -= 1
        spent.flops_by_forward.append(meter.flops - flops_before.pop())

    handles = [
        model.register_forward_pre_hook(before),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        with meter:
            yield spent
    finally:
        spent.bytes_peak = meter.bytes_peak
        for handle in handles:
            handle.remove()


class _Meter(TorchDispatchMode):
    """Counts FLOPs by PyTorch's own table, and the bytes of storages made under this mode and not yet freed.

    PyTorch's FlopCounterMode follows the module tree too, and does not return from one with a cycle, which
    other libraries make; the table is all that is needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.bytes_live = 0
        self.bytes_peak = 0
        self.inside = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # a composite operator: count what it is made of
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        self._add(output, not_from=(args, kwargs))
        return output

    def _add(self, made: Any, not_from: Any) -> None:
        given = {id(storage) for storage in _storages(not_from)}
        for storage in _storages(made):
            if id(storage) not in given and storage not in self._known:
                size = storage.nbytes()
                self._known.add(storage)
                self.bytes_live += size
                weakref.finalize(storage, self._free, size)
        self.note()

    def _free(self, size: int) -> None:
        self.bytes_live -= size

    def note(self) -> None:
        if self.inside:
            self.bytes_peak = max(self.bytes_peak, self.bytes_live)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
