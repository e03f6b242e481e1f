"""Several adapters in one batch: each sample has its own.

peft's layers take `adapter_names`, one for each sample, in their forward; here a model's call hands them on.

B batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from ditkit.adapters.store import AdapterError, names, network
from ditkit.adapters.tuner import BASE


@contextlib.contextmanager
def per_sample(model: Any, chosen: Sequence[str | None]) -> Iterator[None]:
    """While the body runs, sample i of a batch has the adapter `chosen[i]`; None: the model alone.

    A batch that is a multiple of that long, as under guidance, has them in turn: for each pass the same. In
    guidance over classes the adapters need equally many, for the null class comes after the last of them.

    Raises:
        AdapterError: an adapter that is not there; in a call, a batch of another size.
    """
    module = network(model)
    present = names(module)
    if unknown := [name for name in chosen if name is not None and name not in present]:
        raise AdapterError(
            f"no adapter {unknown[0]!r} on the model; there are: {', '.join(present) or 'none'}"
        )
    if not chosen:
        raise AdapterError("name an adapter, or None, for each sample")
    rows = _Rows([BASE if name is None else name for name in chosen])
    parts = list(module.modules())
    with contextlib.ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(rows.begin, with_kwargs=True).remove)
        for part in parts:
            if isinstance(part, BaseTunerLayer):
                stack.callback(part.register_forward_pre_hook(rows.name, with_kwargs=True).remove)
            elif isinstance(part, ModulesToSaveWrapper):
                part.forward = partial(_mixed_table, part, rows)
                stack.callback(part.__dict__.pop, "forward")
        yield


class _Rows:
    """The adapter of each sample in the running call of the model."""

    def __init__(self, chosen: Sequence[str]) -> None:
        self.chosen = chosen
        self.each: list[str] = []

    def begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """The model's forward begins; its first tensor is the samples."""
        batch = next(len(value) for value in [*args, *kwargs.values()] if isinstance(value, Tensor | list))
        if batch % len(self.chosen):
            raise AdapterError(f"{len(self.chosen)} adapters were named for a batch of {batch} samples")
        self.each = [*self.chosen] * (batch // len(self.chosen))

    def of(self, batch: int) -> list[str]:
        if batch != len(self.each):
            raise AdapterError(
                f"a layer of this model sees {batch} rows in a batch of {len(self.each)} samples: "
                "its samples can't have adapters of their own"
            )
        return self.each

    def name(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Hand the names on to a layer."""
        return args, {**kwargs, "adapter_names": self.of(len(args[0]))}


def _mixed_table(table: Any, rows: _Rows, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Embeddings of labels (B,), each from its own adapter's table."""
    each = rows.of(len(labels))
    parts: list[Any] = [None] * len(labels)
    for name in dict.fromkeys(each):
        at = torch.tensor([i for i, other in enumerate(each) if other == name], device=labels.device)
        own = table.modules_to_save
        module = own[name] if name in own else table.original_module  # noqa: SIM401  (a ModuleDict has no get)
        some = [
            value[at] if isinstance(value, Tensor) and len(value) == len(labels) else value for value in args
        ]
        for index, embedded in zip(at.tolist(), module(labels[at], *some, **kwargs), strict=True):
            parts[index] = embedded
    return torch.stack(parts)
