"""The representation autoencoder: every kind of encoder, saved and loaded, and diffusers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderRAE

from ditkit import models
from ditkit.data.config import DataConfig
from ditkit.data.latent_cache import cache_latents
from ditkit.data.latents import LatentSet
from ditkit.data.pictures import open_pictures
from ditkit.models.rae import RepresentationAutoencoder
from ditkit.models.teachers import load_teacher
from ditkit.training.tasks.latents import decode_pictures, encode_pictures
from models.test_teachers import NETWORKS

SIZES = {
    "patch_size": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32,
}  # fmt: skip


def pictures(side: int = 16, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_around_every_kind_of_teacher(kind: str, tmp_path: Path) -> None:
    """Tokens have mean 0 and deviation 1 over the channels, whatever scale the last norm had."""
    torch.manual_seed(0)
    NETWORKS[kind]().save_pretrained(tmp_path / "teacher")
    facts = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "teacher" / "preprocessor_config.json").write_text(json.dumps(facts))
    teacher = load_teacher(str(tmp_path / "teacher"))
    for name, parameter in teacher.network.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model = RepresentationAutoencoder.around(teacher, grid=4, **SIZES).eval()
    tokens = model.tokens(pictures())
    assert tokens.shape == (3, 16, 16)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(3, 16), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.std(-1, correction=0), torch.ones(3, 16), atol=1e-2, rtol=0)
    seen = F.layer_norm(teacher(pictures(), (4, 4)).tokens, (16,))
    if not model.normed:  # no norm of its own: the teacher's tokens, normed
        torch.testing.assert_close(tokens, seen, atol=1e-3, rtol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    loaded = models.load(tmp_path / "saved")
    assert models.autoencoder_class(tmp_path / "saved") is RepresentationAutoencoder
    assert torch.equal(loaded.tokens(pictures()), tokens)
    latents = encode_pictures(loaded, pictures())
    assert torch.equal(decode_pictures(loaded, latents), decode_pictures(model, latents))
    assert decode_pictures(model, latents).shape == (3, 3, 16, 16)


@torch.no_grad()
def test_latents_are_normalised_at_each_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    NETWORKS["vit"]().save_pretrained(tmp_path)
    model = RepresentationAutoencoder.around(load_teacher(str(tmp_path)), grid=4, **SIZES).eval()
    model.latents_mean.normal_()
    model.latents_var.uniform_(0.1, 2)
    tokens = model.tokens(pictures())
    latents = model.encode(pictures()).latent
    maps = tokens.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(latents, (maps - model.latents_mean) / (model.latents_var + 1e-5).sqrt())
    torch.testing.assert_close(model.denormalise(latents), tokens, atol=1e-5, rtol=1e-5)
    assert model.spatial_compression_ratio == 4


@torch.no_grad()
def test_its_latents_are_cached(tmp_path: Path) -> None:
    torch.manual_seed(0)
    NETWORKS["vit"]().save_pretrained(tmp_path / "vit")
    model = RepresentationAutoencoder.around(load_teacher(str(tmp_path / "vit")), grid=4, **SIZES).eval()
    model.save_pretrained(tmp_path / "rae")
    data = DataConfig(groups=["keycap"])
    found = LatentSet(cache_latents(data, tmp_path / "rae", tmp_path / "latents"), "train")
    expected = encode_pictures(model, open_pictures(data, "train").images())
    torch.testing.assert_close(found.latents(), expected, atol=1e-5, rtol=1e-5)
    assert models.autoencoder_class(found.autoencoder) is RepresentationAutoencoder


@torch.no_grad()
def test_of_diffusers() -> None:
    """On the grid of sixteen, where their positions are the authors', both are the same."""
    torch.manual_seed(0)
    mean, std = torch.randn(64, 16, 16), torch.rand(64, 16, 16) + 0.5
    theirs: Any = AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=1, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
        patch_size=2, latents_mean=mean, latents_std=std,
    ).eval()  # fmt: skip
    ours = RepresentationAutoencoder.from_diffusers(theirs)
    images = pictures(224, 1)
    latents = ours.encode(images).latent
    torch.testing.assert_close(latents, theirs.encode((images + 1) / 2).latent, atol=1e-3, rtol=1e-3)
    expected = 2 * theirs.decode(latents).sample - 1
    torch.testing.assert_close(ours.decode(latents).sample, expected, atol=1e-3, rtol=1e-3)


def test_an_encoder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nothing' is no vision transformer"):
        RepresentationAutoencoder(encoder_config={"model_type": "nothing"})
    with pytest.raises(ValueError, match="no vision transformer"):
        RepresentationAutoencoder(encoder_config={"model_type": "bert"})
    models.create("dit", input_size=4, hidden_size=16, depth=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a DiT, which is no autoencoder"):
        models.autoencoder_class(tmp_path)
