"""The facts on architectures of `ditkit.models` beyond `DiT`, and why methods are refused on the others.

A class that derives from `DiT` and calls its blocks alike (SiT, Switch-DiT, a routed DiT) needs no entry.
"""

from __future__ import annotations

from ditkit.seams.anatomy import Anatomy, Stack, Unit
from ditkit.seams.facts.grids import own_grid
from ditkit.seams.facts.rows import modulation

_LIT = Anatomy(
    name="LiT",
    text="none",
    grid=own_grid,
    encoder=(),
    falling_time=False,
    unfit={
        "attention": "its attention is linear, without a softmax over pairs of tokens that could be replaced",
        "tokens": "a convolution inside its attention needs the whole grid of tokens",
    },
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

OURS: dict[str, Anatomy] = {anatomy.name: anatomy for anatomy in (_LIT,)}

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
