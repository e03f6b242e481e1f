"""How far drawn pictures are from the true ones, by small features: hand-made ones, or a small network's.

The hand-made features of a picture are 8 x 8 area-averaged colours (192 numbers) and, on a grid of 4 x 4, the
mean size of the brightness's horizontal and of its vertical differences (32 numbers). These, or those of a
network that is given, are standardised over the true pictures and projected on their first 32 principal
components. On these, drawn and true pictures are compared as two normal distributions: the Frechet distance
|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau, "The Frechet distance between multivariate
normal distributions", 1982), here divided by the true pictures' total variance. 0 is equal; 1 is what drawing
nothing but the average picture gives.

Precision is the share of drawn pictures that lie within reach of a true one, recall that of true pictures
within reach of a drawn one; a picture's reach is the distance of its k-th nearest neighbour among its own
kind (Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models", arXiv
1904.06991).

This is not FID, whose features are an Inception network's (`inception.py`): figures compare only with figures
of this file, of the same features, on the same pictures, the same size and the same number of drawn pictures.

Dimensions: B pictures, N true pictures, F features, K components.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ditkit.models.teachers import Teacher

BATCH = 128
COLOUR_GRID, GRADIENT_GRID, COMPONENTS = 8, 4, 32


def features(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, 224), float64; other sizes than 8 x 8 are averaged to it."""
    images = images.clamp(-1, 1).double()
    colours = F.interpolate(images, size=COLOUR_GRID, mode="area").flatten(1)  # (B, 192)
    brightness = images.mean(1, keepdim=True)  # (B, 1, H, W)
    across = F.pad(brightness.diff(dim=3).abs(), (0, 1))  # (B, 1, H, W), nothing beyond the last column
    down = F.pad(brightness.diff(dim=2).abs(), (0, 0, 0, 1))
    edges = F.interpolate(torch.cat([across, down], dim=1), size=GRADIENT_GRID, mode="area").flatten(1)
    return torch.cat([colours, edges], dim=1)


def seen_by(teacher: Teacher) -> Callable[[Tensor], Tensor]:
    """The features of a frozen vision transformer: of pictures (B, 3, H, W), the mean of its patches' last
    tokens (B, F)."""

    def look(images: Tensor) -> Tensor:
        grid = (max(1, images.shape[2] // teacher.patch[0]), max(1, images.shape[3] // teacher.patch[1]))
        return torch.cat([teacher(part, grid).tokens.mean(1) for part in images.split(BATCH)])

    return look


class Yardstick:
    """The true pictures, ready to be compared with.

    Args:
        images: true pictures, (N, 3, H, W) in [-1, 1], of the size that is drawn.
        labels: their classes, (N,).
        look: gives the features (B, F) of pictures like them.

    Raises:
        ValueError: fewer than two pictures.
    """

    def __init__(self, images: Tensor, labels: Tensor, look: Callable[[Tensor], Tensor] = features) -> None:
        if len(images) < 2:
            raise ValueError(f"{len(images)} true pictures have no spread to compare with")
        self.labels, self._look = labels, look
        found = look(images).double()
        self._centre, self._scale = found.mean(0), found.std(0)
        # What is the same in all true pictures tells nothing; dividing by its spread would tell too much.
        self._scale = torch.where(self._scale < 1e-6, torch.inf, self._scale)
        standard = (found - self._centre) / self._scale
        self._basis = torch.linalg.svd(standard, full_matrices=False).Vh[:COMPONENTS].T  # (F, K)
        self.points = standard @ self._basis  # (N, K)
        self._covariance = torch.cov(self.points.T)

    def place(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to their components, (B, K)."""
        return ((self._look(images).double() - self._centre) / self._scale) @ self._basis

    def distance(self, images: Tensor) -> float:
        """The Frechet distance of pictures (B, 3, H, W) from the true ones, over their total variance.

        Raises:
            ValueError: fewer than two pictures.
        """
        if len(images) < 2:
            raise ValueError(f"{len(images)} drawn pictures have no spread to compare")
        return frechet_distance(self.place(images), self.points) / float(self._covariance.trace())

    def precision_and_recall(self, images: Tensor, neighbours: int = 3) -> tuple[float, float]:
        """Of pictures (B, 3, H, W) among the true ones, see `precision_and_recall`."""
        return precision_and_recall(self.place(images), self.points, neighbours)

    def recognisable(self) -> float:
        """Share of true pictures whose nearest other one is of their class: what drawing them would score."""
        between = torch.cdist(self.points, self.points).fill_diagonal_(torch.inf)  # (N, N)
        return float((self.labels[between.argmin(1)] == self.labels).float().mean())

    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """Share of pictures (B, 3, H, W) whose nearest true picture is of the class (B,) asked for."""
        return float(self.recognises(images, labels).float().mean())

    def recognises(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of each picture, whether its nearest true one is of the class asked for, (B,)."""
        nearest = torch.cdist(self.place(images), self.points).argmin(1)
        return self.labels[nearest] == labels


def frechet_distance(drawn: Tensor, true: Tensor) -> float:
    """The squared Frechet distance of the normal distributions with the means and covariances of features
    (B, F) and (N, F): 0 for the same, not divided by anything.

    Raises:
        ValueError: fewer than two of either.
    """
    if min(len(drawn), len(true)) < 2:
        raise ValueError(f"{len(drawn)} drawn and {len(true)} true pictures: two of each have a spread")
    drawn, true = drawn.double(), true.double()
    first, second = torch.cov(drawn.T), torch.cov(true.T)
    shift = (drawn.mean(0) - true.mean(0)).square().sum()
    return float(shift + (first + second).trace() - 2 * _root_trace(first, second))


def precision_and_recall(drawn: Tensor, true: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """How much of what is drawn is like something true, and how much of what is true is drawn, 0 to 1.

    Args:
        drawn, true: features (B, F) and (N, F).
        neighbours: k, by whose distance a picture reaches.

    Raises:
        ValueError: not more than k of either.
    """
    if min(len(drawn), len(true)) <= neighbours:
        raise ValueError(
            f"{len(drawn)} drawn and {len(true)} true pictures: more than neighbours={neighbours} are needed"
        )
    between = torch.cdist(drawn.double(), true.double())  # (B, N)
    precision = (between <= _reach(true, neighbours)).any(1)  # (B,)
    recall = (between <= _reach(drawn, neighbours)[:, None]).any(0)  # (N,)
    return float(precision.double().mean()), float(recall.double().mean())


def _reach(points: Tensor, neighbours: int) -> Tensor:
    """The distance of each point's k-th nearest other one, (N,) of (N, F)."""
    apart = torch.cdist(points.double(), points.double())
    return apart.kthvalue(neighbours + 1, dim=1).values  # the nearest is the point itself


def _root_trace(first: Tensor, second: Tensor) -> Tensor:
    """tr((A B)^(1/2)) of two covariances (K, K), by the symmetric B^(1/2) A B^(1/2)."""
    values, vectors = torch.linalg.eigh(second)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return torch.linalg.eigvalsh(root @ first @ root).clamp(min=0).sqrt().sum()
