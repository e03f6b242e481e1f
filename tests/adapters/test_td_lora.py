"""TD-LoRA depends on the timestep, and on nothing else that would keep it from being merged at one."""

from __future__ import annotations

import copy

import pytest
import torch

from adapters.test_contract import move, network
from ditkit.adapters import store
from ditkit.adapters.layers import time_embedder
from ditkit.adapters.td_lora import TDLoRA, TDLoRALayer
from tiny_models import TINY


def test_at_one_timestep_it_is_a_constant_matrix() -> None:
    model, _ = network("SiT")
    store.add(model, TDLoRA(rank=3, alpha=6), "a")
    move(model, 1)
    store.use(model, {"a": 0.5})
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.3]), torch.tensor([0, 1])
    with torch.no_grad():
        adapted = model(*inputs).sample
        embedding = model.get_submodule("t_embedder")(torch.tensor([0.3]))[0]  # (E,)
        merged = copy.deepcopy(model)
        deltas = {
            name: part.get_delta_weight("a", embedding)
            for name, part in merged.named_modules()
            if isinstance(part, TDLoRALayer)
        }
        store.remove(merged)
        for name, delta in deltas.items():
            merged.get_submodule(name).weight += delta  # pyright: ignore[reportOperatorIssue]
        torch.testing.assert_close(merged(*inputs).sample, adapted, rtol=1e-4, atol=1e-5)
        later = inputs[0], torch.tensor([0.9, 0.9]), inputs[2]
        assert not torch.allclose(merged(*later).sample, model(*later).sample, atol=1e-4)


def test_each_sample_has_its_own_time() -> None:
    model, _ = network("SiT")
    store.add(model, TDLoRA(rank=3))
    move(model, 1)
    latents, times, labels = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.8]), torch.tensor([0, 1])
    with torch.no_grad():
        both = model(latents, times, labels).sample
        for row in range(2):
            alone = model(latents[row : row + 1], times[row : row + 1], labels[row : row + 1]).sample
            torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_copy_reads_its_own_time() -> None:
    model, answer = network("SiT")
    store.add(model, TDLoRA(rank=3))
    move(model, 1)
    expected = answer()
    twin = copy.deepcopy(model)
    twin(torch.randn(1, 4, 8, 8), torch.tensor([0.99]), torch.tensor([0]))
    layer = next(part for part in model.modules() if isinstance(part, TDLoRALayer))
    assert layer.surroundings["time"].value.shape[0] == 2, "the copy's forward is not this model's"
    assert torch.equal(answer(), expected)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("FluxTransformer2DModel", "time_text_embed.timestep_embedder"),
        ("HunyuanVideoTransformer3DModel", "time_text_embed.timestep_embedder"),
        ("PixArtTransformer2DModel", "adaln_single.emb.timestep_embedder"),
        ("WanTransformer3DModel", "condition_embedder.time_embedder"),
    ],
)
def test_where_the_time_is_embedded(name: str, path: str) -> None:
    assert time_embedder(TINY[name].model()) == path


def test_a_model_without_time() -> None:
    with pytest.raises(ValueError, match=r"name the module .* with time_embedder"):
        time_embedder(torch.nn.Linear(2, 2))
