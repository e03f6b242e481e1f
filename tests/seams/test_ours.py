"""Methods on the architectures of `ditkit.models`: they run where blocks are alike, else are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ditkit
from architectures import CASES, inputs
from ditkit.methods.clear import LocalWindow
from ditkit.methods.taylorseer import TaylorSeer
from ditkit.seams.errors import SeamError, UnsupportedModelError
from ditkit.seams.facts.ours import REFUSED

ISOTROPIC = ("dtr", "switch-dit", "lit")
OTHERS = {"dico": "DiCo", "dimr": "DiMR", "lamamba-diff": "LaMambaDiff", "pt-dit": "PTDiT", "d2it": "D2iT"}


def denoise(model: Any, steps: int = 6) -> torch.Tensor:
    """A few steps towards the prediction."""
    latent, _, labels = inputs(model)
    for t in torch.linspace(900, 0, steps):
        latent = latent - 0.1 * model(latent, t.expand(2), labels).sample[:, :4]
    return latent


@pytest.mark.parametrize("name", ISOTROPIC)
@pytest.mark.parametrize("granularity", ["last-block", "module"])
@torch.no_grad()
def test_caches_run_on_isotropic_models(name: str, granularity: Any) -> None:
    model = CASES[name].model()
    dense = denoise(model)
    with ditkit.apply(model, TaylorSeer(interval=1, granularity=granularity)):
        assert torch.equal(denoise(model), dense)
    with ditkit.apply(model, TaylorSeer(interval=2, granularity=granularity)):
        forecast = denoise(model)
    assert not torch.equal(forecast, dense) and torch.equal(denoise(model), dense)


@pytest.mark.parametrize("name", ["dtr", "switch-dit"])
@torch.no_grad()
def test_attention_methods_reach_masked_blocks(name: str) -> None:
    model = CASES[name].model()
    dense = denoise(model)
    with ditkit.apply(model, LocalWindow(radius=1)):
        assert not torch.equal(denoise(model), dense)
    assert torch.equal(denoise(model), dense)


def test_linear_attention_is_refused_with_the_reason() -> None:
    with pytest.raises(SeamError, match="linear"):
        ditkit.apply(CASES["lit"].model(), LocalWindow(radius=1))


@pytest.mark.parametrize(("name", "cls"), OTHERS.items())
def test_other_structures_are_refused_with_the_reason(name: str, cls: str) -> None:
    with pytest.raises(UnsupportedModelError, match=cls) as refusal:
        ditkit.apply(CASES[name].model(), TaylorSeer())
    assert REFUSED[cls] in str(refusal.value)
