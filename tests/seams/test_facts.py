"""What single classes do beyond the common: several prompts, references, frames with times of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditkit
from ditkit.seams.attention import Dense
from ditkit.seams.errors import SeamError
from probes import Chosen, Memory, StackMemory, Using
from tiny_models import output
from zoo import ZOO


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return output(model(**inputs))


def check_caches(model: nn.Module, inputs: dict[str, Any]) -> None:
    """What the blocks or their units gave can be given back, bit by bit."""
    expected = run(model, inputs)
    units, stack = Memory(), StackMemory()
    with ditkit.apply(model, Using(units), count_flops=False):
        assert torch.equal(run(model, inputs), expected)
        units.chosen = lambda unit: True
        assert torch.equal(run(model, inputs), expected)
    with ditkit.apply(model, Using(stack), count_flops=False):
        assert torch.equal(run(model, inputs), expected)
        stack.skip = True
        assert torch.equal(run(model, inputs), expected)


def check_permutation(model: nn.Module, inputs: dict[str, Any], tokens: int) -> None:
    expected = run(model, inputs)
    shuffled = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    with ditkit.apply(model, Using(Chosen(shuffled)), count_flops=False):
        torch.testing.assert_close(run(model, inputs), expected, atol=2e-5, rtol=1e-5)


def check_refused(model: nn.Module, inputs: dict[str, Any], thing: Any, match: str) -> None:
    with ditkit.apply(model, Using(thing), count_flops=False), pytest.raises(SeamError, match=match):
        run(model, inputs)


def rebuilt(name: str, **config: Any) -> nn.Module:
    """The tiny model with another configuration."""
    model = ZOO[name].model()
    torch.manual_seed(0)
    return type(model)(**{**model.config, **config}).eval().requires_grad_(False)


def test_prompts_of_several_lengths_in_a_batch() -> None:
    lumina, z_image, fibo = (
        ZOO[name]
        for name in ("Lumina2Transformer2DModel", "ZImageTransformer2DModel", "BriaFibo2Transformer2DModel")
    )
    cases: list[tuple[nn.Module, dict[str, Any]]] = []
    inputs = lumina.inputs(batch=2)
    inputs["encoder_attention_mask"][0, 3] = False
    cases.append((lumina.model(), inputs))
    inputs = z_image.inputs(batch=2)
    inputs["cap_feats"][0] = torch.randn(40, 24)
    cases.append((z_image.model(), inputs))
    inputs = fibo.inputs(batch=2)
    inputs["encoder_attention_mask"][0, 3:] = False
    cases.append((fibo.model(), inputs))
    for model, inputs in cases:
        check_caches(model, inputs)
        for thing in (Dense(), Chosen(torch.arange(4))):
            check_refused(model, inputs, thing, "another place in each sample")


def test_a_picture_that_is_padded() -> None:
    tiny = ZOO["ZImageTransformer2DModel"]
    inputs = {**tiny.inputs(), "x": [torch.randn(4, 1, 8, 8)]}
    check_caches(tiny.model(), inputs)
    check_refused(tiny.model(), inputs, Dense(), "4 x 4 tokens is padded to a multiple of 32")
    check_refused(tiny.model(), inputs, Chosen(torch.arange(4)), "multiple of 32")
    tiny = ZOO["HiDreamImageTransformer2DModel"]
    inputs = {**tiny.inputs(), "hidden_states": torch.randn(1, 4, 8, 12)}
    check_caches(tiny.model(), inputs)
    check_refused(tiny.model(), inputs, Dense(), "not square")


def test_references_beside_the_picture() -> None:
    tiny = ZOO["Flux3Transformer2DModel"]
    inputs = tiny.inputs()
    inputs["image_cond_hidden_states"] = torch.randn(1, 4, 4)
    inputs["image_cond_ids"] = inputs["img_ids"][:4] + 9
    check_caches(tiny.model(), inputs)
    check_refused(tiny.model(), inputs, Chosen(torch.arange(4)), "image_cond_hidden_states")
    tiny = ZOO["BriaFibo2Transformer2DModel"]
    inputs = {**tiny.inputs(), "context_latents": [torch.randn(1, 4, 4, 4)]}
    check_caches(tiny.model(), inputs)
    for thing in (Dense(), Chosen(torch.arange(4))):
        check_refused(tiny.model(), inputs, thing, "context_latents stand behind the picture")
    tiny = ZOO["Flux2Transformer2DModel"]
    inputs = tiny.inputs()
    reference = {
        "hidden_states": torch.randn(1, 4, 4),
        "img_ids": inputs["img_ids"][:4] + torch.tensor([10, 0, 0, 0]),
    }
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], reference["hidden_states"]], dim=1)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], reference["img_ids"]])
    check_caches(tiny.model(), inputs)
    check_refused(tiny.model(), inputs, Dense(), "20 image tokens are not one")
    tiny = ZOO["JoyImageEditTransformer3DModel"]
    inputs = {**tiny.inputs(), "hidden_states": torch.randn(1, 2, 4, 1, 8, 4)}
    check_caches(tiny.model(), inputs)
    check_refused(tiny.model(), inputs, Dense(), "several pictures in one sequence")
    tiny = ZOO["JoyImageEditPlusTransformer3DModel"]
    inputs = {**tiny.inputs(), "shape_list": [[(1, 2, 4), (1, 2, 4)]]}
    check_caches(tiny.model(), inputs)
    check_refused(tiny.model(), inputs, Dense(), "shape_list")


def test_frames_with_timesteps_of_their_own() -> None:
    tiny = ZOO["SkyReelsV2Transformer3DModel"]
    model = rebuilt(tiny.name, num_frame_per_block=2)
    inputs = {**tiny.inputs(batch=2), "enable_diffusion_forcing": True}
    inputs["timestep"] = torch.tensor([[800.0, 500.0], [300.0, 200.0]])
    model.config["num_frame_per_block"] = 2
    check_caches(model, inputs)
    check_permutation(model, inputs, 16)
    tiny = ZOO["CosmosTransformer3DModel"]
    inputs = tiny.inputs(batch=2)
    inputs["timestep"] = torch.tensor([[0.8, 0.5], [0.3, 0.2]]).reshape(2, 1, 2, 1, 1)
    check_caches(tiny.model(), inputs)
    check_permutation(tiny.model(), inputs, 16)
    tiny = ZOO["SanaVideoTransformer3DModel"]
    inputs = {**tiny.inputs(batch=2), "timestep": torch.linspace(0, 900, 32).reshape(2, 16)}
    check_caches(tiny.model(), inputs)


def test_a_control_branch_that_ends_with_the_last_block() -> None:
    model = rebuilt("WanVACETransformer3DModel", vace_layers=[0, 1])
    with pytest.raises(
        SeamError, match="vace_layers adds a hint of the control branch behind the last block"
    ):
        ditkit.apply(model, Using(StackMemory()))
    with ditkit.apply(model, Using(Memory())):
        pass


def test_blocks_that_decode_the_picture_again() -> None:
    tiny = ZOO["MotifVideoTransformer3DModel"]
    model = rebuilt(tiny.name, num_decoder_layers=1)
    check_caches(model, tiny.inputs())
    check_refused(model, tiny.inputs(), Dense(), "num_decoder_layers")
    with pytest.raises(SeamError, match="num_decoder_layers"):
        ditkit.apply(model, Using(Chosen(torch.arange(4))))


def test_the_models_own_sparse_attention() -> None:
    tiny = ZOO["Kandinsky5Transformer3DModel"]
    inputs = {**tiny.inputs(), "sparse_params": {"to_fractal": False}}
    check_refused(tiny.model(), inputs, Dense(), "sparse_params reorders the tokens")
    check_refused(tiny.model(), inputs, Chosen(torch.arange(4)), "sparse_params reorders the tokens")


def test_image_tokens_that_are_not_at_the_end() -> None:
    tiny = ZOO["Ideogram4Transformer2DModel"]
    inputs = tiny.inputs()
    inputs["indicator"] = inputs["indicator"].flip(1)
    check_refused(tiny.model(), inputs, Dense(), "indicator")


def test_only_image_tokens_of_a_joint_sequence_reach_a_cache() -> None:
    for name in ("ChromaTransformer2DModel", "Flux2Transformer2DModel", "OmniGenTransformer2DModel"):
        cache, model = StackMemory(), ZOO[name].model()
        with ditkit.apply(model, Using(cache), count_flops=False):
            run(model, ZOO[name].inputs())
        assert cache.kept is not None and cache.kept.shape[1] == 16


def test_every_denoiser_of_a_pipeline_is_hooked() -> None:
    class Pipeline:
        components = {
            "transformer": ZOO["Ideogram4Transformer2DModel"].model(),
            "unconditional_transformer": ZOO["Ideogram4Transformer2DModel"].model(),
            "text_encoder": nn.Linear(2, 2),
        }

    with ditkit.apply(Pipeline()) as handle:
        assert [host.name for host in handle.hosts] == ["transformer", "unconditional_transformer"]
