"""DiT and SiT: published sizes, shapes, guidance, saving, and what the seams rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ditkit import models
from ditkit.models.dit import DiT, SiT
from ditkit.models.layers import sincos_table, unpatchify
from ditkit.registry import UnknownNameError

# Parameters (position table and null class included) and 1e9 multiply-adds of one forward at 256 px, from
# the table of the paper's code; both papers call the latter "Gflops".
PUBLISHED = {
    "s/2": (32_963_360, 6.06),
    "s/4": (32_945_024, 1.41),
    "s/8": (33_148_160, 0.36),
    "b/2": (130_512_416, 23.01),
    "b/4": (130_475_648, 5.57),
    "b/8": (130_881_536, 1.42),
    "l/2": (458_102_816, 80.70),
    "l/4": (458_053_760, 19.70),
    "l/8": (458_594_816, 5.01),
    "xl/2": (675_129_632, 118.62),
    "xl/4": (675_074_432, 29.04),
    "xl/8": (675_683_072, 7.39),
}


def tiny(cls: type[DiT] = DiT, *, seed: int = 0, **config: Any) -> DiT:
    """A small model in eval mode with every layer drawn, so that no output is trivially zero."""
    torch.manual_seed(seed)
    defaults = dict(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    model = cls(**{**defaults, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def inputs(batch: int = 2, height: int = 8, width: int = 8, channels: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, channels, height, width, generator=generator)
    return latent, torch.rand(batch, generator=generator) * 999, torch.arange(batch) % 5


def on_meta(name: str, **config: Any) -> tuple[nn.Module, int]:
    """A model without memory, and the multiply-adds of one forward."""
    with torch.device("meta"):
        model = models.create(name, **config).eval()
        side = config.get("input_size", 32)
        arguments = (torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, dtype=torch.long))
    with FlopCounterMode(display=False) as counter:
        model(*arguments)
    return model, counter.get_total_flops() // 2


@pytest.mark.parametrize("family", ["dit", "sit"])
@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_parameters_and_multiply_adds(family: str, variant: str) -> None:
    parameters, billions = PUBLISHED[variant]
    model, multiply_adds = on_meta(f"{family}-{variant}")
    assert sum(p.numel() for p in model.parameters()) == parameters
    # The table has two decimals: half of the last one is more than 0.1 % of the small models.
    assert multiply_adds / 1e9 == pytest.approx(billions, rel=1e-3, abs=0.005)


def test_published_size_at_512() -> None:
    model, multiply_adds = on_meta("dit-xl/2", input_size=64)
    assert sum(p.numel() for p in model.parameters()) == 676_014_368
    assert multiply_adds / 1e9 == pytest.approx(524.54, rel=1e-3)


def test_create_explains_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="dit"):
        models.create("dti-xl/2")
    with pytest.raises(ValueError, match=r"'xxl/2'.*xl/2"):
        models.create("dit-xxl/2")
    with torch.device("meta"):
        model = models.create("SiT-S/4", num_classes=10)
    assert isinstance(model, SiT)
    assert (model.config["patch_size"], model.config["num_classes"]) == (4, 10)


def test_starts_as_the_identity() -> None:
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5).eval()
    latent, t, labels = inputs()
    tokens, conditioning = model.embed(latent, t, labels)
    assert torch.equal(model.run_blocks(tokens, conditioning), tokens)
    assert model(latent, t, labels).sample.abs().max() == 0
    bound = (6 / (4 * 2 * 2 + 32)) ** 0.5  # Xavier on the patches as one linear map
    assert 0.9 * bound < model.x_embedder.proj.weight.abs().max() <= bound


@pytest.mark.parametrize("cls", [DiT, SiT])
def test_every_parameter_gets_a_gradient(cls: type[DiT]) -> None:
    model = tiny(cls).train()
    latent, t, _ = inputs(batch=5)
    model(latent, t, torch.arange(5)).sample.square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(dict(model.named_parameters())) - set(trained) == {"pos_embed"}
    silent = [name for name, p in trained.items() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent


@pytest.mark.parametrize(
    ("patch", "height", "width"), [(2, 8, 8), (2, 6, 10), (2, 14, 2), (3, 9, 15), (1, 5, 7)]
)
@pytest.mark.parametrize(("cls", "channels"), [(DiT, 8), (SiT, 4)])
def test_shapes(cls: type[DiT], channels: int, patch: int, height: int, width: int) -> None:
    model = tiny(cls, patch_size=patch, input_size=(height, width))
    latent, t, labels = inputs(3, height, width)
    assert model(latent, t, labels).sample.shape == (3, channels, height, width)


def test_size_of_the_input_may_differ_from_the_configured_one() -> None:
    """The same weights at another grid: as if the model had been built for it."""
    model, other = tiny(input_size=8), tiny(input_size=(4, 12))
    weights = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    other.load_state_dict(weights, strict=False)
    latent, t, labels = inputs(2, 4, 12)
    assert torch.equal(model(latent, t, labels).sample, other(latent, t, labels).sample)


def test_configured_grid_uses_the_loaded_table() -> None:
    model = tiny()
    before = model(*inputs()).sample
    with torch.no_grad():
        model.pos_embed.add_(1)
    assert not torch.equal(model(*inputs()).sample, before)


def test_position_table_tells_columns_then_rows() -> None:
    table = sincos_table(16, rows=3, columns=5)[0].unflatten(0, (3, 5))  # (R, S, D)
    assert torch.equal(table[0, :, :8], table[2, :, :8])  # the first half knows the column only
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])  # and the second the row
    assert table[1, 2, 0] == pytest.approx(torch.sin(torch.tensor(2.0)).item())
    assert table[1, 2, 12] == pytest.approx(torch.cos(torch.tensor(1.0)).item())
    with pytest.raises(ValueError, match="width=18"):
        sincos_table(18, 2, 2)


def test_unpatchify_undoes_patches() -> None:
    picture = torch.randn(2, 3, 6, 8)  # P = 2: a grid of 3 x 4
    patches = picture.unflatten(3, (4, 2)).unflatten(2, (3, 2))  # (B, C, R, P, S, P)
    tokens = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, T, P P C)
    assert torch.equal(unpatchify(tokens, (3, 4), 2), picture)


def test_samples_of_a_batch_are_independent() -> None:
    model = tiny()
    latent, t, labels = inputs(4)
    together = model(latent, t, labels).sample
    alone = torch.cat([model(latent[i : i + 1], t[i : i + 1], labels[i : i + 1]).sample for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_parts_make_the_whole() -> None:
    model = tiny(depth=3)
    latent, t, labels = inputs()
    tokens, conditioning = model.embed(latent, t, labels)
    tokens = model.run_blocks(tokens, conditioning, 0, 1)
    tokens = model.run_blocks(tokens, conditioning, 1)
    assert torch.equal(model.head(tokens, conditioning, (4, 4)), model(latent, t, labels).sample)


def test_conditioning_may_differ_between_tokens() -> None:
    model = tiny()
    tokens, conditioning = model.embed(*inputs())
    shared = model.head(model.run_blocks(tokens, conditioning), conditioning, (4, 4))
    each = conditioning.expand(-1, tokens.shape[1], -1)
    torch.testing.assert_close(model.head(model.run_blocks(tokens, each), each, (4, 4)), shared)


def test_forms_of_the_call() -> None:
    model = tiny()
    latent, t, labels = inputs()
    expected = model(latent, t, labels).sample
    assert torch.equal(model(latent, t, labels, return_dict=False)[0], expected)
    assert torch.equal(
        model(hidden_states=latent, timestep=t, class_labels=labels, force_drop_ids=torch.zeros(2)).sample,
        expected,
    )
    same_time = torch.full((2,), 7.5)
    assert torch.equal(model(latent, same_time[0], labels).sample, model(latent, same_time, labels).sample)
    null = torch.full((2,), 5)
    assert torch.equal(model(latent, t).sample, model(latent, t, null).sample)
    assert torch.equal(
        model(latent, t, labels, force_drop_ids=torch.ones(2)).sample, model(latent, t, null).sample
    )


def test_labels_are_dropped_in_training_only() -> None:
    embedder = tiny(class_dropout_prob=0.25).y_embedder
    labels = torch.zeros(20_000, dtype=torch.long)
    torch.manual_seed(0)
    assert torch.equal(embedder.eval().drop(labels), labels)
    dropped = embedder.train().drop(labels) == embedder.null_label
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.015)  # five standard deviations
    none = tiny(class_dropout_prob=0.0).y_embedder.train()
    assert torch.equal(none.drop(labels), labels)
    assert none.embedding_table.num_embeddings == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": torch.randn(2, 3, 8, 8)}, r"expected \(B, 4, H, W\)"),
        ({"latent": torch.randn(2, 4, 7, 8)}, "multiple of 2"),
        ({"t": torch.zeros(3)}, "timestep has shape"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "class_labels has shape"),
    ],
)
def test_wrong_inputs_are_explained(change: dict[str, torch.Tensor], message: str) -> None:
    latent, t, labels = inputs()
    arguments = {"latent": latent, "t": t, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        tiny()(arguments["latent"], arguments["t"], arguments["labels"])


def test_no_null_class_is_explained() -> None:
    latent, t, _ = inputs()
    with pytest.raises(ValueError, match="no null class"):
        tiny(class_dropout_prob=0.0)(latent, t)
    with pytest.raises(ValueError, match="width=32"):
        tiny(num_heads=5)


class TestGuidance:
    @pytest.mark.parametrize(("channels", "guided"), [(3, 3), ("all", 4), (1, 1)])
    def test_channels(self, channels: int | str, guided: int) -> None:
        model = tiny()
        latent, t, labels = inputs()
        both, times, pairs = latent.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, torch.full((2,), 5)])
        conditional, unconditional = model(both, times, pairs).sample.chunk(2)
        first, second = model.forward_with_cfg(both, times, pairs, 3.0, channels).chunk(2)
        expected = unconditional + 3.0 * (conditional - unconditional)
        torch.testing.assert_close(first[:, :guided], expected[:, :guided], atol=1e-5, rtol=0)
        assert torch.equal(first[:, :guided], second[:, :guided])
        torch.testing.assert_close(first[:, guided:], conditional[:, guided:])
        torch.testing.assert_close(second[:, guided:], unconditional[:, guided:])

    def test_second_half_of_the_latents_is_ignored(self) -> None:
        model = tiny(SiT)
        latent, t, labels = inputs(4)
        changed = torch.cat([latent[:2], torch.randn(2, 4, 8, 8)])
        assert torch.equal(
            model.forward_with_cfg(latent, t, labels, 2.0), model.forward_with_cfg(changed, t, labels, 2.0)
        )

    def test_errors(self) -> None:
        latent, t, labels = inputs(3)
        with pytest.raises(ValueError, match="batch 3"):
            tiny().forward_with_cfg(latent, t, labels, 2.0)
        for wrong in (0, 5, True, "some"):
            with pytest.raises(ValueError, match="can't be guided"):
                tiny().forward_with_cfg(latent[:2], t[:2], labels[:2], 2.0, wrong)


@pytest.mark.parametrize("cls", [DiT, SiT])
def test_saved_and_loaded(cls: type[DiT], tmp_path: Path) -> None:
    model = tiny(cls, input_size=(4, 8))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    loaded = cls.from_pretrained(tmp_path)
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    arguments = inputs(2, 4, 8)
    assert torch.equal(loaded(*arguments).sample, model(*arguments).sample)
    half = cls.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    latent, t, labels = arguments
    output = half(latent.bfloat16(), t, labels).sample
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), model(*arguments).sample, atol=0.1, rtol=0.1)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)
        model(*inputs()).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_attention_is_called_through_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention methods replace `torch.nn.functional.scaled_dot_product_attention`."""
    calls = []
    original = F.scaled_dot_product_attention

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(arguments[0].shape)
        return original(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    tiny(depth=3)(*inputs())
    assert calls == [(2, 4, 16, 8)] * 3


def test_compiles_without_a_graph_break() -> None:
    model = tiny()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs()).sample, model(*inputs()).sample)
