"""What is computed of single samples when they are first asked for, and kept: latents, states of texts.

Each is computed alone, so that it does not depend on which others a batch holds, and a run that was stopped
sees the same numbers again.

Legend: N samples in all, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

MOST_BYTES = 8 * 2**30
"""What one `Kept` holds in the CPU's memory; what is beyond is computed again each time."""

Rows = dict[str, Tensor]
"""Tensors (B, ...) by name."""


class Kept:
    """Rows by key.

    Args:
        compute: gives the rows of one key, B = 1. It runs without gradients and in full precision.
        device: where rows are wanted.
        what: is done, for the bar that shows when it takes long.
        most: bytes that are kept.
    """

    def __init__(
        self,
        compute: Callable[[Any], Rows],
        device: Callable[[], torch.device],
        what: str,
        most: int = MOST_BYTES,
    ) -> None:
        self._compute, self._device, self._what, self._most = compute, device, what, most
        self._rows: dict[Any, Rows] = {}
        self._bytes = 0

    def rows(self, keys: Sequence[Any]) -> Rows:
        """The rows (B, ...) of B keys."""
        found = {key: self._rows[key] for key in keys if key in self._rows}
        for key in tqdm(list(dict.fromkeys(keys)), desc=self._what, delay=2, leave=False):
            if key not in found:
                found[key] = self._made(key)
        names = found[keys[0]]
        device = self._device()
        return {name: torch.cat([found[key][name] for key in keys]).to(device) for name in names}

    def _made(self, key: Any) -> Rows:
        with torch.no_grad(), torch.autocast(self._device().type, enabled=False):
            made = {name: value.cpu() for name, value in self._compute(key).items()}
        size = sum(value.nbytes for value in made.values())
        if self._bytes + size <= self._most:
            self._rows[key] = made
            self._bytes += size
        return made


class KeptSamples:
    """Samples by number as a tensor (N, ...) has them, each computed when it is first asked for.

    Args:
        compute: gives the sample of a number, (1, ...).
        count: N.
        device, what, most: as of `Kept`.
    """

    def __init__(
        self,
        compute: Callable[[int], Tensor],
        count: int,
        device: Callable[[], torch.device],
        what: str,
        most: int = MOST_BYTES,
    ) -> None:
        self._kept = Kept(lambda index: {"sample": compute(index)}, device, what, most)
        self._count, self._device = count, device

    def __len__(self) -> int:
        return self._count

    @property
    def device(self) -> torch.device:
        return self._device()

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        """Samples (B, ...) of numbers (B,), or of a slice."""
        chosen = range(self._count)[indices] if isinstance(indices, slice) else indices.tolist()
        return self._kept.rows(list(chosen))["sample"]
