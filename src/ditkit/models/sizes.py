"""How large the named configurations are: what was published, and what is counted on a model without memory.

Multiply-adds are of one forward, batch 1, without guidance, at the size the variant is built for; papers
mostly call them "Gflops". Published parameters are those of the papers or, where they only round them, of
the authors' class; of `lit-pixart`, `pt-dit` and `d2it`, whose authors' class was not at hand or does not
give the paper's figure, they are the paper's, in millions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ditkit import models, registry


@dataclass(frozen=True)
class Size:
    """Parameters, and 1e9 multiply-adds of one forward; None where unknown."""

    parameters: float | None
    multiply_adds: float | None = None


def _dit_table() -> dict[str, Size]:
    rows = {
        "s/2": (32_963_360, 6.06),
        "s/4": (32_945_024, 1.41),
        "s/8": (33_148_160, 0.36),
        "b/2": (130_512_416, 23.01),
        "b/4": (130_475_648, 5.57),
        "b/8": (130_881_536, 1.42),
        "l/2": (458_102_816, 80.70),
        "l/4": (458_053_760, 19.70),
        "l/8": (458_594_816, 5.01),
        "xl/2": (675_129_632, 118.62),
        "xl/4": (675_074_432, 29.04),
        "xl/8": (675_683_072, 7.39),
    }
    return {f"{family}-{name}": Size(*row) for family in ("dit", "sit", "dtr") for name, row in rows.items()}


PUBLISHED: dict[str, Size] = {
    **_dit_table(),
    "dydit-s/2": Size(33_120_740),
    "dydit-b/2": Size(131_158_964),
    "dydit-xl/2": Size(678_424_644, 118.69),
    "dico-s": Size(33_137_672, 4.25),
    "dico-b": Size(129_992_712, 16.88),
    "dico-l": Size(463_897_992, 60.24),
    "dico-xl": Size(701_151_368, 87.30),
    "dico-h": Size(1_037_408_328, 194.15),
    "switch-dit-s/2": Size(38_299_460),
    "switch-dit-b/2": Size(151_801_412),
    "switch-dit-l/2": Size(533_747_816),
    "switch-dit-xl/2": Size(786_799_988),
    "pt-dit-s-class": Size(32e6),
    "pt-dit-b": Size(144e6, 334.2),
    "pt-dit-l": Size(605e6, 1423.9),
    "pt-dit-xl": Size(1142e6),
    "pt-dit-h": Size(1795e6, 4236.9),
    "dimr-xl/2r": Size(505_046_408, 160.18),
    "dimr-g/2r": Size(1_056_352_904, 331.10),
    "dimr-xl/3r": Size(525e6),
    "lamamba-diff-xl": Size(659_742_248, 50.47),
    "lamamba-diff-xl-state1": Size(652_484_648, 45.93),
    "dit-dh-s": Size(196_455_764),
    "dit-dh-b": Size(294_295_892),
    "dit-dh-l": Size(621_744_436),
    "dit-dh-xl": Size(838_675_796),
    "lit-pixart-xl/2": Size(600e6),
    "d2it-l": Size(467e6),
    "d2it-xl": Size(687e6),
}


def build(name: str, **config: Any) -> nn.Module:
    """A model without memory: shapes only."""
    with torch.device("meta"):
        return models.create(name, **config).eval()


def measure(name: str, **config: Any) -> Size:
    """Count a named configuration, without its weights or any data.

    Args:
        name: as of `models.create`.
        **config: changes to the configuration; `input_size` is the size that is counted.
    """
    model: Any = build(name, **config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not hasattr(model, "example_inputs"):  # an autoencoder, say: no forward of a denoiser
        return Size(parameters)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**model.example_inputs())
    hidden = model.hidden_multiply_adds() if hasattr(model, "hidden_multiply_adds") else 0
    return Size(parameters, (counter.get_total_flops() / 2 + hidden) / 1e9)


def named(architecture: str) -> list[str]:
    """The named configurations of an architecture; its own name where it has none.

    Raises:
        UnknownNameError: no such architecture.
    """
    entry = registry.get("model", architecture)
    return [f"{entry.name}-{variant}" for variant in entry.variants] or [entry.name]
