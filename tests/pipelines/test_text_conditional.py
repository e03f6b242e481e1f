"""The text-conditional pipeline: what the models are given of texts, guidance, schedulers, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import ditkit
from ditkit import models
from ditkit.data.words import END, PAD, word_tokenizer
from ditkit.models.dit import DiT
from ditkit.models.text import text_settings
from ditkit.pipelines.denoising import scheduler_for
from ditkit.pipelines.text_conditional import TextConditionalPipeline

TINY: dict[str, dict[str, Any]] = {
    "pt-dit": {"hidden_size": 32, "depth": 2, "num_heads": 2, "compress_ratios": (1, 2, 2)},
    "dico": {"hidden_size": 8, "depth": (1, 1, 1, 1, 1)},
}
both = pytest.mark.parametrize("arch", TINY)


def encoder(kind: str, tokenizer: Any) -> Any:
    ids = {
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
    }
    size = len(tokenizer)
    if kind == "t5":
        return T5EncoderModel(
            T5Config(vocab_size=size, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **ids)
        )
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=ids["eos_token_id"], **ids,
        )
    )  # fmt: skip


def pipeline(arch: str = "pt-dit", process: Any = "flow", kind: str = "t5", **config: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["red apple", "blue fish in the sea"], 8)
    settings = {
        "input_size": 8,
        "in_channels": 3,
        "learn_sigma": process == "gaussian",
        **TINY[arch],
        **config,
    }
    network = models.create(arch, **text_settings(arch, 24), **settings).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    scheduler = scheduler_for(process, process == "gaussian", clip=True)
    pipe = TextConditionalPipeline(tokenizer, encoder(kind, tokenizer).eval(), network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, prompt: Any = ("red apple", "blue fish"), **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "generator": generator, "output_type": "latent", **options}
    return pipe(prompt, **options).images


@both
@pytest.mark.parametrize("process", ["gaussian", "flow"])
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_texts_matter_and_each_picture_is_its_own(arch: str, process: str, kind: str) -> None:
    # In float64: random weights blow up the last bits, in which batches of one and two differ.
    pipe = pipeline(arch, process, kind).to(torch.float64)
    start = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [
        latents(pipe, text, latents=start, generator=[torch.Generator().manual_seed(2)])
        for text in ("red apple", "blue fish")
    ]
    assert found[0].shape == (1, 3, 8, 8) and not torch.equal(*found)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    together = latents(pipe, latents=start.repeat(2, 1, 1, 1), generator=generators)
    torch.testing.assert_close(together, torch.cat(found), atol=1e-6, rtol=1e-6)


@both
def test_guidance_is_between_the_text_and_the_empty_one(arch: str) -> None:
    pipe = pipeline(arch)
    network, seen = pipe.transformer, []
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    found = latents(pipe, latents=start, num_inference_steps=1, guidance_scale=3.0, guidance_channels=2)
    plain = latents(pipe, latents=start, num_inference_steps=1, guidance_scale=1.0)
    assert seen == [4, 2]
    with torch.no_grad():
        with_text, without = (
            network(start, torch.zeros(2), **pipe.encode_prompt(texts)).sample
            for texts in (["red apple", "blue fish"], ["", ""])
        )
    guided = torch.cat([(without + 3 * (with_text - without))[:, :2], with_text[:, 2:]], 1)
    torch.testing.assert_close(
        found, start + guided, atol=1e-4, rtol=1e-4
    )  # one Euler step from noise to data
    torch.testing.assert_close(plain, start + with_text, atol=1e-4, rtol=1e-4)


def test_padding_counts_only_for_models_without_a_mask() -> None:
    pipe = pipeline("pt-dit")
    given = pipe.encode_prompt(["red apple"])
    assert given["encoder_attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    noise = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        whole = pipe.transformer(noise, torch.zeros(1), **given).sample
        states = given["encoder_hidden_states"].clone()
        states[:, 3:] += 1
        changed = pipe.transformer(noise, torch.zeros(1), **{**given, "encoder_hidden_states": states}).sample
    assert torch.equal(whole, changed)
    assert set(pipeline("dico").encode_prompt(["red apple"])) == {"encoder_hidden_states"}


@both
def test_saved_and_loaded(arch: str, tmp_path: Path) -> None:
    pipe = pipeline(arch)
    pipe.save_pretrained(tmp_path)
    for loaded in (TextConditionalPipeline.from_pretrained(tmp_path), ditkit.load(tmp_path)):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is TextConditionalPipeline
        assert torch.equal(latents(loaded), latents(pipe))


def test_pictures_and_other_schedulers() -> None:
    pipe = pipeline(process="gaussian")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    drawn = pipe("red apple", num_inference_steps=2, num_images_per_prompt=3, height=12, width=8)
    assert [image.size for image in drawn.images] == [(8, 12)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "nothing to draw"),
        ({"num_images_per_prompt": 0}, "nothing to draw"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 texts for 2 prompts"),
        ({"height": 10}, "height=10: expected a multiple of 4"),
        ({"guidance_channels": 4}, "can't be guided"),
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"latents": torch.zeros(3, 3, 8, 8)}, r"expected \(2, 3, H, W\)"),
    ],
)
def test_wrong_arguments_are_explained(options: dict[str, Any], message: str) -> None:
    pipe = pipeline()
    pipe.transformer.register_forward_pre_hook(lambda module, given: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        latents(pipe, options.pop("prompt", ("red apple", "blue fish")), **options)


def test_models_that_do_not_fit() -> None:
    pipe = pipeline()
    no_text = DiT(input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=2, in_channels=3)
    with pytest.raises(ValueError, match="24 wide, the DiT reads no text"):
        TextConditionalPipeline(pipe.tokenizer, pipe.text_encoder, no_text, pipe.scheduler)
    wide = models.create("dico", **text_settings("dico", 16), **TINY["dico"])
    with pytest.raises(ValueError, match="24 wide, the DiCo reads 16"):
        TextConditionalPipeline(pipe.tokenizer, pipe.text_encoder, wide, pipe.scheduler)
    with pytest.raises(ValueError, match="dit reads no text; dico, pt-dit do"):
        text_settings("dit-b/2", 24)
    with pytest.raises(ValueError, match="does not fit a PTDiT"):
        latents(pipeline(process="flow", learn_sigma=True))
