"""What every adapter of the registry must do, on networks of several families."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny_pipelines
from architectures import CASES, inputs
from ditkit import registry
from ditkit.adapters import store
from ditkit.adapters.batch import per_sample
from ditkit.models.dit import SiT
from ditkit.seams.apply import apply
from tiny_models import TINY, output

KINDS = list(registry.entries("adapter"))
FAMILIES = ("FluxTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel",
            "DiTTransformer2DModel", "WanTransformer3DModel", "SiT")  # fmt: skip


def adapter(kind: str) -> Any:
    return registry.construct("adapter", kind, {"rank": 4})


def network(family: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model and its answer to two samples."""
    if family != "SiT":
        tiny = TINY[family]
        model = tiny.model()
        return model, lambda: output(model(**tiny.inputs(batch=2)))
    torch.manual_seed(0)
    model = SiT(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    arguments = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 3])
    return model, lambda: model(*arguments).sample.detach()


def digest(model: nn.Module) -> str:
    """Of every tensor and its name, as if no adapter were there."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if ".base_layer" in name or not any(
            f".{part}" in name for part in ("lora_", "td_lora_", "diffscaler_")
        ):
            found.update(name.replace(".base_layer", "").encode())
            found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def move(model: nn.Module, seed: int) -> None:
    """Move what is trainable off its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_from_the_start_to_its_removal(kind: str, family: str, tmp_path: Path) -> None:
    model, answer = network(family)
    before, weights, keys = answer(), digest(model), set(model.state_dict())
    hooks = [len(part._forward_hooks) for part in model.modules()]
    store.add(model, adapter(kind), "first")
    assert torch.equal(answer(), before), "a fresh adapter changes nothing"
    move(model, 1)
    first = answer()
    assert not torch.allclose(first, before)

    store.save(model, tmp_path / "first", "first")
    store.use(model)
    assert torch.equal(answer(), before), "switched off, the answer is the model's own"
    store.use(model, {"first": 0.0})
    assert torch.equal(answer(), before)
    store.use(model, "first")
    assert torch.equal(answer(), first)
    assert digest(model) == weights

    store.remove(model)
    assert torch.equal(answer(), before)
    assert set(model.state_dict()) == keys and digest(model) == weights
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    assert store.names(model) == []

    assert store.load(model, tmp_path / "first") == "first"
    assert torch.equal(answer(), first)


REFUSED = {
    **{(kind, "dydit"): "runs parts of its layers" for kind in KINDS},
    ("td-lora", "dimr"): "DiMR has no TimestepEmbedder",
    ("td-lora", "pt-dit"): "for a batch of 8; one time for each sample",  # its windows are rows
}


