"""Other libraries' caches: each runs on a tiny pipeline, changes something, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

import tiny_pipelines
from ditkit.analysis import peers
from ditkit.analysis.contestants import Contestant
from ditkit.analysis.sampling import Sampling, sample

PROMPTS = ["red apple"]
SAMPLING = Sampling(steps=10)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.flux()


@pytest.fixture(scope="module")
def found(pipe):
    return peers.sweep(pipe, SAMPLING, PROMPTS)


def latents(pipe, contestant: Contestant | None = None) -> torch.Tensor:
    if contestant is None:
        drawn = sample(pipe, PROMPTS, SAMPLING).latents
    else:
        with contestant.attach(pipe, False):
            drawn = sample(pipe, PROMPTS, SAMPLING).latents
    assert drawn is not None
    return drawn


def test_who_is_there(found) -> None:
    ours = {name for name in found if name.startswith("diffusers")}
    assert ours == {
        f"diffusers {name}" for name in ("TaylorSeer", "FirstBlockCache", "MagCache", "PAB", "FasterCache")
    }
    assert ("cache-dit DBCache + TaylorSeer" in found) == peers.has_cache_dit()
    labels = [one.label for group in found.values() for one in group]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    "name", [f"diffusers {x}" for x in ("TaylorSeer", "FirstBlockCache", "MagCache", "PAB", "FasterCache")]
)
def test_the_boldest_setting_changes_the_result_and_leaves_no_trace(pipe, found, name: str) -> None:
    dense = latents(pipe)
    contestant = found[name][-1]
    fast = latents(pipe, contestant)
    assert not torch.equal(fast, dense)
    assert fast.isfinite().all()
    assert torch.equal(latents(pipe, contestant), fast)
    assert torch.equal(latents(pipe), dense)


def test_magcache_is_calibrated_on_this_model(pipe) -> None:
    ratios = peers.mag_ratios(pipe, SAMPLING, PROMPTS)
    assert len(ratios) == SAMPLING.steps
    assert ratios[0] == 1.0
    assert len(set(ratios)) > 2
    assert not pipe.transformer.is_cache_enabled


def test_a_pipeline_without_hooks_gets_no_peer() -> None:
    assert peers.at_intervals(object(), [3], SAMPLING) == [] or peers.has_cache_dit()
