"""The yardstick for drawn pictures: zero for the truth, one for the average, worse for worse pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ditkit.analysis.quality import COMPONENTS, Yardstick, features
from ditkit.data.emoji import EmojiDataset


@pytest.fixture(scope="module")
def truth() -> tuple[torch.Tensor, torch.Tensor]:
    data = EmojiDataset(groups=["flag", "keycap"])
    images = torch.nn.functional.interpolate(data.images(), size=16, mode="area")
    return images, torch.tensor([row.group == "keycap" for row in data.rows]).long()


def test_features_see_colours_and_edges() -> None:
    flat = torch.zeros(1, 3, 16, 16)
    striped = flat.clone()
    striped[..., ::2] = 1.0
    striped[..., 1::2] = -1.0
    assert features(flat).shape == (1, 224)
    assert torch.equal(features(flat)[:, :192], features(striped)[:, :192])  # stripes average out
    across, down = features(striped)[0, 192:208], features(striped)[0, 208:]
    assert across.min() > 1.0 and down.abs().max() == 0.0


def test_the_truth_has_no_distance(truth) -> None:
    images, labels = truth
    assert Yardstick(images, labels).distance(images) == pytest.approx(0.0, abs=1e-9)


def test_the_average_picture_has_distance_one(truth) -> None:
    """One at the mean of the features, up to the noise that keeps the pictures from being one."""
    images, labels = truth
    yardstick = Yardstick(images, labels)
    middle = yardstick.points.mean(0)
    nearest = yardstick.points[:2] * 0 + middle
    yardstick.place = lambda _: nearest  # type: ignore[method-assign]
    assert yardstick.distance(images[:2]) == pytest.approx(1.0)


def test_the_distance_is_the_closed_form(truth) -> None:
    images, labels = truth
    yardstick = Yardstick(images, labels)
    drawn = images[:80].flip(3) * 0.7
    points = yardstick.place(drawn).numpy()
    assert points.shape[1] == COMPONENTS
    true = yardstick.points.numpy()
    s1, s2 = np.cov(points.T), np.cov(true.T)
    root = sqrtm(s1 @ s2).real
    expected = np.square(points.mean(0) - true.mean(0)).sum() + np.trace(s1 + s2 - 2 * root)
    assert yardstick.distance(drawn) == pytest.approx(expected / np.trace(s2), rel=1e-5)


def test_more_noise_is_further(truth) -> None:
    images, labels = truth
    yardstick = Yardstick(images, labels)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = [yardstick.distance(images + scale * noise) for scale in (0.1, 0.5, 1.0)]
    assert distances == sorted(distances) and distances[0] < distances[2] / 2


def test_classes_are_recognised(truth) -> None:
    images, labels = truth
    yardstick = Yardstick(images, labels)
    assert yardstick.recognised(images, labels) == 1.0
    assert yardstick.recognised(images, 1 - labels) == 0.0
    assert yardstick.recognisable() > 0.9  # flags and keycaps look unlike each other


def test_two_pictures_are_needed(truth) -> None:
    images, labels = truth
    with pytest.raises(ValueError, match="1 true pictures"):
        Yardstick(images[:1], labels[:1])
    with pytest.raises(ValueError, match="1 drawn pictures"):
        Yardstick(images, labels).distance(images[:1])
