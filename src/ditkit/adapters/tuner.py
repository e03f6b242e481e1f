"""Tuners for peft: a frozen layer, and what the active adapters add to its output.

peft gives injection, switching, saving and loading; a kind of adapter gives a configuration, a layer with
`make` and `delta`, and a tuner with the layer's class. Shapes are those of the layer: (B, ..., D) for a
linear map, (B, C, H, W) for a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

BASE = "__base__"
"""peft's name, in a mixed batch, for a sample without adapter."""


@dataclass
class TunerConfig(PeftConfig):
    """What all configurations have: the names of layers, as of peft, and of modules that are copied whole."""

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None
    target_parameters: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A frozen layer; a subclass makes an adapter's parameters and says what they add.

    A subclass lists the dictionaries of its parameters, by adapter, in `adapter_layer_names`.

    Args:
        base_layer: a linear map or a convolution, left as it is.
        adapter_name: of the first adapter.
        config: of that adapter.
        surroundings: what the tuner found in the model, for `make` and `delta`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, surroundings: dict[str, Any]
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling: dict[str, float] = {}
        self.surroundings = surroundings
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.prepare()
        self.update_layer(adapter_name, config)

    def prepare(self) -> None:
        """Make the empty dictionaries."""
        raise NotImplementedError

    def make(self, name: str, config: Any) -> None:
        """Make an adapter's parameters, such that it adds nothing yet."""
        raise NotImplementedError

    def delta(self, name: str, x: Tensor, result: Tensor, rows: Tensor | None = None) -> Tensor:
        """What an adapter adds.

        Args:
            x: the layer's input.
            result: the frozen layer's output.
            rows: which samples of the model's batch these are; None: all of them.
        """
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: Any) -> None:
        self.make(adapter_name, config)
        self.scaling[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.scaling.pop(adapter_name, None)

    def set_scale(self, adapter: str, scale: float) -> None:
        """How much of an adapter is added: 0 is the frozen layer."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters, as diffusers does around a forward."""
        for name in self.active_adapters:
            self.set_scale(name, self.scaling.get(name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None: back to 1."""
        for name in self.active_adapters:
            self.set_scale(name, 1.0 if scale is None else self.scaling.get(name, 1.0) / scale)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} can't be merged into the layer: what it adds is no constant matrix"
        )

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """The adapted output; `adapter_names`: one for each sample, as peft's mixed batches have them."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            return self._mixed(x, result, adapter_names)
        total = result
        for name in self.active_adapters:
            if name in self.scaling:
                total = total + self.scaling[name] * self.delta(name, x, result).to(result.dtype)
        return total

    def _mixed(self, x: Tensor, result: Tensor, names: Sequence[str]) -> Tensor:
        total = result.clone()
        for name in dict.fromkeys(names):
            if name in self.scaling:
                rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
                added = self.scaling[name] * self.delta(name, x[rows], result[rows], rows)
                total[rows] = result[rows] + added.to(result.dtype)
        return total


class DeltaTuner(BaseTuner):
    """Puts layers of `tuner_layer_cls` in the place of those that a configuration names."""

    target_module_mapping = {}

    def surroundings(self, config: Any) -> dict[str, Any]:
        """What the layers need to know of the model."""
        return {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        kind: Any = self.tuner_layer_cls
        layer: Any = target
        if isinstance(layer, kind):
            layer.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear | nn.Conv2d):
            raise ValueError(f"{current_key} is a {type(target).__name__}, not a linear map or a convolution")
        layer = kind(target, adapter_name, peft_config, self.surroundings(peft_config))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register_tuner(name: str, config: type[PeftConfig], tuner: type[DeltaTuner]) -> None:
    """Let peft find a tuner by the `peft_type` of a configuration.

    `register_peft_method` takes the names of peft's own closed list only; its tables take any name.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix  # pyright: ignore[reportArgumentType]
