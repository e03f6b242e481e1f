"""LPIPS, how differently people find two pictures, from weights that one has at hand.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924,
equation 1, with VGG-16: features behind five stages, each of unit length over its channels; the squared
differences, weighed by a fitted number for each channel, are averaged over places and summed over stages. The
weights are not ours to ship; a folder has to hold two files, `.safetensors`, `.pth` or `.pt`:

- `vgg16`: the classifier of torchvision (`features.0.weight`, ...),
- `lpips`: the fitted numbers, LPIPS 0.1 for VGG (`lin0.model.1.weight`, ...).

Dimensions: B pictures of H x W pixels, C channels of a stage.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.models.weight_files import read_weights

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the 3 x 3 convolutions of each stage; a pooling is before each but the first."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # the paper's code, for pixels in [-1, 1]
SUFFIXES = (".safetensors", ".pth", ".pt")


class PerceptualDistance(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1], twice -> the mean distance, a scalar; frozen."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        channels, stages = 3, []
        for widths in STAGES:
            stage = nn.ModuleList()
            for width in widths:
                stage.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            stages.append(stage)
        self.stages = nn.ModuleList(stages)
        self.weights = nn.ParameterList([torch.ones(widths[-1]) for widths in STAGES])
        self.requires_grad_(False).eval()

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Behind each stage, of unit length over the channels: five of (B, C, h, w)."""
        maps, found = (pictures - self.shift) / self.scale, []
        for index, stage in enumerate(self.stages):
            maps = F.max_pool2d(maps, 2) if index else maps
            layers: nn.ModuleList = stage  # pyright: ignore[reportAssignmentType]
            for layer in layers:
                maps = F.relu(layer(maps))
            found.append(maps / (maps.norm(dim=1, keepdim=True) + 1e-10))
        return found

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        pairs = zip(self.features(one), self.features(other), self.weights, strict=True)
        stages = [
            ((a - b).square() * w.view(1, -1, 1, 1)).sum(1).mean((1, 2)) for a, b, w in pairs
        ]  # each (B,)
        return torch.stack(stages).sum(0).mean()


def load_lpips(folder: str | Path) -> PerceptualDistance:
    """LPIPS from the two files of a folder; nothing in them is run.

    Raises:
        ValueError: a file that is missing, can't be read safely or has other weights.
    """
    network, fitted = (_read(Path(folder), name) for name in ("vgg16", "lpips"))
    distance, place = PerceptualDistance(), 0
    with torch.no_grad():
        for index, stage in enumerate(distance.stages):
            layers: nn.ModuleList = stage  # pyright: ignore[reportAssignmentType]
            for layer in layers:
                for kind in ("weight", "bias"):
                    _fill(getattr(layer, kind), network, f"features.{place}.{kind}")
                place += 2  # a rectifier behind each
            place += 1  # and a pooling behind each stage
            weight = distance.weights[index]
            name = f"lin{index}.model.1.weight"
            _fill(weight.view(1, -1, 1, 1), fitted, name)
    return distance


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return read_weights(folder / f"{name}{suffix}", "model")[0]
    raise ValueError(f"lpips: no {name} ({', '.join(SUFFIXES)}) in {folder}")


def _fill(target: Tensor, state: dict[str, Tensor], name: str) -> None:
    if name not in state or state[name].shape != target.shape:
        seen = tuple(state[name].shape) if name in state else "nothing"
        raise ValueError(f"lpips: {name} should be {tuple(target.shape)}; the file has {seen}")
    target.copy_(state[name])
