"""Random draws of the samplers."""

from __future__ import annotations

import torch
from torch import Tensor


def normal_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise, drawn on the generator's device so that a CPU seed serves every device."""
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
