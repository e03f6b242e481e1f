"""DiCo: what it has beyond the shared tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import CASES, inputs
from ditkit.models.dico import DiCo, text_depthwise


def test_starts_with_closed_gates() -> None:
    model = DiCo(hidden_size=8, depth=(1, 1, 1, 1, 1), num_classes=5).eval()
    batch = inputs(model)
    assert model(*batch).sample.abs().max() == 0
    block, maps = model.latent[0], torch.randn(2, 32, 4, 4)
    assert torch.equal(block(maps, torch.randn(2, 32)), maps)


def test_channel_attention_can_be_left_out() -> None:
    model = CASES["dico"].model(channel_attention=False)
    assert not [name for name in model.state_dict() if ".ca." in name]
    assert model(*inputs(model)).sample.isfinite().all()


def test_weights_lie_in_memory_as_the_maps_do(tmp_path: Path) -> None:
    """A convolution would lay them out anew in every call, a tenth of the time of DiCo-B."""
    model = CASES["dico"].model()
    model.save_pretrained(tmp_path)
    for found in (
        model,
        DiCo.from_pretrained(tmp_path),
        DiCo.from_pretrained(tmp_path, output_loading_info=True)[0],
    ):
        weight = found.down1_2.body[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize("form", ["depthwise", "cross-attention"])
class TestText:
    def model(self, form: Any) -> Any:
        return CASES["dico"].model(text_width=6, text=form, num_classes=0)

    def test_text_changes_the_prediction_and_learns(self, form: str) -> None:
        model = self.model(form).train()
        latent, times, _ = inputs(model)
        outputs = [model(latent, times, encoder_hidden_states=torch.randn(2, 7, 6)).sample for _ in range(2)]
        assert not torch.equal(*outputs)
        outputs[0].square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]

    def test_starts_without_text(self, form: str) -> None:
        block = DiCo(hidden_size=8, depth=(1,) * 5, text_width=6, text=form).latent[0]  # pyright: ignore
        maps = torch.randn(2, 32, 4, 4)
        assert torch.equal(block.text(maps, torch.randn(2, 7, 6)), maps)

    def test_missing_text_is_explained(self, form: str) -> None:
        model = self.model(form)
        latent, times, _ = inputs(model)
        with pytest.raises(ValueError, match="encoder_hidden_states is missing"):
            model(latent, times)
        with pytest.raises(ValueError, match="was given"):
            plain = CASES["dico"].model()
            plain(latent, times, encoder_hidden_states=torch.randn(2, 7, 6))


def test_depthwise_text_kernels() -> None:
    """One token is a box filter of its own value; a token more than the kernel's places is refused."""
    maps, text = torch.randn(2, 3, 5, 7), torch.randn(2, 1, 3)
    expected = torch.nn.functional.avg_pool2d(maps, 3, 1, 1) * 9 * text[:, 0, :, None, None]
    torch.testing.assert_close(text_depthwise(maps, text, 3), expected)
    with pytest.raises(ValueError, match="10 text tokens"):
        text_depthwise(maps, torch.randn(2, 10, 3), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": 7}, "odd"), ({"depth": (1, 1)}, "five numbers"), ({"text": "words"}, "neither")],
)
def test_wrong_configurations_are_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiCo(**{"hidden_size": 8, "depth": (1,) * 5, **change})
