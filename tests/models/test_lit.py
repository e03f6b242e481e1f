"""LiT: linear attention in both forms, inheritance from a DiT, distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from architectures import CASES, inputs
from ditkit import models
from ditkit.models.convert import inherit as convert_inherit
from ditkit.models.dit import DiT, SiT
from ditkit.models.lit import LinearAttention, LiT, distillation_losses, inherit, linear_attention
from ditkit.models.weight_files import ConversionError

TINY: dict[str, Any] = dict(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)


def trained(cls: type[DiT] = DiT) -> DiT:
    torch.manual_seed(0)
    model = cls(**TINY).eval()
    return model.apply(
        lambda module: [torch.nn.init.normal_(p, std=0.1) for p in module.parameters(recurse=False)]
    )


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_linear_form_equals_the_explicit_one(tokens: int) -> None:
    query, key, value = torch.randn(3, 2, 3, tokens, 8).unbind(0)
    weights = (query.relu() + 1e-6) @ (key.relu() + 1e-6).transpose(2, 3)  # (B, N, T, T)
    explicit = weights @ value / (weights.sum(3, keepdim=True) + tokens * 1e-6)
    torch.testing.assert_close(linear_attention(query, key, value), explicit, atol=1e-5, rtol=1e-5)


def test_kernels_are_shared_by_the_heads() -> None:
    """As one convolution of all channels, with kernel `channel mod E`."""
    attention, tokens = LinearAttention(12, 3), torch.randn(2, 20, 12)
    attention.proj = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        full = attention(tokens, (4, 5))
        attention.dwc.weight.zero_(), attention.dwc.bias.zero_()
        without = attention(tokens, (4, 5))
        kernels = torch.randn(4, 1, 5, 5)
        attention.dwc.weight.copy_(kernels)
        local = attention(tokens, (4, 5)) - without
        values = attention.kv(tokens)[..., 12:].transpose(1, 2).unflatten(2, (4, 5))
        expected = F.conv2d(values, kernels.repeat(3, 1, 1, 1), padding=2, groups=12)
    torch.testing.assert_close(local, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert not torch.equal(full, without)


def test_options() -> None:
    model = CASES["lit"].model()
    upcast = LiT(**{**CASES["lit"].tiny, "upcast_attention": True}).eval()
    upcast.load_state_dict(model.state_dict())
    torch.testing.assert_close(upcast(*inputs(model)).sample, model(*inputs(model)).sample)
    unbiased = LiT(**{**CASES["lit"].tiny, "qkv_bias": False})
    assert not [name for name in unbiased.state_dict() if name.endswith(("q.bias", "kv.bias"))]


def test_parts_make_the_whole() -> None:
    model = CASES["lit"].model()
    latent, times, labels = inputs(model, 2, (4, 12))
    tokens, conditioning = model.embed(latent, times, labels)
    with pytest.raises(ValueError, match="give run_blocks its grid"):
        model.run_blocks(tokens, conditioning)
    tokens = model.run_blocks(tokens, conditioning, grid=(2, 6))
    assert torch.equal(model.head(tokens, conditioning, (2, 6)), model(latent, times, labels).sample)


def test_routed() -> None:
    routed, plain = models.create("dtr-lit", **CASES["lit"].tiny), CASES["lit"].model()
    routed.eval().load_state_dict(plain.state_dict())
    assert not torch.equal(routed(*inputs(plain)).sample, plain(*inputs(plain)).sample)


class TestInheritance:
    def test_all_but_the_attention(self) -> None:
        teacher = trained()
        student = inherit(teacher)
        ours, theirs = student.state_dict(), teacher.state_dict()
        same = {name for name in theirs if ".attn." not in name}
        assert all(torch.equal(ours[name], theirs[name]) for name in same)
        assert {name for name in ours if name not in same} == {n for n in ours if ".attn." in n}
        assert student.config["num_heads"] == 2 and not student.training
        assert not torch.equal(ours["blocks.0.attn.proj.weight"], theirs["blocks.0.attn.proj.weight"])

    @pytest.mark.parametrize("parts", [("q", "k", "v"), ("v",), ("k", "proj")])
    def test_parts_of_the_attention(self, parts: tuple[str, ...]) -> None:
        teacher = trained()
        student = inherit(teacher, parts, num_heads=8)
        theirs = dict(zip("qkv", teacher.blocks[1].attn.qkv.weight.chunk(3), strict=True))
        attention: Any = student.blocks[1].attn
        ours = dict(zip("kv", attention.kv.weight.chunk(2), strict=True)) | {"q": attention.q.weight}
        for name in "qkv":
            assert torch.equal(ours[name], theirs[name]) == (name in parts)
        assert torch.equal(attention.proj.weight, teacher.blocks[1].attn.proj.weight) == ("proj" in parts)

    def test_refused(self) -> None:
        with pytest.raises(TypeError, match="SiT"):
            inherit(trained(SiT))
        with pytest.raises(ValueError, match="'qk'"):
            inherit(trained(), ("qk",))
        with pytest.raises(ValueError, match="inherited"):
            inherit(trained(), hidden_size=16)

    def test_folders(self, tmp_path: Path) -> None:
        teacher = trained()
        teacher.save_pretrained(tmp_path / "dit")
        done = convert_inherit(tmp_path / "dit", "lit", tmp_path / "lit", config={"num_heads": 1})
        student = models.load(done.output)
        assert isinstance(student, LiT) and student.config["num_heads"] == 1
        assert torch.equal(student.final_layer.linear.weight, teacher.final_layer.linear.weight)
        for arch, source, message in (
            ("dico", "dit", "no other architecture"),
            ("lit", "lit", "can't start from a LiT"),
        ):
            with pytest.raises(ConversionError, match=message):
                convert_inherit(tmp_path / source, arch, tmp_path / "out")
        with pytest.raises(FileNotFoundError):
            convert_inherit(tmp_path / "nowhere", "lit", tmp_path / "out")


def test_distillation() -> None:
    student, teacher = torch.zeros(2, 8, 3, 3, requires_grad=True), torch.ones(2, 8, 3, 3)
    teacher[:, 4:] = 2
    losses = distillation_losses(student, teacher, 4)
    assert losses["distilled_noise"].tolist() == [1, 1] and losses["distilled_variance"].tolist() == [4, 4]
    assert losses["loss"].tolist() == pytest.approx([0.7, 0.7])
    losses["loss"].sum().backward()
    flow = distillation_losses(student[:, :4], teacher[:, :4], 4)
    assert set(flow) == {"distilled_noise", "loss"}
