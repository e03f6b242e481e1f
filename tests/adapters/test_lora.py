"""LoRA is peft's, so its files are read by diffusers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from adapters.test_contract import move, network
from ditkit.adapters import store
from ditkit.adapters.lora import LoRA


def test_diffusers_reads_it(tmp_path: Path) -> None:
    model, answer = network("FluxTransformer2DModel")
    store.add(model, LoRA(rank=4))
    assert any(isinstance(part, LoraLayer) for part in model.modules())
    move(model, 1)
    changed = answer()
    store.save(model, tmp_path)
    plain: Any
    plain, answer = network("FluxTransformer2DModel")
    plain.load_lora_adapter(tmp_path, weight_name="adapter_model.safetensors", prefix="base_model.model")
    torch.testing.assert_close(answer(), changed)


def test_diffusers_switches_it() -> None:
    model: Any
    model, answer = network("FluxTransformer2DModel")
    before = answer()
    store.add(model, LoRA(rank=4), "a")
    move(model, 1)
    changed = answer()
    model.disable_adapters()
    assert torch.equal(answer(), before)
    model.enable_adapters()
    model.set_adapters(["a"], [1.0])
    assert torch.equal(answer(), changed)
