"""Where between data and noise a flow is trained and sampled: a distribution of times, and their shift.

A latent with many numbers keeps its picture longer under noise than one with few, so its times are moved
towards noise: t <- a t / (1 + (a - 1) t). Source: Esser et al., arXiv 2403.03206, by resolution; arXiv
2510.11690, section 4, by all of a latent's numbers, with 4096 as the base. Here t is the share of noise, 0 at
the data and 1 at the noise.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

TimeDistribution = Literal["uniform", "logit-normal"]
TIME_DISTRIBUTIONS: tuple[TimeDistribution, ...] = ("uniform", "logit-normal")
MOST_NOISE = 0.999  # logit-normal times stop here, as the authors' of arXiv 2510.11690
BASE_NUMBERS = 4096  # a latent of 4 x 32 x 32, whose times are not shifted


def shifted(noise_share: Tensor, shift: float) -> Tensor:
    """Times moved towards noise by a shift above 1, towards data by one below; any shape."""
    return shift * noise_share / (1 + (shift - 1) * noise_share)


def dimension_shift(numbers: int, base: int = BASE_NUMBERS) -> float:
    """The shift a = sqrt(m / base) of a latent of m = C H W numbers."""
    return math.sqrt(numbers / base)


def logit_normal(
    uniform: Tensor, mean: float = 0.0, std: float = 1.0, low: float = 0.0, high: float = MOST_NOISE
) -> Tensor:
    """Uniform numbers to times whose logit is normal, between `low` and `high`: the quantile function.

    Args:
        uniform: in [0, 1), of any shape.
        mean, std: of the logit before it is cut off.
        low, high: where it is cut off.

    Raises:
        ValueError: a deviation that is not positive, or bounds out of order or of [0, 1].
    """
    if std <= 0 or not 0 <= low < high <= 1:
        raise ValueError(f"std={std}, low={low}, high={high}: expected std above 0 and 0 <= low < high <= 1")
    normal = torch.distributions.Normal(0.0, 1.0)
    ends = torch.tensor([low, high], dtype=torch.float64).logit()
    below, up_to = normal.cdf((ends - mean) / std).tolist()
    place = below + uniform.double() * (up_to - below)
    # An uniform number of exactly 0 would be minus infinity.
    quantile = normal.icdf(place.clamp(min=torch.finfo(torch.float64).tiny))
    return torch.sigmoid(mean + std * quantile).clamp(low, high).to(uniform.dtype)
