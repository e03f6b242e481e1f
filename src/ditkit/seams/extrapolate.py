"""Forecast a tensor from its past values: finite differences, kept up to date one sample at a time.

A value f is known at samples x_0 (the latest), x_1, x_2, ... and wanted at x, k = x - x_0.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Expansion = Literal["authors", "newton"]
FactorDtype = Literal["float32", "bfloat16", "float16", "model"]
DTYPES: dict[FactorDtype, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "model": None,
}


class Trajectory:
    """Differences D_0 .. D_order of one tensor at the latest sample.

    Two expansions:
    - `"authors"` (TaylorSeer, arXiv 2503.06923, and its code): D_{i+1} = (D_i - D_i at x_1) / (x_0 - x_1),
      the latest gap at every order, and f(x) = sum D_i k^i / i!. The first difference is the slope in the
      middle of the last gap d, not at x_0, and the series leaves that lag, k d D_2 / 2, at any order.
    - `"newton"`: divided differences, D_{i+1} = (D_i - D_i at x_1) / (x_0 - x_{i+1}), and
      f(x) = sum D_i (x - x_0) .. (x - x_{i-1}): the polynomial through the last samples, whatever the gaps.
    Both are the same line at order 1 and the last value at order 0.

    Args:
        order: highest difference kept, >= 0.
        expansion: see above.
        reach: differences are used up to so many times the last gap ahead of x_0, beyond that the last value
            alone; None: however far. A slope measured over one step says little about the fifth step from it.
        dtype: in which differences are kept and evaluated; None: that of the values.
    """

    def __init__(
        self,
        order: int,
        expansion: Expansion = "authors",
        dtype: torch.dtype | None = None,
        reach: float | None = None,
    ) -> None:
        if expansion not in get_args(Expansion):
            raise ValueError(f"expansion must be one of {', '.join(get_args(Expansion))}; got {expansion!r}")
        self.order = order
        self.expansion = expansion
        self.reach = reach
        self.factors: list[Tensor] = []
        self._samples: list[float] = []
        self._dtype = dtype
        self._given: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(factor.nbytes for factor in self.factors)

    def add(self, x: float, value: Tensor, order: int | None = None) -> None:
        """Take the value at a new sample.

        Args:
            x: the sample, other than the last one.
            value: any shape; another shape than before starts afresh.
            order: highest difference to take now, if lower than the trajectory's.
        """
        self._given = value.dtype
        latest = owned(value.detach().to(self._dtype or value.dtype))
        if self.factors and self.factors[0].shape != latest.shape:
            self.factors, self._samples = [], []
        highest = self.order if order is None else min(order, self.order)
        factors = [latest]
        for i, before in enumerate(self.factors[:highest]):
            gap = x - self._samples[0 if self.expansion == "authors" else i]
            factors.append(torch.sub(factors[i], before).div_(gap))
        self.factors = factors
        self._samples = [x, *self._samples][: self.order + 1]

    def at(self, x: float, order: int | None = None) -> Tensor:
        """The forecast at x, in the dtype of the values. At order 0 the stored tensor: don't write to it.

        Args:
            order: highest difference to use, if lower than those there are.
        """
        forecast = self.factors[0]
        weights = self._weights(x)
        if order is not None:
            weights = weights[: order + 1]
        for i in range(1, len(weights)):
            if i == 1:
                forecast = torch.add(forecast, self.factors[1], alpha=weights[1])
            else:
                forecast.add_(self.factors[i], alpha=weights[i])
        return forecast if self._given is None else forecast.to(self._given)

    def _weights(self, x: float) -> list[float]:
        k = x - self._samples[0]
        if len(self.factors) == 1 or self._too_far(k):
            return [1.0]
        if self.expansion == "authors":
            return [k**i / math.factorial(i) for i in range(len(self.factors))]
        weights = [1.0]
        for sample in self._samples[: len(self.factors) - 1]:
            weights.append(weights[-1] * (x - sample))
        return weights

    def _too_far(self, k: float) -> bool:
        # A hair of slack: noise levels are not whole numbers.
        return self.reach is not None and abs(k) > 1.000001 * self.reach * abs(
            self._samples[0] - self._samples[1]
        )


def owned(value: Tensor) -> Tensor:
    """The tensor, copied when it is part of a larger one that it would keep alive."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def ahead(x: float, recent: Tensor, past: Tensor, reach: float) -> Tensor:
    """How far x lies beyond the latest samples, in gaps between each and the one before, 0 to `reach`; 0
    where there is no gap. Of tensors of samples, one for each token, say."""
    gap = recent - past
    return torch.where(gap == 0, 0, (x - recent) / torch.where(gap == 0, 1, gap)).clamp(0, reach)
