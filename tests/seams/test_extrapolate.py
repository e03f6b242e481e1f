"""Finite-difference forecasts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditkit.seams.extrapolate import Trajectory


def polynomial(coefficients: list[float], x: float) -> torch.Tensor:
    return torch.tensor([sum(c * x**i for i, c in enumerate(coefficients))], dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    coefficients=st.lists(st.floats(-2, 2), min_size=1, max_size=5),
    gaps=st.lists(st.integers(1, 6), min_size=5, max_size=9),
    ahead=st.integers(1, 6),
)
def test_newton_continues_polynomials_over_uneven_gaps(
    coefficients: list[float], gaps: list[int], ahead: int
) -> None:
    trajectory, x = Trajectory(len(coefficients) - 1, "newton"), 0.0
    for gap in gaps:
        trajectory.add(x, polynomial(coefficients, x))
        last, x = x, x + gap
    expected = polynomial(coefficients, last + ahead)
    torch.testing.assert_close(trajectory.at(last + ahead), expected, atol=1e-5, rtol=1e-7)


def test_the_authors_series_lags_by_half_a_gap_on_a_parabola() -> None:
    """On f(x) = x^2 sampled every d, order 1 is off by k^2 + k d, and order 2 only mends the k^2."""
    d, k = 4, 3
    errors = {}
    for order in (0, 1, 2):
        trajectory = Trajectory(order, "authors")
        for x in range(0, 5 * d, d):
            trajectory.add(x, polynomial([0, 0, 1], x))
        errors[order] = float((polynomial([0, 0, 1], x + k) - trajectory.at(x + k)).squeeze())
    assert errors[1] == pytest.approx(k**2 + k * d)
    assert errors[2] == pytest.approx(k * d)


def test_order_one_is_the_same_line_in_both_and_order_zero_the_last_value() -> None:
    values = torch.randn(4, 3, 5)
    lines = []
    for expansion in ("authors", "newton"):
        line, reuse = Trajectory(1, expansion), Trajectory(0, expansion)
        for x, value in zip((0, 1, 4, 9), values, strict=True):
            line.add(x, value)
            reuse.add(x, value)
        lines.append(line.at(11))
        assert torch.equal(reuse.at(11), values[-1])
    torch.testing.assert_close(lines[0], lines[1])
    torch.testing.assert_close(lines[0], values[3] + (values[3] - values[2]) / 5 * 2)


@pytest.mark.parametrize("expansion", ["authors", "newton"])
def test_beyond_its_reach_the_last_value_is_kept(expansion: Any) -> None:
    trajectory = Trajectory(2, expansion, reach=1.5)
    for x in (0, 1, 5):
        trajectory.add(x, polynomial([1, 2], x))
    # The last gap is 4: up to 6 ahead the line goes on, then its last value stands.
    torch.testing.assert_close(trajectory.at(11), polynomial([1, 2], 11))
    assert torch.equal(trajectory.at(11.5), polynomial([1, 2], 5))


def test_another_shape_starts_afresh() -> None:
    trajectory = Trajectory(2)
    for x in range(3):
        trajectory.add(x, torch.full((2,), float(x)))
    trajectory.add(3, torch.ones(3))
    assert len(trajectory.factors) == 1 and torch.equal(trajectory.at(5), torch.ones(3))


def test_the_order_may_be_held_back() -> None:
    trajectory = Trajectory(2)
    trajectory.add(0, torch.ones(1))
    trajectory.add(1, torch.ones(1), order=0)
    assert len(trajectory.factors) == 1
    trajectory.add(2, torch.ones(1))
    assert len(trajectory.factors) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_and_bytes(dtype: torch.dtype) -> None:
    trajectory = Trajectory(1, dtype=torch.float32)
    for x in range(2):
        trajectory.add(x, torch.full((4, 8), float(x), dtype=dtype))
    assert trajectory.at(2).dtype == dtype
    assert torch.equal(trajectory.at(2), torch.full((4, 8), 2.0, dtype=dtype))
    assert trajectory.nbytes == 2 * 4 * 8 * 4


def test_a_slice_does_not_keep_the_whole_alive() -> None:
    trajectory = Trajectory(0)
    trajectory.add(0, torch.randn(100, 8)[:4])
    assert trajectory.factors[0].untyped_storage().nbytes() == trajectory.nbytes == 4 * 8 * 4


def test_values_carry_no_gradient() -> None:
    trajectory = Trajectory(1)
    weight = torch.ones(2, requires_grad=True)
    for x in range(2):
        trajectory.add(x, weight * x)
    assert not trajectory.at(2).requires_grad


def test_unknown_expansion() -> None:
    with pytest.raises(ValueError, match="expansion must be one of authors, newton; got 'taylor'"):
        Trajectory(1, "taylor")  # type: ignore[arg-type]
