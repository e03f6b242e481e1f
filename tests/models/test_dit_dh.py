"""DiT-DH: what it has beyond the shared tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ditkit
from architectures import CASES, inputs
from ditkit.methods.clear import LocalWindow
from ditkit.methods.taylorseer import TaylorSeer
from ditkit.models.dit_dh import DiTDH
from ditkit.models.layers import axial_rotary, rotate
from ditkit.seams.errors import SeamError
from ditkit.seams.taps import Reading, reading


def model(**config: Any) -> Any:
    return CASES["dit-dh"].model(**config)


def batch(network: Any) -> tuple[torch.Tensor, ...]:
    latent, _, labels = inputs(network)
    return latent, torch.tensor([0.2, 0.7]), labels


def test_starts_at_zero() -> None:
    network = DiTDH(**CASES["dit-dh"].tiny).eval()
    assert network(*batch(network)).sample.abs().max() == 0


@torch.no_grad()
def test_the_head_takes_tokens_of_an_earlier_time() -> None:
    network = model()
    latent, time, labels = batch(network)
    tokens = network.backbone(latent, time, labels)
    assert tokens.shape == (2, 64, 16)
    given = network(latent, time, labels, backbone_tokens=tokens).sample
    assert torch.equal(given, network(latent, time, labels).sample)
    assert torch.equal(network(latent, time + 0.1, labels, backbone_tokens=tokens).sample, given)
    assert not torch.equal(network(latent * 0.9, time, labels, backbone_tokens=tokens).sample, given)
    with pytest.raises(ValueError, match=r"backbone_tokens has shape \(2, 60, 16\); expected \(2, 64, 16\)"):
        network(latent, time, labels, backbone_tokens=tokens[:, :60])


@pytest.mark.parametrize(
    "config",
    [
        {"patch_size": 2},
        {"rope": False},
        {"position_table": False},
        {"hidden_size": (16, 16), "num_heads": (2, 2)},
    ],
)
@torch.no_grad()
def test_what_the_authors_code_does_not_run(config: dict[str, Any]) -> None:
    network = model(**config)
    latent, time, labels = batch(network)
    found = network(latent, time, labels).sample
    assert found.shape == latent.shape and found.isfinite().all()
    turned = network(latent.flip(-1), time, labels).sample.flip(-1)
    assert not torch.allclose(found, turned, atol=1e-4)  # it knows where its tokens are


def test_what_can_not_be_built() -> None:
    with pytest.raises(ValueError, match="would not know where they are"):
        model(rope=False, position_table=False)
    with pytest.raises(ValueError, match="a head of 6 channels"):
        model(hidden_size=(12, 32))
    assert "process: flow" in (model().unfit_for("gaussian") or "")


def test_rotary_positions_are_relative() -> None:
    rotary = axial_rotary(8, 5, 5)
    query, key = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 25, 8)
    scores = (rotate(query, rotary) @ rotate(key, rotary).transpose(-1, -2))[0, 0].view(5, 5, 5, 5)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 1, 3, 3])
    torch.testing.assert_close(scores[3, 4, 1, 0], scores[4, 4, 2, 0])
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])


@torch.no_grad()
def test_methods_and_taps() -> None:
    network = model()
    dense = network(*batch(network)).sample
    with reading(network, Reading(frozenset({2, 3}), frozenset({1}))) as inside:
        network(*batch(network))
    assert inside.hidden[2].shape == (2, 64, 16) and inside.hidden[3].shape == (2, 64, 32)
    assert inside.attention[1].query.shape == (2, 2, 64, 8)
    with ditkit.apply(network, LocalWindow(radius=1)):
        assert not torch.equal(network(*batch(network)).sample, dense)
    with ditkit.apply(network, TaylorSeer(interval=1, granularity="module")):
        assert torch.equal(network(*batch(network)).sample, dense)
    with pytest.raises(SeamError, match="reads the picture again"):
        ditkit.apply(network, TaylorSeer(granularity="last-block"))
