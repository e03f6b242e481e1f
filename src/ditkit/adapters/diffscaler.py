"""DiffScaler: every frozen layer is rescaled, shifted, and given a small non-linear path of its own.

"Diffscaler: Enhancing the Generative Prowess of Diffusion Transformers", arXiv 2404.09976. A frozen layer y =
W x + b_hat becomes y = (1 + a) (W x) + b_hat + b + s W_up ReLU(W_down x), with one set of a, b, s, W_down,
W_up for each task. A reconstruction from the abstract and secondary sources: no code was released and the
method section was not readable. Inferred: all starts as the frozen layer (a = b = 0, W_up = 0, W_down
Kaiming-uniform, s = 1, learned), the rank 8, and a convolution's path, which is one of the layer's own
geometry into r channels and a 1 x 1 one out of them. a is an offset from 1, so that weight decay pulls
towards the frozen layer. The ReLU keeps it from being merged.

B batch, C and D channels in and out, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

from ditkit.adapters.base import Adapter, shared_settings
from ditkit.adapters.tuner import DeltaLayer, DeltaTuner, TunerConfig, register_tuner
from ditkit.registry import Paper, register

PEFT_TYPE = "DIFFSCALER"


@dataclass
class DiffScalerConfig(TunerConfig):
    """`r`: rank of the non-linear path, 0 is none; `learn_scale`: whether s is learned."""

    r: int = 8
    learn_scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class DiffScalerLayer(DeltaLayer):
    """One layer's a, b (D,), s (1,), W_down (C -> r) and W_up (r -> D) of each task."""

    adapter_layer_names = tuple(f"diffscaler_{part}" for part in ("a", "b", "s", "down", "up"))

    def prepare(self) -> None:
        self.diffscaler_a = nn.ParameterDict()
        self.diffscaler_b = nn.ParameterDict()
        self.diffscaler_s = nn.ParameterDict()
        self.diffscaler_down = nn.ModuleDict()
        self.diffscaler_up = nn.ModuleDict()

    def make(self, name: str, config: Any) -> None:
        layer: Any = self.get_base_layer()
        width = layer.weight.shape[0]
        self.diffscaler_a[name] = nn.Parameter(torch.zeros(width))
        self.diffscaler_b[name] = nn.Parameter(torch.zeros(width))
        if not config.r:
            return
        if config.learn_scale:
            self.diffscaler_s[name] = nn.Parameter(torch.ones(1))
        down, up = _low_rank(layer, config.r)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        self.diffscaler_down[name], self.diffscaler_up[name] = down, up

    def delta(self, name: str, x: Tensor, result: Tensor, rows: Tensor | None = None) -> Tensor:
        a, b = self.diffscaler_a[name], self.diffscaler_b[name]  # (D,)
        frozen = self.get_base_layer().bias
        shift = b if frozen is None else b - a * frozen  # a scales W x alone
        if isinstance(self.get_base_layer(), nn.Conv2d):
            a, shift = a.view(-1, 1, 1), shift.view(-1, 1, 1)
        added = result * a + shift
        if name not in self.diffscaler_down:
            return added
        down: Any = self.diffscaler_down[name]
        up = self.diffscaler_up[name]
        path = up(F.relu(down(self._cast_input_dtype(x, down.weight.dtype))))
        return added + (self.diffscaler_s[name] * path if name in self.diffscaler_s else path)


def _low_rank(layer: Any, rank: int) -> tuple[Any, Any]:
    """Maps into `rank` channels and out of them, without biases, that together are shaped as the layer."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    down = nn.Conv2d(layer.in_channels, rank, *geometry, bias=False, padding_mode=layer.padding_mode)
    return down, nn.Conv2d(rank, layer.out_channels, 1, bias=False)


class DiffScalerTuner(DeltaTuner):
    prefix = "diffscaler_"
    tuner_layer_cls = DiffScalerLayer


register_tuner(PEFT_TYPE, DiffScalerConfig, DiffScalerTuner)


@register(
    "adapter",
    "diffscaler",
    summary="rescale and shift every frozen layer, and add a small non-linear path",
    paper=Paper("Diffscaler: Enhancing the Generative Prowess of Diffusion Transformers", "2404.09976", 2024),
    seam=("adapters",),
    needs=("training",),
)
@dataclass(frozen=True)
class DiffScaler(Adapter):
    """Scales, shifts and a non-linear path.

    Args:
        rank: r of the path; 0 leaves scales and shifts alone.
        learn_scale: whether s is learned; else it stays 1.
        vector_lr: learning rate of a, b and s; the path follows the run's.

    Raises:
        ValueError: a negative rank, or a rate that is not positive.
    """

    rank: int = 8
    learn_scale: bool = True
    vector_lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0; got {self.rank}")
        if self.vector_lr <= 0:
            raise ValueError(f"vector_lr must be above 0; got {self.vector_lr}")

    def config(self, layers: Sequence[str], saved: Sequence[str] = ()) -> PeftConfig:
        return DiffScalerConfig(r=self.rank, learn_scale=self.learn_scale, **shared_settings(layers, saved))

    def rates(self) -> Mapping[str, float]:
        return {name: self.vector_lr for name in ("diffscaler_a", "diffscaler_b", "diffscaler_s")}
