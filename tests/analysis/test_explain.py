"""What is said before a run agrees with what is counted in it."""

from __future__ import annotations

import pytest
import torch

import ditkit
import tiny_pipelines
from ditkit.analysis import explain as module
from ditkit.analysis.explain import PipelineCost, expect, explain
from ditkit.analysis.meter import count
from ditkit.analysis.sampling import Sampling, sample
from ditkit.recipes import Recipe
from ditkit.seams.cost import ModelCost

PROMPTS = ["red apple", "blue fish"]
SAMPLING = Sampling(steps=12)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.flux()


@pytest.fixture(scope="module")
def cost(pipe):
    return module.measure(pipe, PROMPTS, SAMPLING)


def test_a_forward_is_counted(pipe, cost) -> None:
    with count(pipe.transformer) as spent:
        sample(pipe, PROMPTS, Sampling(steps=1))
    flops = cost.flops
    assert flops.whole == pytest.approx(spent.flops, rel=1e-3)
    assert (flops.steps, flops.grid, flops.text_length) == (12, (1, 4, 4), 8)
    # 4 blocks, 24 tokens, width 32: scores and values, 2 FLOPs a multiply-add.
    assert flops.attention == len(PROMPTS) * 4 * 2 * 2 * 24 * 24 * 32
    assert 0 < flops.outside < 0.2 * flops.whole
    assert flops.outside + 4 * flops.block == pytest.approx(flops.whole)


def test_nothing_stays_on_the_model(pipe, cost) -> None:
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())
    dense = sample(pipe, PROMPTS, SAMPLING).latents
    module.measure(pipe, PROMPTS, SAMPLING)
    assert torch.equal(sample(pipe, PROMPTS, SAMPLING).latents, dense)


@pytest.mark.parametrize(
    "method",
    [
        ditkit.TaylorSeer(interval=3, granularity="last-block"),
        ditkit.TaylorSeer(interval=3),
        ditkit.LocalWindow(radius=2, executor="gather"),
    ],
)
def test_no_run_beats_its_ceiling(pipe, cost, method) -> None:
    said = expect(method, cost)
    with ditkit.apply(pipe, method) as run:
        sample(pipe, PROMPTS, SAMPLING)
    report = run.report()
    assert report.flops_dense / report.flops <= said.ceiling * 1.001
    if method.claims == {"blocks"}:
        assert report.flops_dense / report.flops >= said.ceiling * 0.85


def test_times_follow_the_formula() -> None:
    seconds = ModelCost(steps=10, whole=0.1, outside=0.01, attention=0.05)
    cost = PipelineCost(seconds, seconds, beside=1.0)
    assert cost.share_of_steps == 0.5
    assert cost.end_to_end(2.0) == pytest.approx(0.75)
    method = ditkit.TaylorSeer(interval=2, warmup=1)
    computed = method.computed_steps(10)
    expected = (1.0 + computed * 0.1 + (10 - computed) * 0.01) / 2.0
    assert expect(method, cost).time_ratio == pytest.approx(expected)
    fewer = expect(Recipe.of([method], steps=5), cost)
    computed = method.computed_steps(5)
    assert fewer.time_ratio == pytest.approx((1.0 + computed * 0.1 + (5 - computed) * 0.01) / 2.0)
    assert expect(Recipe.of([], steps=5), cost).time_ratio == pytest.approx(0.75)


def test_words_for_attention_only(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.seams.cost.LITTLE", 1.2)
    _, (sparse, cache) = explain(pipe, ["local-window:radius=2", "taylorseer"], PROMPTS, SAMPLING)
    assert "too little for sparse attention" in sparse.notes[0]
    assert cache.notes == []
    assert sparse.label == "local-window:radius=2"
