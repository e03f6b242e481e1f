"""The bundled pipeline's own recipe, a few steps of each stage: what comes out is a whole FluxPipeline."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline

from ditkit.data.emoji import EmojiDataset
from ditkit.data.words import unknown_words, word_tokenizer
from ditkit.hub import load
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.autoencoder import standardise
from ditkit.training.trainer import train

QUICK = [
    f"{stage}.{change}"
    for stage in ("autoencoder", "text_encoders", "transformer")
    for change in ("steps=2", "batch_size=4", "data={split: all, groups: [keycap]}", "checkpoint_every=1",
                   "sample_every=0", "heldout_every=0", "tracker=null", "precision='no'")
] + ["text_encoders.task_options.components=8", "transformer.task_options.preview_steps=2",
     "transformer.precision=bf16"]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, request):
    output = tmp_path_factory.mktemp("micro") / "run"
    recipe = request.config.rootpath / "configs" / "micro_flux.yaml"
    return train(recipe, [f"output={output}", *QUICK, "transformer.sample_every=2"])


def test_export_is_a_flux_pipeline(bundle):
    pipe = FluxPipeline.from_pretrained(bundle, dtype=torch.float32)
    assert type(pipe) is FluxPipeline
    sizes = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    assert sizes <= 25e6
    assert not list(bundle.rglob("*.bin"))
    texts = [file.read_text(encoding="utf-8") for file in bundle.rglob("*.json")]
    assert not any(str(bundle.parent.parent) in text for text in texts)
    assert list((bundle.parent / "samples").glob("*.png"))


def test_a_plain_call_has_the_trained_size(bundle):
    pipe = load(bundle)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("keycap 1", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert images[0].size == (64, 64)
    _, _, text_ids = pipe.encode_prompt("keycap 1", None)
    assert text_ids.shape[0] == pipe.tokenizer_2.model_max_length


def test_stages_that_are_done_are_passed_over(bundle, request):
    output = bundle.parent.parent
    recipe = request.config.rootpath / "configs" / "micro_flux.yaml"
    before = (output / "autoencoder" / "metrics.jsonl").read_text()
    train(recipe, [f"output={output}", *QUICK, "transformer.sample_every=2"], resume=True)
    assert (output / "autoencoder" / "metrics.jsonl").read_text() == before


def test_text_losses_are_recorded(bundle):
    lines = (bundle.parent.parent / "text_encoders" / "metrics.jsonl").read_text().splitlines()
    assert {"loss", "unexplained_clip", "unexplained_t5", "lr"} <= set(json.loads(lines[-1]))


def test_standardise_keeps_reconstructions_and_gives_unit_channels():
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, mid_block_add_attention=False,
    ).eval()  # fmt: skip
    images = EmojiDataset(groups=["keycap"]).images()
    with torch.no_grad():
        before = autoencoder(images).sample
        standard_deviation = autoencoder.encode(images).latent_dist.std
        _, std = standardise(autoencoder, [images])
        after = autoencoder(images).sample
        latents = autoencoder.encode(images).latent_dist
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(latents.mean.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(latents.mean.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    assert torch.allclose(latents.std * std[:, None, None], standard_deviation, rtol=1e-3)


def test_words():
    tokenizer = word_tokenizer(["Red apple", "woman: dark skin tone", "clock face three-thirty"], 6)
    ids = tokenizer("WOMAN, dark apple!", padding="max_length").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "woman dark apple"
    assert len(ids) == 6 and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer("three-thirty").input_ids[0] != tokenizer.unk_token_id
    assert unknown_words(tokenizer, "red zebra") == ["zebra"]


def test_noise_rows_are_reproducible():
    one, two = (BatchNoise(0, 0, 2, torch.arange(2), torch.device("cpu")).normal(2) for _ in range(2))
    assert torch.equal(one, two)
