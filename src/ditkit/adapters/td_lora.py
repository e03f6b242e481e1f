"""TD-LoRA: a low-rank update whose second factor is mixed anew for every timestep.

After "DyDiT++: Dynamic Diffusion Transformers for Efficient Visual Generation", arXiv 2504.06803, whose code
has no TD-LoRA and whose text gives no exact form: a reconstruction. Here y = W x + (alpha / r) (sum_j g_j(t)
B_j) A x with one A, n = 4 matrices B_j that start at zero, and g(t) = softmax(Linear(e_t)), where e_t is the
output of the model's time embedder. g depends on the timestep alone, so that for one timestep the update is a
constant matrix (`TDLoRALayer.get_delta_weight`).

B batch, C and D channels in and out, E width of e_t, n matrices, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ditkit.adapters.base import Adapter, shared_settings
from ditkit.adapters.clock import embedding_width, watch
from ditkit.adapters.layers import time_embedder
from ditkit.adapters.tuner import DeltaLayer, DeltaTuner, TunerConfig, register_tuner
from ditkit.registry import Paper, register

PEFT_TYPE = "TD_LORA"


@dataclass
class TDLoRAConfig(TunerConfig):
    """`r`, `alpha`: of the update; `matrices`: n; `time_embedder`: the module that gives e_t, None: found."""

    r: int = 16
    alpha: float = 16.0
    matrices: int = 4
    time_embedder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class TDLoRALayer(DeltaLayer):
    """One layer's A (C -> r), B (n, D, r) and gate (E -> n) of each adapter."""

    adapter_layer_names = ("td_lora_A", "td_lora_B", "td_lora_gate")

    def prepare(self) -> None:
        self.td_lora_A = nn.ModuleDict()
        self.td_lora_B = nn.ParameterDict()
        self.td_lora_gate = nn.ModuleDict()
        self.strength: dict[str, float] = {}

    def make(self, name: str, config: Any) -> None:
        layer: Any = self.get_base_layer()
        first = nn.Linear(layer.in_features, config.r, bias=False)
        nn.init.kaiming_uniform_(first.weight, a=math.sqrt(5))
        self.td_lora_A[name] = first
        self.td_lora_B[name] = nn.Parameter(torch.zeros(config.matrices, layer.out_features, config.r))
        self.td_lora_gate[name] = nn.Linear(self.surroundings["width"], config.matrices)
        self.strength[name] = config.alpha / config.r

    def mixed(self, name: str, embedding: Tensor) -> Tensor:
        """sum_j g_j B_j for embeddings (B, E), as (B, D, r)."""
        gate: Any = self.td_lora_gate[name]
        weights = gate(self._cast_input_dtype(embedding, gate.weight.dtype)).softmax(-1)  # (B, n)
        return torch.einsum("bn,ndr->bdr", weights, self.td_lora_B[name])

    def delta(self, name: str, x: Tensor, result: Tensor, rows: Tensor | None = None) -> Tensor:
        embedding = self.surroundings["time"].read(len(x), rows)  # (B, E)
        down: Any = self.td_lora_A[name]
        hidden = down(self._cast_input_dtype(x, down.weight.dtype))  # (B, ..., r)
        second = self.mixed(name, embedding).mT  # (B, r, D)
        added = hidden.reshape(len(x), -1, hidden.shape[-1]) @ second  # (B, ..., D), flat in between
        return self.strength[name] * added.reshape(result.shape)

    def get_delta_weight(self, name: str, embedding: Tensor) -> Tensor:
        """The update of W, (D, C), at the timestep of one embedding (E,)."""
        first: Any = self.td_lora_A[name]
        second = self.mixed(name, embedding[None])[0]  # (D, r)
        return self.scaling[name] * self.strength[name] * second @ first.weight


class TDLoRATuner(DeltaTuner):
    prefix = "td_lora_"
    tuner_layer_cls = TDLoRALayer

    def surroundings(self, config: Any) -> dict[str, Any]:
        embedder = self.model.get_submodule(config.time_embedder)
        return {"time": watch(embedder), "width": embedding_width(embedder)}

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if config.time_embedder is None:
            config.time_embedder = time_embedder(model)


register_tuner(PEFT_TYPE, TDLoRAConfig, TDLoRATuner)


@register(
    "adapter",
    "td-lora",
    summary="a low-rank update whose second factor is mixed anew for every timestep",
    paper=Paper(
        "DyDiT++: Dynamic Diffusion Transformers for Efficient Visual Generation", "2504.06803", 2025
    ),
    seam=("adapters",),
    needs=("training",),
)
@dataclass(frozen=True)
class TDLoRA(Adapter):
    """A low-rank update that depends on the timestep.

    Args:
        rank: r.
        alpha: the update is multiplied by alpha / r; None: as large as r.
        matrices: n, second factors that are mixed.
        time_embedder: name of the module whose output is the embedding of the timestep; None: found.

    Raises:
        ValueError: a rank or number of matrices below 1.
    """

    convolutions: ClassVar[bool] = False

    rank: int = 16
    alpha: float | None = None
    matrices: int = 4
    time_embedder: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.matrices < 1:
            raise ValueError(f"rank and matrices must be at least 1; got {self.rank} and {self.matrices}")

    def config(self, layers: Sequence[str], saved: Sequence[str] = ()) -> PeftConfig:
        return TDLoRAConfig(
            r=self.rank,
            alpha=self.rank if self.alpha is None else self.alpha,
            matrices=self.matrices,
            time_embedder=self.time_embedder,
            **shared_settings(layers, saved),
        )
