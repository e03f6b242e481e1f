"""Channels of the residual stream chosen by the timestep; the systems that do so say how and why.

A routed block reads the masked stream and leaves the rest as it was: `x_out = block(m x) + (1 - m) x`
(`layers.RoutableBlock`).

Dimensions: B batch, D width, T timesteps.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Pattern = Literal["windows", "random"]


@functools.lru_cache(maxsize=16)
def channel_masks(
    num_timesteps: int,
    width: int,
    sharing_ratio: float = 0.8,
    alpha: float = 4.0,
    pattern: Pattern = "windows",
    seed: int = 0,
) -> Tensor:
    """Which channels each timestep sees: 0 and 1, float32 on the CPU, (T, D).

    Args:
        num_timesteps: T; row 0 is the least noise.
        width: D.
        sharing_ratio: beta, the share of channels that are active; int(D beta) of them.
        alpha: how much faster the window moves at high noise; it starts at round((t / (T-1))^alpha (D - F)),
            half to even, F being the number of active channels.
        pattern: "random" draws F channels for each timestep apart (the paper's ablation).
        seed: of that draw.

    Raises:
        ValueError: values out of range.
    """
    active = int(width * sharing_ratio)
    if not 0 < active <= width or alpha <= 0 or num_timesteps < 1:
        raise ValueError(
            f"sharing_ratio={sharing_ratio}, alpha={alpha}, num_timesteps={num_timesteps}: a width of "
            f"{width} needs at least one active channel (sharing_ratio at most 1), alpha above 0, a timestep"
        )
    if pattern == "random":
        draw = torch.rand(num_timesteps, width, generator=torch.Generator().manual_seed(seed), device="cpu")
        return (draw.argsort(dim=1).argsort(dim=1) < active).float()
    if pattern != "windows":
        raise ValueError(f"pattern={pattern!r} is neither 'windows' nor 'random'")
    start = np.round(np.linspace(0, 1, num_timesteps) ** alpha * (width - active))[:, None]  # (T, 1)
    channel = np.arange(width)
    return torch.from_numpy(((channel >= start) & (channel < start + active)).astype(np.float32))


class ChannelRouting(nn.Module):
    """The masks of a batch of timesteps, (B,) -> (B, 1, D).

    Args:
        width: D.
        sharing_ratio: beta in (0, 1]; 1 routes nothing.
        alpha, num_timesteps, pattern, seed: see `channel_masks`.
        unit_time: whether times run from 0 (noise) to 1 (data) instead of 0..T-1.

    Raises:
        ValueError: values out of range.
    """

    def __init__(
        self,
        width: int,
        sharing_ratio: float = 0.8,
        alpha: float = 4.0,
        num_timesteps: int = 1000,
        pattern: Pattern = "windows",
        seed: int = 0,
        unit_time: bool = False,
    ) -> None:
        super().__init__()
        self.arguments = (num_timesteps, width, sharing_ratio, alpha, pattern, seed)
        self.num_timesteps, self.unit_time = num_timesteps, unit_time
        self.masks: Tensor
        masks = channel_masks(*self.arguments)
        self.neutral = bool(masks.all())
        # Not saved: the configuration holds all there is to know. On the device one is building on.
        self.register_buffer("masks", masks.to(torch.empty(0).device), persistent=False)

    def forward(self, timestep: Tensor, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The masks; None where every channel is always active.

        Raises:
            ValueError: a timestep outside the table.
        """
        if self.neutral:
            return None
        rows = timestep
        if self.unit_time:
            rows = ((1 - timestep.float()) * (self.num_timesteps - 1)).round()
        if self.masks.is_meta and not timestep.is_meta:  # built without memory, then loaded
            self.masks = channel_masks(*self.arguments).to(timestep.device)
        return self.masks[rows.long()].to(dtype).unsqueeze(1)


def route(model: Any, **options: Any) -> Any:
    """Add routing to a model that is there already, in place; it is saved and loaded with it.

    Args:
        model: an isotropic model of ours: one whose configuration has `routing`.
        **options: of `ChannelRouting`.

    Returns:
        The model.

    Raises:
        TypeError: a model that has no place for it.
    """
    if "routing" not in getattr(model, "config", {}):
        raise TypeError(
            f"{type(model).__name__} can't be routed: masks belong to blocks of one width (DiT, SiT, ...)"
        )
    model.channel_routing = ChannelRouting(model.config["hidden_size"], unit_time=model.unit_time, **options)
    model.channel_routing.to(model.device)
    model.register_to_config(routing=dict(options))
    return model
