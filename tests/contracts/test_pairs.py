"""Every pair of registered methods: they work together, in either order with one result, or refuse by name.

Written from the registry: a new method is tested with all others without a line here.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

import ditkit
import tiny_pipelines
from contracts.test_methods import active
from ditkit import registry
from ditkit.analysis.meter import count
from ditkit.analysis.metrics import relative_l2
from ditkit.analysis.sampling import Sampling, sample
from ditkit.seams.errors import ConflictError
from ditkit.seams.stats import Report

METHODS = registry.entries("method")
PAIRS = list(itertools.combinations_with_replacement(METHODS, 2))
SAMPLING = Sampling(steps=8, guidance=2.0)


@functools.cache
def pipe() -> Any:
    return tiny_pipelines.flux()


def draw(*names: str) -> tuple[torch.Tensor, Report]:
    with ditkit.apply(pipe(), *(active(METHODS[name]) for name in names)) as run:
        latents = sample(pipe(), ["red apple"], SAMPLING).latents
    assert latents is not None
    return latents, run.report()


@functools.cache
def dense() -> torch.Tensor:
    latents = sample(pipe(), ["red apple"], SAMPLING).latents
    assert latents is not None
    return latents


@functools.cache
def error(*names: str) -> float:
    return relative_l2(draw(*names)[0], dense())


def refusal(one: str, other: str) -> str | None:
    """What is said before any work when a pair is refused; None when it is taken."""
    try:
        with ditkit.apply(pipe(), active(METHODS[one]), active(METHODS[other])):
            return None
    except ConflictError as conflict:
        return str(conflict)


def attributes() -> dict[str, set[str]]:
    """Of every module: nothing is hooked by a refusal, nothing stays after a removal."""
    return {name: set(vars(module)) for name, module in pipe().transformer.named_modules()}


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_pair_works_or_is_refused_by_name(one: str, other: str) -> None:
    first, second = METHODS[one], METHODS[other]
    before = attributes()
    said = refusal(one, other)
    assert attributes() == before
    assert (said is None) == (refusal(other, one) is None)
    exclusive = (
        first.target.claims & second.target.claims or other in first.conflicts or one in second.conflicts
    )
    if exclusive:
        assert said is not None
    if said is not None:
        assert first.target.__name__ in said
        assert second.target.__name__ in said
        return
    with count(pipe().transformer) as spent:
        together, report = draw(one, other)
    assert torch.equal(together, draw(other, one)[0])
    assert relative_l2(together, dense()) <= 2 * (error(one) + error(other))
    assert report.steps == report.steps_computed + report.steps_forecast == SAMPLING.steps
    assert report.flops == pytest.approx(spent.flops, rel=0.01)


def test_the_model_is_left_as_it_was() -> None:
    before = dense()
    for one, other in PAIRS:
        if refusal(one, other) is None:
            draw(one, other)
            break
    after = sample(pipe(), ["red apple"], SAMPLING).latents
    assert after is not None
    assert torch.equal(after, before)
