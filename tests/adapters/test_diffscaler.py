"""DiffScaler's identities and counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ditkit import models
from ditkit.adapters import store
from ditkit.adapters.diffscaler import DiffScaler, DiffScalerLayer
from ditkit.adapters.layers import block_layers
from ditkit.models.layers import LabelEmbedder, relabelled
from ditkit.registry import OptionError, construct

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 7, 6)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "convolution": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 8, 10)),
}


def adapted(kind: str, **options: Any) -> tuple[nn.Module, DiffScalerLayer, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    frozen = make()
    layer = DiffScalerLayer(frozen, "a", DiffScaler(**{"rank": 2, **options}).config(["x"]), {})
    return frozen, layer, torch.randn(shape)


def fill(*parameters: torch.Tensor) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_()


@pytest.mark.parametrize("kind", LAYERS)
def test_begins_as_the_frozen_layer(kind: str) -> None:
    frozen, layer, x = adapted(kind)
    assert torch.equal(layer(x), frozen(x))
    assert layer.diffscaler_down["a"].weight.any() and layer.diffscaler_s["a"].item() == 1


@pytest.mark.parametrize("kind", LAYERS)
def test_without_the_path_it_scales_and_shifts(kind: str) -> None:
    frozen, layer, x = adapted(kind)
    a, b = layer.diffscaler_a["a"], layer.diffscaler_b["a"]
    fill(a, b)
    convolution = isinstance(frozen, nn.Conv2d)
    axes = (-1, 1, 1) if convolution else (-1,)
    bias = torch.zeros(5) if frozen.bias is None else frozen.bias  # pyright: ignore[reportGeneralTypeIssues]
    product = frozen(x) - bias.view(axes)  # W x
    expected = (1 + a.view(axes)) * product + bias.view(axes) + b.view(axes)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["linear", "no bias"])
def test_without_the_relu_it_is_lora(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, layer, x = adapted(kind)
    down, up, s = layer.diffscaler_down["a"].weight, layer.diffscaler_up["a"].weight, layer.diffscaler_s["a"]
    fill(up, s)
    assert not torch.allclose(layer(x), frozen(x) + s * (x @ down.T @ up.T))
    monkeypatch.setattr(torch.nn.functional, "relu", lambda value: value)
    torch.testing.assert_close(layer(x), frozen(x) + s * (x @ down.T @ up.T))


def test_parameters_on_dit_xl() -> None:
    """28 blocks x [r (in + out of qkv, proj, fc1, fc2, adaLN) + 2 (their outs)], and an s a layer."""
    with torch.device("meta"):
        model = models.create("dit-xl/2")
        store.add(model, DiffScaler(rank=8))
    widths = ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152), (1152, 6912))
    formula = 28 * sum(8 * (i + o) + 2 * o for i, o in widths)
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert formula == 6_902_784
    assert counted == formula + 28 * len(widths)


def test_where_it_sits() -> None:
    names = block_layers(models.create("dit-s/2", depth=1))
    assert names == [f"blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2",
                                                     "adaLN_modulation.1")]  # fmt: skip
    convolutional = models.create("dico-s", input_size=16, depth=[1, 1, 1, 1, 1], hidden_size=16)
    assert any(
        isinstance(convolutional.get_submodule(name), nn.Conv2d) for name in block_layers(convolutional)
    )


def test_options() -> None:
    assert construct("adapter", "diffscaler", {"rank": "0"}) == DiffScaler(rank=0)
    assert set(DiffScaler(vector_lr=0.5).rates().values()) == {0.5}
    with pytest.raises(OptionError, match="rank must be at least 0; got -1"):
        construct("adapter", "diffscaler", {"rank": "-1"})
    with pytest.raises(OptionError, match="no option 'alpha'"):
        construct("adapter", "diffscaler", {"alpha": "1"})


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_new_classes_begin_at_the_null_class(dropout: float) -> None:
    old = LabelEmbedder(5, 8, dropout)
    new = relabelled(old, ["x", "y"])
    table = old.embedding_table.weight
    row = table[5] if dropout else table.mean(0)
    assert new.num_classes == 2 and new.class_names == ["x", "y"] and new.num_rows == 2 + bool(dropout)
    torch.testing.assert_close(new(torch.tensor([0, 1])), row.expand(2, 8))
    assert old.num_classes == 5 and old.class_names is None