@pytest.mark.parametrize("architecture", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_on_every_architecture_of_ours(kind: str, architecture: str) -> None:
    model = CASES[architecture].model()
    arguments = inputs(model)

    def answer() -> Tensor:
        with torch.no_grad():
            return output(model(*arguments))

    before, weights = answer(), digest(model)
    if (kind, architecture) in REFUSED:
        with pytest.raises((ValueError, RuntimeError), match=REFUSED[kind, architecture]):
            store.add(model, adapter(kind))
            answer()
    else:
        store.add(model, adapter(kind))
        assert torch.equal(answer(), before)
        move(model, 1)
        assert not torch.allclose(answer(), before)
    store.remove(model)
    assert torch.equal(answer(), before) and digest(model) == weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_halfway_leaves_no_trace(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, answer = network("SiT")
    before, keys = answer(), set(model.state_dict())
    config = type(adapter(kind)).config

    def with_a_norm(self: Any, layers: list[str], saved: tuple[str, ...]) -> Any:
        return config(self, [*layers, "blocks.1.norm2"], saved)

    monkeypatch.setattr(type(adapter(kind)), "config", with_a_norm)
    with pytest.raises(ValueError, match="LayerNorm"):
        store.add(model, adapter(kind))
    assert set(model.state_dict()) == keys and store.names(model) == []
    assert torch.equal(answer(), before)
    monkeypatch.undo()
    store.add(model, adapter(kind), "kept")
    move(model, 1)
    changed = answer()
    monkeypatch.setattr(type(adapter(kind)), "config", with_a_norm)
    with pytest.raises(ValueError, match="LayerNorm"):
        store.add(model, adapter(kind), "lost")
    assert store.names(model) == ["kept"]
    store.use(model, "kept")
    assert torch.equal(answer(), changed)


@pytest.mark.parametrize("kind", KINDS)
def test_several_in_one_process_and_in_one_batch(kind: str) -> None:
    model, answer = network("SiT")
    alone = {None: answer()}
    for seed, name in enumerate(("one", "two")):
        store.add(model, adapter(kind), name)
        move(model, seed)
    for name in ("one", "two"):
        store.use(model, name)
        alone[name] = answer()
    assert not torch.allclose(alone["one"], alone["two"])
    with per_sample(model, ["one", "two"]):
        torch.testing.assert_close(
            answer(), torch.stack([alone["one"][0], alone["two"][1]]), rtol=0, atol=1e-5
        )
    with per_sample(model, [None, "one"]):
        torch.testing.assert_close(
            answer(), torch.stack([alone[None][0], alone["one"][1]]), rtol=0, atol=1e-5
        )
    store.use(model, "two")
    assert torch.equal(answer(), alone["two"]), "nothing of the mixed batch stays"
    with per_sample(model, ["one", "two", "one"]), pytest.raises(store.AdapterError, match="batch of 2"):
        answer()
    with pytest.raises(store.AdapterError, match=r"no adapter 'c'.*one, two"), per_sample(model, ["c"]):
        pass
    store.remove(model, "one")
    assert store.names(model) == ["two"]
    store.use(model, "two")
    assert torch.equal(answer(), alone["two"])


@pytest.mark.parametrize("kind", KINDS)
def test_only_its_parameters_get_gradients(kind: str) -> None:
    model, _ = network("SiT")
    model.requires_grad_(True)
    store.add(model, adapter(kind))
    move(model, 1)
    model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])).sample.square().mean().backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got and got == {name for name, _ in model.named_parameters() if ".default" in name}
    store.remove(model)
    assert all(parameter.requires_grad for parameter in model.parameters()), "as it was before"


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_pefts(kind: str, tmp_path: Path) -> None:
    model, answer = network("SiT")
    store.add(model, adapter(kind))
    move(model, 1)
    changed = answer()
    store.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter.json", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    plain, answer = network("SiT")
    wrapped = PeftModel.from_pretrained(plain, str(tmp_path))
    assert torch.equal(answer(), changed)
    with wrapped.disable_adapter():
        assert not torch.equal(answer(), changed)
    assert not any(
        "blocks.0.attn.qkv.weight" in name for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    assert PeftConfig.from_pretrained(str(tmp_path)).inference_mode


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_what_does_not_fit(kind: str, tmp_path: Path) -> None:
    model, answer = network("SiT")
    before = answer()
    store.add(model, adapter(kind))
    store.save(model, tmp_path / "a")
    with pytest.raises(store.AdapterError, match="'default' is on the model already"):
        store.add(model, adapter(kind))
    other = next(name for name in KINDS if name != kind)
    with pytest.raises(store.AdapterError, match="of one kind"):
        store.add(model, adapter(other), "b")
    with pytest.raises(store.AdapterError, match="no adapter 'x'"):
        store.use(model, "x")
    store.remove(model)
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        store.load(model, tmp_path / "none")
    flux, _ = network("FluxTransformer2DModel")
    with pytest.raises(store.AdapterError, match="made for a SiT, this model is a FluxTransformer2DModel"):
        store.load(flux, tmp_path / "a")
    wide = SiT(input_size=8, patch_size=2, hidden_size=64, depth=2, num_heads=2, num_classes=5)
    with pytest.raises(store.AdapterError, match="does not fit this SiT"):
        store.load(wide, tmp_path / "a")
    assert store.names(wide) == []
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(store.AdapterError, match="can be read"):
        store.load(model, tmp_path / "a")
    assert torch.equal(answer(), before)
    with pytest.raises(ValueError, match="no layer 'query'; linear maps are called"):
        store.add(model, adapter(kind), layers=["query"])


@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision(kind: str, tmp_path: Path) -> None:
    """Rounding costs an adapted model no more than twice what it costs the model alone."""
    model, answer = network("FluxTransformer2DModel")
    plain = answer()
    store.add(model, adapter(kind), "a")
    move(model, 1)
    whole = answer()
    store.save(model, tmp_path, "a")
    half, _ = network("FluxTransformer2DModel")
    half = half.to(torch.bfloat16)
    arguments = {
        name: value.bfloat16() if torch.is_tensor(value) else value
        for name, value in TINY["FluxTransformer2DModel"].inputs(batch=2).items()
    }
    rounding = (output(half(**arguments)).float() - plain).norm()
    store.load(half, tmp_path, "a")
    after = output(half(**arguments))
    assert after.dtype == torch.bfloat16
    error, effect = (after.float() - whole).norm(), (whole - plain).norm()
    assert error < 2 * rounding and error < effect / 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_checkpointing(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model: Any
        model, _ = network("SiT")
        torch.manual_seed(1)
        store.add(model, adapter(kind))
        move(model, 1)
        if checkpointing:
            model.enable_gradient_checkpointing()
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        model(latents, torch.tensor([0.1, 0.9]), torch.tensor([0, 1])).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain and plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@pytest.mark.parametrize("method", ["taylorseer", "local-window", "ras"])
@pytest.mark.parametrize("kind", KINDS)
def test_beside_methods(kind: str, method: str) -> None:
    """A method that changes nothing changes nothing on an adapted model, and leaves the adapter there."""
    pipe = tiny_pipelines.flux()
    pipe.set_progress_bar_config(disable=True)

    def drawn() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        settings = {"height": 16, "width": 16, "num_inference_steps": 3, "max_sequence_length": 8}
        return pipe("red apple", generator=generator, output_type="latent", **settings).images

    before = drawn()
    store.add(pipe, adapter(kind), "a")
    move(pipe.transformer, 1)
    changed = drawn()
    assert not torch.allclose(changed, before)
    neutral = registry.get("method", method).neutral
    with apply(pipe, registry.construct("method", method, neutral)):
        torch.testing.assert_close(drawn(), changed, rtol=1e-4, atol=1e-4)
    assert torch.equal(drawn(), changed)
    store.remove(pipe)
    assert torch.equal(drawn(), before)
