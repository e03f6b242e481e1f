"""The facts on architectures of `ditkit.models` beyond `DiT`, and why methods are refused on the others.

A class that derives from `DiT` and calls its blocks alike (SiT, Switch-DiT, a routed DiT) needs no entry.

B batch, L image tokens, C width, P windows of n tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from ditkit.models.windows import from_windows
from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Seam, Stack, Unit
from ditkit.seams.facts.dit import DIT, PIXART
from ditkit.seams.facts.flux import FLUX
from ditkit.seams.facts.grids import Grid, own_grid, patched_2d
from ditkit.seams.facts.rows import modulation

_LINEAR: dict[Seam, str] = {
    "attention": "its attention is linear, without a softmax over pairs of tokens that could be replaced",
    "tokens": "a convolution inside its attention needs the whole grid of tokens",
}

_LIT = Anatomy(
    name="LiT",
    text="none",
    grid=own_grid,
    encoder=(),
    falling_time=False,
    unfit=_LINEAR,
    stacks=(
        Stack(
            path="blocks",
            arguments=("hidden_states", "conditioning"),
            units=(Unit("attn", bypass=("norm1",)), Unit("mlp", bypass=("norm2",))),
            token_rows={"conditioning": modulation(1, ndim=3)},
            per_token={"conditioning": lambda conditioning: conditioning.shape[1] > 1},
        ),
    ),
)

_LIT_PIXART = dataclasses.replace(
    PIXART,
    name="LiTPixArtTransformer2DModel",
    unfit=_LINEAR,
    stacks=(dataclasses.replace(PIXART.stacks[0], attention=(Attention("attn2", "cross"),)),),
)

_DYDIT = dataclasses.replace(
    DIT,
    name="DyDiT",
    varies=True,
    unfit={"attention": "its heads change from step to step, so that nothing can be kept for a head"},
)
_DYFLUX = dataclasses.replace(
    FLUX,
    name="DyFluxTransformer2DModel",
    varies=True,
    unfit={"units": "each step runs other tokens through its feed-forwards, gathered into one sequence"},
)

_DIT_DH = Anatomy(
    name="DiTDH",
    text="none",
    grid=own_grid,
    encoder=(),
    falling_time=False,
    unfit={
        "stack": "its head reads the picture again beside the backbone's tokens, so that its blocks are not "
        "one stack to skip",
        "tokens": "its head reads the picture again, every token of it",
    },
    stacks=(
        Stack(
            path="blocks",
            arguments=("hidden_states", "conditioning"),
            units=(Unit("attn", bypass=("norm1",)), Unit("mlp", bypass=("norm2",))),
            attention=(Attention("attn", "self"),),
            per_token={"conditioning": lambda conditioning: conditioning.shape[1] > 1},
        ),
    ),
)

OURS: dict[str, Anatomy] = {
    anatomy.name: anatomy for anatomy in (_LIT, _LIT_PIXART, _DYDIT, _DYFLUX, _DIT_DH)
}

_LEVELS = (
    "its blocks work at several resolutions, joined across by skip connections, so that none can be left out"
)

REFUSED: dict[str, str] = {
    "DiCo": f"it has no tokens and no attention, and {_LEVELS}",
    "DiMR": _LEVELS,
    "LaMambaDiff": f"{_LEVELS}, and its scans read every token in order",
    "PTDiT": "its tokens stay in windows, each with a proxy, so that they are no sequence to choose from",
    "D2iT": "its two stacks of blocks run on different tokens, regions and the cells of fine ones",
    "GrainTransformer": "it fills a map of grains once, before any denoising",
}


def _unwindowed(model: nn.Module, windows: Tensor, grid: Grid) -> Tensor:
    """Windows (B, P, n, C) to tokens (B, L, C)."""
    network: Any = model
    return from_windows(windows, network.window, grid).flatten(1, 3)


def _windowed_grid(model: nn.Module, arguments: Arguments) -> Grid:
    """(B, C, H, W), or with frames (B, C, F, H, W); frames are not cut."""
    latent = arguments["hidden_states"]
    _, height, width = patched_2d(model, arguments)
    return (latent.shape[2] if latent.ndim == 5 else 1), height, width


def _flat_maps(model: nn.Module, maps: Tensor, grid: Grid) -> Tensor:
    """Maps (B, C, H, W) to tokens (B, L, C)."""
    return maps.flatten(2).transpose(1, 2)


def _lowest_level(model: nn.Module, arguments: Arguments) -> Grid:
    """A quarter of each side."""
    height, width = arguments["hidden_states"].shape[-2:]
    return 1, height // 4, width // 4


READ_ONLY: dict[str, Anatomy] = {
    "PTDiT": Anatomy(
        name="PTDiT",
        text="cross",
        grid=_windowed_grid,
        unfit={"attention": "its attention runs in windows and among their proxies"},
        stacks=(
            Stack(path="transformer_blocks", arguments=("hidden_states", "conditioning"), raster=_unwindowed),
        ),
    ),
    "DiCo": Anatomy(
        name="DiCo",
        text="none",
        grid=_lowest_level,
        encoder=(),
        unfit={"attention": "it has none"},
        stacks=(Stack(path="latent", arguments=("hidden_states", "conditioning"), raster=_flat_maps),),
    ),
}
"""Classes on which no method works, but whose blocks can be read: a DiCo's are those of its lowest level."""
