"""Teachers of every kind: tokens in place, attention among patches, frozen, from a folder."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from ditkit.models.teachers import Teacher, among_patches, load_teacher, resize

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
NETWORKS: dict[str, Any] = {
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SMALL), add_pooling_layer=False),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL)),
    "dinov2-registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)
    ),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SMALL)),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SMALL)),
    "clip-both": lambda: hf.CLIPModel(
        hf.CLIPConfig(
            text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                         "num_attention_heads": 1, "vocab_size": 9},
            vision_config=SMALL,
        )
    ),
    "mae": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SMALL)),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def folder(request, tmp_path):
    torch.manual_seed(0)
    NETWORKS[request.param]().save_pretrained(tmp_path)
    facts = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    return tmp_path


def pictures(rows: int = 4, columns: int = 4, patch: int = 4) -> Tensor:
    return torch.rand(2, 3, rows * patch, columns * patch, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_kind_gives_tokens_and_attention(folder) -> None:
    teacher = load_teacher(str(folder)).train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert (teacher.width, teacher.layers, teacher.patch) == (16, 2, (4, 4))
    for grid in ((4, 4), (2, 6)):
        seen = teacher(pictures(), grid, layers=(1, 2))
        cells = grid[0] * grid[1]
        assert seen.tokens.shape == (2, cells, 16)
        for attention in seen.attention.values():
            assert attention.shape == (2, 2, cells, cells)
            torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, cells))
        assert torch.equal(teacher(pictures(), grid).tokens, seen.tokens)  # the same again, with or without


def test_tokens_lie_where_their_patches_are(folder) -> None:
    """What changes most by a change of one patch is that patch's token."""
    teacher = load_teacher(str(folder))
    plain = pictures()
    for place in (0, 6, 15):
        changed = plain.clone()
        row, column = divmod(place, 4)
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
        moved = (teacher(changed, (4, 4)).tokens - teacher(plain, (4, 4)).tokens).norm(dim=-1)
        assert moved.argmax(dim=1).tolist() == [place, place]


def test_pixels_are_scaled_as_it_was_trained(folder) -> None:
    teacher = load_teacher(str(folder))
    seen: list[Tensor] = []
    network = teacher.network
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    teacher(torch.full((1, 3, 16, 16), -1.0), (4, 4))
    expected = -torch.tensor([0.4, 0.5, 0.6]) / torch.tensor([0.2, 0.3, 0.4])
    torch.testing.assert_close(seen[0][0, :, 0, 0], expected)


def test_attention_among_patches_is_their_own_softmax() -> None:
    logits = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = among_patches(logits.softmax(-1), 1)
    torch.testing.assert_close(found, logits[..., 1:, 1:].softmax(-1))


def test_tokens_of_another_grid() -> None:
    tokens = torch.arange(16.0).view(1, 16, 1)
    assert resize(tokens, (4, 4), (4, 4)) is tokens
    assert resize(tokens, (4, 4), (2, 2)).shape == (1, 4, 1)
    # Bilinear on a plane stays on the plane.
    torch.testing.assert_close(resize(tokens, (4, 4), (2, 2)).mean(), tokens.mean())


def test_what_is_no_teacher_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no repository"):
        load_teacher("nowhere")
    with pytest.raises(ValueError, match="no repository"):
        load_teacher(str(tmp_path / "gone"))
    text = hf.CLIPTextModel(
        hf.CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                          vocab_size=9)
    )  # fmt: skip
    with pytest.raises(ValueError, match="no vision transformer"):
        Teacher(text, [0.5] * 3, [0.5] * 3)
