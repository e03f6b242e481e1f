"""D2iT's entropy, dual-grain encoder and routing against the predecessor's code; its own was not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.models.d2it_autoencoder import (
    DualGrainEncoder,
    copy_neighbours,
    distinct_weights,
    region_entropy,
)
from golden import cases, compare, part, read

SYSTEM = "d2it"
Tensors = dict[str, Tensor]


def encoder_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    encoder, inputs = DualGrainEncoder(**case["constructor"]).eval(), part(tensors, "inputs")
    encoder.load_state_dict(part(tensors, "weights"))
    coarse, fine = encoder(inputs["image"])
    grain = inputs["entropy"] > inputs["threshold"]
    return {
        "h_coarse": coarse,
        "h_fine": fine,
        "indices": grain.long(),
        "gate": torch.stack([~grain, grain], dim=1).long(),
        "h_dual": copy_neighbours(coarse, fine, grain),
        "codebook_mask": distinct_weights(grain),
    }


@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    if "constructor" in case:
        computed = encoder_outputs(case, tensors)
    else:
        image = tensors["inputs.image"]
        side = int(case.get("patch", image.shape[-1] // tensors["outputs.entropy"].shape[-1]))
        computed = {"entropy": region_entropy(image, side)}
    compare(computed, part(tensors, "outputs"), atol=1e-5)
