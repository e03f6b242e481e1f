"""LiT for text: PixArt with linear self-attention, inherited, distilled, inside a PixArtSigmaPipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

import ditkit
import tiny_pipelines
from ditkit import models
from ditkit.analysis.sampling import Sampling, sample
from ditkit.methods.clear import LocalWindow
from ditkit.methods.taylorseer import TaylorSeer
from ditkit.models.convert import inherit as convert_inherit
from ditkit.models.lit import LiT, distillation_losses
from ditkit.models.lit_pixart import LiTPixArtTransformer2DModel, inherit
from ditkit.models.sizes import measure
from ditkit.models.weight_files import ConversionError
from ditkit.seams.errors import SeamError
from tiny_models import TINY

PIXART = TINY["PixArtTransformer2DModel"]


@pytest.fixture(scope="module")
def teacher() -> Any:
    return PIXART.model()


@pytest.fixture(scope="module")
def student(teacher: Any) -> Any:
    torch.manual_seed(1)
    return inherit(teacher)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PixArt pipeline."""
    path = tmp_path_factory.mktemp("pixart")
    tiny_pipelines.pixart().save_pretrained(path)
    return path


def call(size: tuple[int, int], batch: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {**PIXART.inputs(batch), "hidden_states": torch.randn(batch, 4, *size, generator=generator)}


@torch.no_grad()
def explicit(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model with every self-attention computed from all pairs of tokens, over one convolution of all
    channels whose kernels are shared by the heads."""
    side = [n // 2 for n in inputs["hidden_states"].shape[-2:]]

    def attend(module: Any, args: Any, _: Any) -> torch.Tensor:
        heads, (tokens, grid) = module.num_heads, args
        assert list(grid) == side
        query, key, value = (
            part.unflatten(2, (heads, -1)).transpose(1, 2)
            for part in (module.q(tokens), *module.kv(tokens).chunk(2, -1))
        )
        weights = (query.relu() + 1e-6) @ (key.relu() + 1e-6).transpose(2, 3)  # (B, N, T, T)
        attended = weights @ value / (weights.sum(3, keepdim=True) + tokens.shape[1] * 1e-6)
        maps = value.transpose(2, 3).flatten(1, 2).unflatten(2, grid)  # (B, D, R, S)
        kernels, bias = module.dwc.weight.repeat(heads, 1, 1, 1), module.dwc.bias.repeat(heads)
        local = torch.nn.functional.conv2d(maps, kernels, bias, padding=2, groups=maps.shape[1])
        return module.proj(attended.transpose(1, 2).flatten(2) + local.flatten(2).transpose(1, 2))

    hooks = [block.attn1.register_forward_hook(attend) for block in model.transformer_blocks]
    try:
        return model(**inputs).sample
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (14, 6)])
@torch.no_grad()
def test_linear_form_equals_the_explicit_one(student: Any, size: tuple[int, int]) -> None:
    inputs = call(size)
    found = student(**inputs).sample
    assert found.shape == (2, 8, *size)
    torch.testing.assert_close(found, explicit(student, inputs), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_block_with_the_old_attention_is_pixarts(teacher: Any, student: Any) -> None:
    """All but the self-attention is diffusers' own arithmetic."""
    inputs = call((4, 8))
    hooks = [
        new.attn1.register_forward_hook(lambda _, args, __, old=old: old.attn1(args[0]))
        for new, old in zip(student.transformer_blocks, teacher.transformer_blocks, strict=True)
    ]
    try:
        torch.testing.assert_close(student(**inputs).sample, teacher(**inputs).sample, atol=1e-6, rtol=1e-5)
    finally:
        for hook in hooks:
            hook.remove()
    assert not torch.allclose(student(**inputs).sample, teacher(**inputs).sample, atol=1e-2)


@torch.no_grad()
def test_the_grid_tells_pictures_of_equal_tokens_apart(student: Any) -> None:
    block = student.transformer_blocks[0]
    tokens = torch.randn(1, 24, 32)
    assert not torch.allclose(block.attn1(tokens, (4, 6)), block.attn1(tokens, (2, 12)), atol=1e-4)


def test_gradients_reach_every_weight_and_checkpointing_changes_none(student: Any) -> None:
    inputs, found = call((4, 8)), []
    fresh: Any = PIXART.model()
    model: Any = inherit(fresh).train().requires_grad_(True)
    model.load_state_dict(student.state_dict())
    for checkpointing in (False, True):
        model.zero_grad()
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        model(**inputs).sample.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert set(found[0]) == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(found[0], found[1])


class TestInheritance:
    def test_all_but_the_self_attention(self, teacher: Any, student: Any) -> None:
        ours, theirs = student.state_dict(), teacher.state_dict()
        same = {name for name in theirs if ".attn1." not in name}
        assert all(torch.equal(ours[name], theirs[name]) for name in same)
        assert {name for name in ours if name not in same} == {name for name in ours if ".attn1." in name}
        assert student.config["linear_heads"] == 2 and not student.training
        assert any(".attn2.to_out.0.weight" in name for name in same)

    @pytest.mark.parametrize("parts", [("proj",), ("q", "k", "v"), ("v",)])
    def test_parts_of_the_attention(self, teacher: Any, parts: tuple[str, ...]) -> None:
        block = inherit(teacher, parts, linear_heads=4).transformer_blocks[1]
        new: Any = block.attn1
        old = teacher.transformer_blocks[1].attn1
        halves = new.kv.weight.chunk(2)
        pairs = {
            "q": (new.q.weight, old.to_q.weight),
            "k": (halves[0], old.to_k.weight),
            "v": (halves[1], old.to_v.weight),
            "proj": (new.proj.weight, old.to_out[0].weight),
        }
        for name, (mine, theirs) in pairs.items():
            assert torch.equal(mine, theirs) == (name in parts), name
        assert torch.equal(new.proj.bias, old.to_out[0].bias) == ("proj" in parts)

    def test_refused(self, teacher: Any, student: Any) -> None:
        with pytest.raises(TypeError, match="LiTPixArt"):
            inherit(student)
        with pytest.raises(ValueError, match="'out'"):
            inherit(teacher, ("out",))
        with pytest.raises(ValueError, match="inherited"):
            inherit(teacher, num_layers=2)
        with pytest.raises(ValueError, match="num_heads=5"):
            inherit(teacher, linear_heads=5)
        with pytest.raises(ValueError, match="attention_mask"):
            student(**call((8, 8)), attention_mask=torch.ones(2, 16))

    def test_a_pipeline_stays_one(self, folder: Path, tmp_path: Path) -> None:
        done = convert_inherit(folder, "lit-pixart", tmp_path / "lit", config={"linear_heads": 1})
        pipe = ditkit.load(done.output)
        assert isinstance(pipe, PixArtSigmaPipeline)
        assert isinstance(pipe.transformer, LiTPixArtTransformer2DModel)
        assert pipe.transformer.config["linear_heads"] == 1
        before = ditkit.load(folder)
        for part in ("text_encoder", "vae"):
            for ours, theirs in zip(
                getattr(pipe, part).parameters(), getattr(before, part).parameters(), strict=True
            ):
                assert torch.equal(ours, theirs)
        drawn = sample(pipe, ["red apple", "blue fish"], Sampling(2, 2.0, (16, 32)))
        assert drawn.pictures.shape == (2, 16, 32, 3)
        assert drawn.latents is not None and drawn.latents.isfinite().all()
        again = sample(pipe, ["red apple"], Sampling(2, 2.0, (16, 32)))
        assert again.latents is not None
        torch.testing.assert_close(again.latents, drawn.latents[:1], atol=1e-5, rtol=1e-5)

    def test_a_fresh_process_opens_the_pipeline(self, folder: Path, tmp_path: Path) -> None:
        """diffusers loads no class whose module is not imported yet."""
        convert_inherit(folder, "lit-pixart", tmp_path / "lit")
        code = "import ditkit, sys; print(type(ditkit.load(sys.argv[1]).transformer).__name__)"
        command = [sys.executable, "-c", code, str(tmp_path / "lit")]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.stdout.split() == ["LiTPixArtTransformer2DModel"], ran.stderr[-500:]

    def test_folders(self, folder: Path, tmp_path: Path) -> None:
        PixArtTransformer2DModel.from_pretrained(folder / "transformer").save_pretrained(tmp_path / "alone")
        done = convert_inherit(tmp_path / "alone", "lit-pixart", tmp_path / "lit")
        assert not (done.output / "model_index.json").exists()
        assert isinstance(models.load(done.output), LiTPixArtTransformer2DModel)
        for arch, source in (("lit", "alone"), ("lit-pixart", "lit")):
            with pytest.raises(ConversionError, match=f"{arch} can't start from a"):
                convert_inherit(tmp_path / source, arch, tmp_path / "out")


def test_saved_and_loaded(student: Any, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_layers"] == 3
    loaded = LiTPixArtTransformer2DModel.from_pretrained(tmp_path)
    inputs = call((4, 8))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, student(**inputs).sample)


def test_size() -> None:
    """PixArt-Sigma's parameters and 26 E more for each block; the paper rounds them to 0.6 billion."""
    size = measure("lit-pixart-xl/2-512")
    assert size.parameters == 610_856_096 + 28 * 26 * 288
    assert size.parameters == pytest.approx(0.6e9, rel=0.02)


def test_float32_attention() -> None:
    """`upcast_linear` matters where weights are of half precision only."""
    old: Any = PIXART.model()
    model = LiTPixArtTransformer2DModel(**{**old.config, "linear_heads": 2}).eval()
    plain = LiTPixArtTransformer2DModel(**{**model.config, "upcast_linear": False}).eval()
    plain.load_state_dict(model.state_dict())
    inputs = call((4, 8))
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, plain(**inputs).sample)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(model(**inputs).sample, plain(**inputs).sample)


class TestMethods:
    @torch.no_grad()
    def test_caches_run(self, student: Any) -> None:
        def denoise() -> torch.Tensor:
            inputs = call((4, 8))
            for noise in (0.9, 0.7, 0.5, 0.3, 0.1):
                update = student(**{**inputs, "timestep": PIXART.time(2, noise)}).sample[:, :4]
                inputs["hidden_states"] = inputs["hidden_states"] - 0.1 * update
            return inputs["hidden_states"]

        dense = denoise()
        for granularity in ("last-block", "module"):
            with ditkit.apply(student, TaylorSeer(interval=1, granularity=granularity)):
                assert torch.equal(denoise(), dense)
            with ditkit.apply(student, TaylorSeer(interval=2, warmup=1, granularity=granularity)) as run:
                assert not torch.equal(denoise(), dense)
                assert run.report().steps_computed < 5
        assert torch.equal(denoise(), dense)

    def test_attention_methods_are_refused_with_the_reason(self, student: Any) -> None:
        with pytest.raises(SeamError, match="linear"):
            ditkit.apply(student, LocalWindow(radius=1))


def test_distillation_brings_the_student_to_the_teacher(teacher: Any) -> None:
    """Hybrid distillation with the text model's weights, on one batch of captions and noise levels."""
    torch.manual_seed(0)
    student: Any = inherit(teacher, ("proj",)).train().requires_grad_(True)
    inputs = call((8, 8), batch=4)
    inputs["timestep"] = torch.tensor([100.0, 300.0, 600.0, 900.0])
    with torch.no_grad():
        target = teacher(**inputs).sample
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    seen: list[dict[str, float]] = []
    for _ in range(60):
        losses = distillation_losses(student(**inputs).sample, target, 4, 1.0, 0.05)
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
        seen.append({name: float(value.detach().mean()) for name, value in losses.items()})
    assert seen[0]["loss"] == pytest.approx(
        seen[0]["distilled_noise"] + 0.05 * seen[0]["distilled_variance"], rel=1e-5
    )
    assert seen[-1]["distilled_noise"] < 0.1 * seen[0]["distilled_noise"], (seen[0], seen[-1])


def test_class_models_are_no_pixart() -> None:
    with pytest.raises(TypeError, match="LiT"):
        wrong: Any = LiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=3)
        inherit(wrong)
