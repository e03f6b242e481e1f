from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditkit.analysis.metrics import mean_absolute, psnr, relative_l2


def test_known_values() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_l2(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert mean_absolute(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.25)
    # an error of one tenth of the range everywhere is 20 dB
    assert psnr(np.full((2, 3), 0.6), np.full((2, 3), 0.5), data_range=1.0) == pytest.approx(20.0)


def test_range_of_latents_is_their_own() -> None:
    reference = np.array([-2.0, 2.0])
    assert psnr(reference + 0.4, reference) == pytest.approx(20.0)


def test_equal_is_infinite() -> None:
    picture = np.random.default_rng(0).random((4, 4, 3))
    assert psnr(picture, picture, 1.0) == math.inf
    assert relative_l2(picture, picture) == 0.0
    assert relative_l2(np.zeros(3), np.zeros(3)) == 0.0


@given(st.floats(1e-3, 1e3), st.integers(0, 2**16))
def test_relative_error_does_not_depend_on_scale(scale: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(2, 5, 7))
    assert relative_l2(scale * a, scale * b) == pytest.approx(relative_l2(a, b), rel=1e-9)


def test_bfloat16_is_compared_in_full_precision() -> None:
    value = torch.ones(8, dtype=torch.bfloat16)
    assert relative_l2(value, torch.ones(8)) == 0.0


@pytest.mark.parametrize("measure", [relative_l2, mean_absolute, psnr])
def test_shapes_have_to_agree(measure) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        measure(np.ones((2, 3)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="empty"):
        measure(np.ones(0), np.ones(0))


def test_nothing_to_relate_to() -> None:
    with pytest.raises(ValueError, match="zero everywhere"):
        relative_l2(np.ones(3), np.zeros(3))
    with pytest.raises(ValueError, match="data_range"):
        psnr(np.ones(3), np.zeros(3), data_range=0.0)
