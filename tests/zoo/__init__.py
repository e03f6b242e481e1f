"""A tiny random instance of every class of the facts table: one file for a family, as in `seams/facts/`.

`ZOO` maps a class name to a `Tiny`. `tiny_models.TINY` is the choice of them that the contract tests run
on, one for each kind of structure.
"""

from __future__ import annotations

from tiny_models import TINY, Tiny
from zoo import audio, cog, dit, flux, hunyuan, kandinsky, ltx, qwen, sana, single, wan

_FAMILIES = (audio, cog, dit, flux, hunyuan, kandinsky, ltx, qwen, sana, single, wan)

ZOO: dict[str, Tiny] = {
    **TINY,
    **{tiny.name: tiny for family in _FAMILIES for tiny in family.ANIMALS},
}
