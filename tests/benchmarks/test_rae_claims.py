"""The claims of representation autoencoders: what they are measured with, and that they can fail."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training import rae

GOOD = dict(zip(rae.WIDTHS, (0.63, 0.64, 0.38, 0.13, 0.02, 0.02), strict=True))


@pytest.mark.parametrize(
    ("changed", "verdicts"),
    [
        ({}, [True, True, True]),
        ({"width 96, depth 2": 0.3}, [False, True, True]),
        ({"width 32, depth 4": 0.2}, [True, False, True]),
        ({"32 with a head of 96": 0.5}, [True, True, False]),
    ],
)
def test_widths(changed: dict[str, float], verdicts: list[bool]) -> None:
    found = {name: [value, value + 0.001] for name, value in {**GOOD, **changed}.items()}
    claims = rae.width_claims(found)
    assert [claim.holds for claim in claims] == verdicts
    assert "0.50, 0.25, 0.00" in claims[0].limit


def test_shift_and_decoder() -> None:
    def verdict(without: float, shifted: float) -> bool | None:
        found = {"without a shift": [without, without + 0.01], "with the shift": [shifted, shifted + 0.02]}
        return rae.shift_claims(found, 20)[0].holds

    assert verdict(0.5, 0.2) and not verdict(0.2, 0.5)
    for on, better, slightly in ((20.5, False, True), (22.0, True, False), (18.0, False, False)):
        pair = {"without noise": [21.0, 21.1], "tau 0.8": [on, on + 0.2]}
        noisy, clean = rae.decoder_claims(pair, pair)
        assert noisy.holds == better and clean.holds == slightly


def test_what_it_is_measured_with() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 300, 4, generator=generator)
    assert abs(rae.energy_distance(one, other)) < 0.02 < 0.3 < rae.energy_distance(one, other + 1)
    basis = torch.linalg.qr(torch.randn(rae.NUMBERS, rae.CODES, generator=generator))[0].T
    latents = rae.toy_latents(500, basis, torch.randn(16, rae.CODES, generator=generator), generator)
    assert latents.shape == (500, *rae.SHAPE)
    assert 0.3 < float(latents.square().mean()) < 3
    assert torch.linalg.matrix_rank(latents.flatten(1)) == rae.CODES
    assert rae.overfit(rae.WIDTHS["width 32, depth 2"], 0, 2, "") > 0
    assert rae.sample_distance(4.0, 0, 2, 2, "") > 0
