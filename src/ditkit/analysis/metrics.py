"""How far two generations are apart."""

from __future__ import annotations

import math

import numpy as np
import torch

Array = torch.Tensor | np.ndarray


def relative_l2(value: Array, reference: Array) -> float:
    """`||value - reference|| / ||reference||` over all elements, in float64.

    Args:
        value, reference: two tensors or arrays of one shape.

    Raises:
        ValueError: the shapes differ, or the reference is zero everywhere while the value is not.
    """
    a, b = _pair(value, reference)
    scale = float(np.linalg.norm(b))
    distance = float(np.linalg.norm(a - b))
    if scale == 0.0:
        if distance == 0.0:
            return 0.0
        raise ValueError("relative_l2: the reference is zero everywhere, there is nothing to relate to")
    return distance / scale


def relative_l2_each(value: Array, reference: Array) -> list[float]:
    """`relative_l2` of each sample, along the first dimension of both."""
    return [relative_l2(a, b) for a, b in zip(value, reference, strict=True)]


def mean_absolute(value: Array, reference: Array) -> float:
    """Mean of `|value - reference|`, in float64."""
    a, b = _pair(value, reference)
    return float(np.abs(a - b).mean())


def psnr(value: Array, reference: Array, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB: `10 log10(data_range^2 / mean squared error)`; inf when equal.

    Args:
        data_range: the distance between the smallest and the largest possible value: 1 for pictures in
            [0, 1]. None takes the reference's own range, as is usual for latents, which have no fixed one.

    Raises:
        ValueError: the shapes differ, or the range is not positive.
    """
    a, b = _pair(value, reference)
    span = float(b.max() - b.min()) if data_range is None else data_range
    error = float(np.square(a - b).mean())
    if error == 0.0:
        return math.inf
    if span <= 0.0:
        raise ValueError(f"psnr: data_range={span} must be positive")
    return 10.0 * math.log10(span * span / error)


def _pair(value: Array, reference: Array) -> tuple[np.ndarray, np.ndarray]:
    a, b = _float64(value), _float64(reference)
    if a.shape != b.shape:
        raise ValueError(f"the shapes differ: {a.shape} against {b.shape}")
    if a.size == 0:
        raise ValueError("there is nothing to compare: both are empty")
    return a.ravel(), b.ravel()


def _float64(value: Array) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    return np.asarray(value, dtype=np.float64)
