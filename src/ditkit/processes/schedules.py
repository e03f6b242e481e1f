"""Noise schedules of discrete diffusion, and the choice of a few of their steps for sampling.

Sources: Ho et al., arXiv 2006.11239 (linear), Nichol and Dhariwal, arXiv 2102.09672 (cosine; respacing).
Everything is float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "cosine"]


def betas(schedule: BetaSchedule, steps: int) -> Tensor:
    """The variances added at each step, (T,) in (0, 1).

    Args:
        schedule: "linear" from 1e-4 to 0.02 at 1,000 steps, both ends scaled by 1000/T otherwise; "cosine":
            abar(s) = cos^2(pi/2 (s + 0.008)/1.008), each beta at most 0.999.
        steps: T.

    Raises:
        ValueError: for an unknown schedule, or T so small that a variance passes 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a schedule needs at least one")
    if schedule == "linear":
        if steps <= 20:
            raise ValueError(f"steps={steps}: the linear schedule needs more than 20, or its last beta is 1")
        scale = 1000 / steps
        return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    if schedule == "cosine":
        points = torch.arange(steps + 1, dtype=torch.float64) / steps  # (T + 1,)
        abar = torch.cos((points + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    raise ValueError(f"schedule={schedule!r} is unknown; there are 'linear' and 'cosine'")


def respace(steps: int, respacing: str | Sequence[int]) -> list[int]:
    """Which of T steps to keep, ascending.

    Args:
        steps: T.
        respacing: "" for all; "N" for N evenly spread ones, the first and the last among them; "a,b,c" (or a
            sequence of numbers) to cut the steps into as many equal sections and keep a, b, c of each;
            "ddimN" for every i-th step from the first on, with the smallest stride i that keeps exactly N.

    Raises:
        ValueError: if the steps can't be chosen so.
    """
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        return _strided(steps, _count(respacing[len("ddim") :], respacing))
    if isinstance(respacing, str):
        counts = [_count(part, respacing) for part in respacing.split(",")] if respacing else [steps]
    else:
        counts = [int(count) for count in respacing]
    size, larger = divmod(steps, len(counts))  # the first `larger` sections are one longer
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < larger)
        if not 1 <= count <= length:
            raise ValueError(
                f"respacing={respacing!r}: can't keep {count} of the {length} steps of a section"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            # The stride is added up, not multiplied, and halves round to even: the authors' exact choice.
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


def _strided(steps: int, count: int) -> list[int]:
    for stride in range(1, steps):
        kept = range(0, steps, stride)
        if len(kept) == count:
            return list(kept)
    raise ValueError(f"no whole stride keeps exactly {count} of {steps} steps; use respacing='{count}'")


def _count(text: str, respacing: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"respacing={respacing!r} is not of the form '', '50', '10,15,25' or 'ddim50'"
        ) from None
