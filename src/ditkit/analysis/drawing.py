"""Pictures that a task draws, class by class, and the true ones at their size.

Dimensions: B drawn pictures, N true ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 128


def frequent_labels(labels: Tensor, count: int) -> Tensor:
    """`count` labels in which classes are as frequent as in `labels` (N,)."""
    known = labels.sort().values
    return known[torch.linspace(0, len(known) - 1, count).round().long()]


def draw(task: Any, labels: Tensor, seed: int, steps: int | None = None) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of classes (B,), on the CPU, by a task that draws classes."""
    generator = torch.Generator().manual_seed(seed)
    options = {} if steps is None else {"steps": steps}
    return torch.cat([task.sample(part, generator, **options).float().cpu() for part in labels.split(BATCH)])


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (N, 3, H, W) averaged to another height and width."""
    return images if images.shape[-2:] == size else F.interpolate(images, size=size, mode="area")
