"""FID and inception score, by the Inception network that they are defined with.

The network is torch-fidelity's, whose figures are those of the first implementation; it is not among our
requirements (`pip install 'ditkit[fid]'`, which brings torchvision). Its weights are a PyTorch file that has
to lie on this machine: nothing is downloaded, and it is read as tensors only, which torch-fidelity itself
does not see to.

FID: Heusel et al., arXiv 1706.08500: the Frechet distance of the pool features. Inception score: Salimans et
al., arXiv 1606.03498, exp E_x KL(p(y|x) || p(y)); here over all pictures at once, not the mean of ten parts.

Dimensions: B pictures, F = 2048 features, Y = 1008 classes.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


class InceptionError(ValueError):
    """The network or its weights are not at hand; the message says what to do."""


class Inception:
    """The network with its weights.

    Args:
        weights: the file, or the folder that holds it under its usual name.

    Raises:
        InceptionError: torch-fidelity is not installed, or the weights are not there or not tensors.
    """

    def __init__(self, weights: Path) -> None:
        file = weights / WEIGHTS if weights.is_dir() else weights
        if not file.is_file():
            raise InceptionError(
                f"no Inception weights at {file}: download {WEIGHTS} from the releases of torch-fidelity "
                "(github.com/toshas/torch-fidelity) to there"
            )
        try:
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise InceptionError(f"FID needs torch-fidelity ({error}): pip install 'ditkit[fid]'") from error
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of several unrelated classes
            raise InceptionError(f"{file} is damaged, or holds more than tensors, and is refused") from error
        checked = io.BytesIO()  # torch-fidelity unpickles whatever it is given: let that be tensors of ours
        torch.save(tensors, checked)
        checked.seek(0)
        wanted = ["2048", "logits_unbiased"]
        try:
            self.network: Any = module.FeatureExtractorInceptionV3("inception", wanted, checked)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InceptionError(f"{file} does not hold the weights of the FID network: {error}") from error

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 32) -> tuple[Tensor, Tensor]:
        """Features (B, F) and logits without bias (B, Y) of pictures (B, 3, H, W) in [-1, 1]."""
        device = next(self.network.parameters()).device
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        parts = [self.network(part.to(device)) for part in pixels.split(batch)]
        features, logits = zip(*parts, strict=True)
        return torch.cat(features).cpu(), torch.cat(logits).cpu()


def inception_score(logits: Tensor) -> float:
    """1 (every picture gives the same classes) to Y, of logits (B, Y)."""
    log_chance = logits.double().log_softmax(1)
    chance = log_chance.exp()
    divergence = (chance * (log_chance - chance.mean(0).log())).sum(1)
    return float(divergence.mean().exp())
