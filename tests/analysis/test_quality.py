"""The yardstick for drawn pictures: zero for the truth, one for the average, worse for worse pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ditkit.analysis.quality import (
    COMPONENTS,
    Yardstick,
    _root_trace,
    features,
    frechet_distance,
    precision_and_recall,
)
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


def test_the_frechet_distance_is_that_of_the_reference_on_fixed_features() -> None:
    """SciPy's square root of the product, as the first implementation of FID takes it: within 0.1 %."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(96, 96, generator=generator, dtype=torch.float64)
    true = torch.randn(400, 96, generator=generator, dtype=torch.float64) @ mixing
    drawn = torch.randn(300, 96, generator=generator, dtype=torch.float64).abs() @ mixing.flip(0) * 0.7 + 0.3
    s1, s2 = np.cov(drawn.numpy().T), np.cov(true.numpy().T)
    shift = np.square(drawn.numpy().mean(0) - true.numpy().mean(0)).sum()
    expected = shift + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert frechet_distance(drawn, true) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_square_root_of_covariances_of_2048_features() -> None:
    """From fewer pictures than features, so the covariances are singular: with centred X (n, F) and Y (m, F),
    tr((A B)^(1/2)) is the sum of the singular values of X Y' / sqrt((n - 1) (m - 1))."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -6, 2048, dtype=torch.float64)
    x = torch.randn(200, 2048, generator=generator, dtype=torch.float64) * scales
    y = torch.randn(150, 2048, generator=generator, dtype=torch.float64) * scales.roll(40) + 0.1
    x, y = x - x.mean(0), y - y.mean(0)
    expected = torch.linalg.svdvals(x @ y.T).sum() / (199 * 149) ** 0.5
    assert float(_root_trace(torch.cov(x.T), torch.cov(y.T))) == pytest.approx(float(expected), rel=1e-5)


def test_precision_and_recall_by_hand() -> None:
    """True: four points on a line, reach 1. Drawn: two among them, one far off."""
    true = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    drawn = torch.tensor([[0.5], [0.6], [9.0]])
    assert precision_and_recall(drawn, true, neighbours=1) == (pytest.approx(2 / 3), 0.75)
    assert precision_and_recall(drawn, true, neighbours=2) == (pytest.approx(2 / 3), 1.0)
    assert precision_and_recall(true, true, neighbours=1) == (1.0, 1.0)
    with pytest.raises(ValueError, match="more than neighbours=3"):
        precision_and_recall(drawn, true)
