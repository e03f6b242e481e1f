"""Routing: masks, its place in every isotropic model, its losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import CASES, inputs
from ditkit import models
from ditkit.models.dit import DiT, SiT
from ditkit.models.dtr import UncertaintyWeighting, grouped_timesteps
from ditkit.models.routing import ChannelRouting, channel_masks, route

TINY: dict[str, Any] = dict(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)


@pytest.mark.parametrize(
    ("width", "active", "starts"),
    [(384, 307, (0, 0, 5, 24, 51, 77)), (1152, 921, (0, 1, 14, 73, 152, 231))],
)
def test_windows(width: int, active: int, starts: tuple[int, ...]) -> None:
    masks = channel_masks(1000, width)
    assert (masks.sum(1) == active).all()
    assert masks.argmax(1)[[0, 250, 500, 750, 900, 999]].tolist() == list(starts)


def test_random_pattern() -> None:
    masks = channel_masks(50, 30, 0.8, pattern="random", seed=1)
    assert (masks.sum(1) == 24).all() and len(masks.unique(dim=0)) > 40
    assert torch.equal(masks, channel_masks(50, 30, 0.8, pattern="random", seed=1))
    assert not torch.equal(masks, channel_masks(50, 30, 0.8, pattern="random", seed=2))


def test_full_sharing_is_the_plain_model() -> None:
    plain = CASES["dtr"].model(routing={"sharing_ratio": 1.0})
    other = DiT(**TINY).eval()
    other.load_state_dict(plain.state_dict())
    assert torch.equal(plain(*inputs(plain)).sample, other(*inputs(plain)).sample)


def test_added_to_a_model_that_is_there(tmp_path: Path) -> None:
    made = CASES["dtr"].model()
    added = DiT(**TINY).eval()
    added.load_state_dict(made.state_dict())
    batch = inputs(made)
    assert not torch.equal(added(*batch).sample, made(*batch).sample)
    route(added, sharing_ratio=0.8)
    assert torch.equal(added(*batch).sample, made(*batch).sample)
    added.save_pretrained(tmp_path)
    assert torch.equal(DiT.from_pretrained(tmp_path)(*batch).sample, made(*batch).sample)


def test_of_any_isotropic_model() -> None:
    with torch.device("meta"):
        routed = models.create("dtr-sit-s/4", num_classes=3)
    assert isinstance(routed, SiT) and routed.config["routing"] == {"sharing_ratio": 0.8}
    with pytest.raises(TypeError, match="DiCo can't be routed"):
        route(CASES["dico"].model())


def test_unit_times_run_from_noise() -> None:
    routing, table = ChannelRouting(32, unit_time=True), channel_masks(1000, 32)
    masks = routing(torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(masks[:, 0], table[[999, 500, 0]])  # 0 is noise, the last row; 499.5 rounds to even


def test_parts_need_the_timestep() -> None:
    model = CASES["dtr"].model()
    latent, times, labels = inputs(model)
    tokens, conditioning = model.embed(latent, times, labels)
    with pytest.raises(ValueError, match="timestep"):
        model.run_blocks(tokens, conditioning)
    tokens = model.run_blocks(tokens, conditioning, 0, 1, timestep=times)
    tokens = model.run_blocks(tokens, conditioning, 1, timestep=times)
    assert torch.equal(model.head(tokens, conditioning, (4, 4)), model(latent, times, labels).sample)


def test_wrong_options_are_explained() -> None:
    for options in ({"sharing_ratio": 0.0}, {"sharing_ratio": 1.5}, {"alpha": 0}):
        with pytest.raises(ValueError, match="sharing_ratio="):
            ChannelRouting(32, **options)
    with pytest.raises(ValueError, match="pattern"):
        ChannelRouting(32, pattern="rows")  # pyright: ignore[reportArgumentType]


def test_groups_of_timesteps() -> None:
    t = grouped_timesteps(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(t // 125, torch.arange(8).repeat_interleave(2))
    with pytest.raises(ValueError, match="multiples of 8"):
        grouped_timesteps(12)


def test_uncertainty_weights_learn() -> None:
    weighting = UncertaintyWeighting(2)
    loss = weighting(torch.tensor([4.0, 4.0, 1.0, 1.0]))
    assert loss.item() == pytest.approx(0.5 * (2.0 + 0.5))
    loss.backward()
    assert weighting.loss_scale.grad is not None
    assert weighting.loss_scale.grad.tolist() == pytest.approx([-0.5, 0.25])
    with pytest.raises(ValueError, match="3 losses"):
        weighting(torch.ones(3))
