"""Ceilings: the formulas of the table they come from, and the counts of real runs below them."""

from __future__ import annotations

import pytest

import ditkit
import tiny_pipelines
from ditkit.analysis.sampling import Sampling, sample
from ditkit.seams import cost as cost_module
from ditkit.seams.cost import ModelCost, ceiling, together, words


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(0.01, (1.98, 2.94, 3.88, 4.81, 5.71)), (0.10, (1.82, 2.50, 3.08, 3.57, 4.00))],
)
def test_a_skipped_step(cost: float, expected: tuple[float, ...]) -> None:
    model = ModelCost(steps=60, whole=100.0, outside=100 * cost)
    for interval, most in zip(range(2, 7), expected, strict=True):
        assert model.skipping(60 // interval) == pytest.approx(most, abs=0.005)


def test_blocks_that_run_at_skipped_steps() -> None:
    model = ModelCost(steps=10, whole=10.0, outside=0.5, block=0.5)
    assert model.skipping(5, blocks=1) == pytest.approx(1 / (0.5 + 0.5 * 0.1))
    assert model.skipping(5, blocks=100) == 1.0


@pytest.mark.parametrize(
    ("share", "ceilings"),
    [(0.20, (1.25, 1.22, 1.18, 1.11)), (0.71, (3.45, 2.77, 2.14, 1.55)), (0.87, (7.7, 4.6, 2.9, 1.77))],
)
def test_sparse_attention(share: float, ceilings: tuple[float, ...]) -> None:
    model = ModelCost(steps=1, whole=1.0, attention=share)
    for density, most in zip((0.0, 0.1, 0.25, 0.5), ceilings, strict=True):
        assert model.sparse(density) == pytest.approx(most, rel=0.01)


def test_fewer_tokens() -> None:
    model = ModelCost(steps=1, whole=10.0, outside=1.0)
    assert model.on_tokens(1.0) == 1.0
    assert model.on_tokens(0.5) == pytest.approx(1 / (1 - 0.9 * 0.5))
    assert model.on_tokens(0.5, computed=0.5) == pytest.approx(1 / (1 - 0.9 * 0.25))


def test_savings_multiply_at_best() -> None:
    cost = ModelCost(steps=28, whole=10.0, attention=5.0, outside=0.1, grid=(1, 8, 8), text_length=4)
    methods = (ditkit.TaylorSeer(interval=4), ditkit.LocalWindow(radius=2))
    alone = [ceiling(method, cost) for method in methods]
    assert all(one is not None and one > 1 for one in alone)
    assert together(methods, cost) == pytest.approx(alone[0] * alone[1])
    assert ceiling(object(), cost) is None
    assert together([object()], cost) is None


def test_words_only_where_attention_is_little() -> None:
    assert words(ModelCost(1, 100.0, 50.0)) is None
    text = words(ModelCost(1, 100.0, 5.0, grid=(1, 8, 8), text_length=8))
    assert text is not None
    assert "5 %" in text
    assert "72 tokens" in text
    assert "1.05 times" in text


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.flux()


@pytest.mark.parametrize("granularity", ["last-block", "module"])
def test_the_report_states_the_ceiling_beside_the_count(pipe, granularity) -> None:
    method = ditkit.TaylorSeer(interval=4, granularity=granularity)
    with ditkit.apply(pipe, method) as run:
        assert run.report().ceilings == {}
        sample(pipe, ["red apple"], Sampling(steps=12))
    report = run.report()
    assert report.flops is not None
    assert report.flops_dense is not None
    (most,) = report.ceilings.values()
    # 3 warm-up steps and every fourth: 5 of 12; what a skipped step costs was counted.
    assert report.steps_computed == 5
    assert report.flops_dense / report.flops == pytest.approx(most, rel=1e-6)
    assert most < 12 / 5
    assert f"{most:.2f}x fewer with TaylorSeer" in str(report)


def test_the_report_says_that_attention_is_little(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the tiny model's FLOPs are attention, which is more than little."""
    with ditkit.apply(pipe, ditkit.LocalWindow(radius=2)) as run:
        sample(pipe, ["red apple"], Sampling(steps=2))
    assert "sparse attention" not in str(run.report())
    monkeypatch.setattr(cost_module, "LITTLE", 1.2)
    with ditkit.apply(pipe, ditkit.LocalWindow(radius=2)) as run:
        sample(pipe, ["red apple"], Sampling(steps=2))
    report = run.report()
    (most,) = report.ceilings.values()
    assert 1 < most < 1.1  # with the density of this radius
    assert "too little for sparse attention to pay" in str(report)
    with ditkit.apply(pipe, ditkit.TaylorSeer()) as run:
        sample(pipe, ["red apple"], Sampling(steps=2))
    assert not any("sparse attention" in note for note in run.report().notes)
