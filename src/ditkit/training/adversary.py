"""An adversary for pictures, and a distance between them, both in the eyes of a frozen vision transformer.

The discriminator reads the tokens behind some layers of the transformer with a small trained head for each:
a 1 x 1 and a residual convolution over the sequence of tokens, spectrally normalised, with batch norm (the
heads of StyleGAN-T, arXiv 2301.09515, section 3.2). Its loss is the hinge loss. Pictures are augmented as in
arXiv 2006.10738 (colour and translation). Here the largest singular value is computed, not iterated towards,
and batch norm keeps no running statistics, so that nothing but parameters has to be saved to continue.

Dimensions: B pictures of H x W pixels, R x S patches, T = R S, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import register_parametrization

from ditkit.models.teachers import Teacher

Grid = tuple[int, int]


class _UnitNorm(nn.Module):
    """A weight divided by its largest singular value."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / torch.linalg.matrix_norm(weight.flatten(1).float(), ord=2)


def _convolution(width: int, out: int, kernel: int) -> nn.Conv1d:
    layer = nn.Conv1d(width, out, kernel, padding=kernel // 2, padding_mode="circular")
    register_parametrization(layer, "weight", _UnitNorm())
    return layer


def _activated(width: int, kernel: int) -> nn.Sequential:
    norm = nn.BatchNorm1d(width, track_running_stats=False)
    return nn.Sequential(_convolution(width, width, kernel), norm, nn.LeakyReLU(0.2))


class _Head(nn.Module):
    """Tokens (B, T, D) to how real each place looks, (B, T)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.enter = _activated(width, 1)
        self.around = _activated(width, kernel)
        self.judge = _convolution(width, 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        sequence = self.enter(tokens.transpose(1, 2))  # (B, D, T)
        sequence = (sequence + self.around(sequence)) / 2**0.5
        return self.judge(sequence)[:, 0]


class Discriminator(nn.Module):
    """Judges pictures by the tokens of a frozen vision transformer.

    Args:
        eyes: the transformer.
        layers: behind which its tokens are read, counted from 1.
        kernel: places that a head's convolution reaches over, an odd number.

    Raises:
        ValueError: a layer that the transformer does not have, none, or an even kernel.
    """

    def __init__(self, eyes: Teacher, layers: Sequence[int], kernel: int = 9) -> None:
        super().__init__()
        check_layers(eyes, layers)
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel}: expected an odd number of places")
        self.eyes, self.layers = eyes, tuple(layers)
        self.heads = nn.ModuleList([_Head(eyes.width, kernel) for _ in layers])

    def features(self, pictures: Tensor, grid: Grid) -> list[Tensor]:
        """Tokens (B, T, D) behind each of the layers, with gradients that reach the pictures."""
        hidden = self.eyes.look(pictures, grid, hidden=self.layers).hidden
        return [hidden[layer] for layer in self.layers]

    def judge(self, features: Sequence[Tensor]) -> Tensor:
        """Logits of all heads, (B, heads T)."""
        return torch.cat([head(tokens) for head, tokens in zip(self.heads, features, strict=True)], dim=1)

    def judge_as_it_is(self, features: Sequence[Tensor]) -> Tensor:
        """The same logits, with gradients for the features and none for the heads."""
        judged = []
        for head, tokens in zip(self.heads, features, strict=True):
            weights = {name: parameter.detach() for name, parameter in head.named_parameters()}
            judged.append(functional_call(head, weights, (tokens,)))
        return torch.cat(judged, dim=1)


def check_layers(eyes: Teacher, layers: Sequence[int]) -> None:
    """Refuse layers that a vision transformer does not have.

    Raises:
        ValueError: naming them.
    """
    wrong = [layer for layer in layers if not 1 <= layer <= eyes.layers]
    if wrong or not layers:
        raise ValueError(f"layers={list(layers)}: expected some of the {eyes.layers} layers, counted from 1")


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss of its logits, a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(loss: Tensor, adversarial: Tensor, last: Tensor, most: float = 1e4) -> Tensor:
    """How much an adversarial loss may weigh so that its gradient is as large as the other's, a scalar.

    Esser et al., arXiv 2012.09841, equation 7: ||grad loss|| / ||grad adversarial|| at the last layer's
    weight, at most `most`.
    """
    (toward,) = torch.autograd.grad(loss, last, retain_graph=True)
    (away,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (toward.norm() / (away.norm() + 1e-6)).clamp(0, most).detach()


def feature_distance(eyes: Teacher, one: Tensor, other: Tensor, grid: Grid, layers: Sequence[int]) -> Tensor:
    """How differently a frozen vision transformer sees pictures (B, 3, H, W) in [-1, 1], a scalar, 0 to 4.

    The squared distance between tokens of unit length, the mean over places and layers. It is no LPIPS: that
    has weights fitted to what people find alike.
    """
    first = eyes.look(one, grid, hidden=layers).hidden
    with torch.no_grad():
        second = eyes.look(other, grid, hidden=layers).hidden
    distances = [
        (F.normalize(first[layer], dim=-1) - F.normalize(second[layer], dim=-1)).square().sum(-1).mean()
        for layer in layers
    ]
    return torch.stack(distances).mean()


def augment(pictures: Tensor, draws: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] under other light and moved by up to an eighth of a side.

    Args:
        draws: five numbers in [0, 1) for each picture, (B, 5): brightness, saturation, contrast, two moves.
    """
    bright, saturated, contrast = (draws[:, i].view(-1, 1, 1, 1) for i in range(3))
    pictures = pictures + (bright - 0.5)
    grey = pictures.mean(1, keepdim=True)
    pictures = (pictures - grey) * (2 * saturated) + grey
    middle = pictures.mean((1, 2, 3), keepdim=True)
    pictures = (pictures - middle) * (contrast + 0.5) + middle
    height, width = pictures.shape[-2:]
    moves = ((2 * draws[:, 3:] - 1) * pictures.new_tensor([height, width]) / 8).round().long().tolist()
    padded = F.pad(pictures, (width // 8,) * 2 + (height // 8,) * 2)
    moved = [
        one[
            :,
            height // 8 + down : height // 8 + down + height,
            width // 8 + right : width // 8 + right + width,
        ]
        for one, (down, right) in zip(padded, moves, strict=True)
    ]
    return torch.stack(moved)
