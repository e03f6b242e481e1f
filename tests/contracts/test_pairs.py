"""Every pair of registered methods: they run together, in either order with one result, or refuse by name."""

from __future__ import annotations

import itertools

import pytest
import torch

import ditkit
import tiny_pipelines
from ditkit import registry
from ditkit.analysis.sampling import Sampling, sample
from ditkit.seams.errors import ConflictError

# What a method can't do without.
NEEDED = {"harmonica": {"uniform": 2}}
PAIRS = list(itertools.combinations_with_replacement(registry.entries("method"), 2))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.flux()


def apply(pipe, *names: str) -> ditkit.Run:
    return ditkit.apply(pipe, *(registry.get("method", name).target(**NEEDED.get(name, {})) for name in names))


def draw(pipe, *names: str) -> torch.Tensor:
    with apply(pipe, *names):
        latents = sample(pipe, ["red apple"], Sampling(steps=8, guidance=2.0)).latents
    assert latents is not None
    return latents


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_pair(pipe, one: str, other: str) -> None:
    first, second = registry.get("method", one).target, registry.get("method", other).target
    try:
        drawn = draw(pipe, one, other)
    except ConflictError:
        drawn = None
    if drawn is not None:
        assert not first.claims & second.claims
        assert torch.equal(drawn, draw(pipe, other, one))
        return
    for names in ((one, other), (other, one)):
        with pytest.raises(ConflictError) as refusal:
            apply(pipe, *names)  # before any forward
        assert first.__name__ in str(refusal.value)
        assert second.__name__ in str(refusal.value)
