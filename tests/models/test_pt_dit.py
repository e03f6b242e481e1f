"""PT-DiT: windows, proxies, grids of pictures and clips, text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from architectures import CASES, inputs
from ditkit import models
from ditkit.models.pt_dit import (
    PTDiT,
    pool_proxies,
    relative_attention_cost,
)
from ditkit.models.windows import from_windows, shift_mask, to_windows

TEXT: dict[str, Any] = dict(
    hidden_size=32, depth=2, num_heads=2, input_size=8, compress_ratios=(2, 2, 2), caption_channels=6
)


def drawn(**config: Any) -> Any:
    torch.manual_seed(0)
    model = PTDiT(**{**TEXT, **config}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def clip(batch: int = 2, frames: int = 4, side: int = 8) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 4, frames, side, side), torch.tensor([3, 700][:batch]), torch.randn(batch, 5, 6)


@pytest.mark.parametrize("window", [(1, 2, 3), (2, 4, 2), (4, 4, 6)])
def test_windows_and_back(window: tuple[int, int, int]) -> None:
    tokens = torch.randn(2, 4, 4, 6, 3)
    windows = to_windows(tokens, window)
    assert torch.equal(from_windows(windows, window, (4, 4, 6)), tokens)
    a, b, c = window
    assert torch.equal(windows[:, 0], tokens[:, :a, :b, :c].reshape(2, -1, 3))


def test_shift_mask_separates_what_was_brought_round() -> None:
    """Four tokens in windows of two, shifted by one: 1 2 | 3 0, where 3 and 0 are strangers."""
    mask = shift_mask((1, 1, 4), (1, 1, 2), (0, 0, 1))
    assert mask.tolist() == [[[0, 0], [0, 0]], [[0, -1], [-1, 0]]]
    assert not shift_mask((2, 3, 3), (1, 1, 1), (0, 0, 0)).any()


class TestProxies:
    windows = torch.arange(16.0).reshape(1, 1, 16, 1)  # one window of 4 x 4

    def test_one_for_each_window(self) -> None:
        assert pool_proxies(self.windows, (1, 4, 4), (1, 4, 4), "comb").flatten().tolist() == [7.5]

    def test_comb_and_cell(self) -> None:
        comb = pool_proxies(self.windows, (1, 4, 4), (1, 2, 2), "comb").flatten()
        cell = pool_proxies(self.windows, (1, 4, 4), (1, 2, 2), "cell").flatten()
        assert comb.tolist() == [5, 6, 9, 10]  # 0 2 8 10; 1 3 9 11; ...
        assert cell.tolist() == [2.5, 4.5, 10.5, 12.5]  # 0 1 4 5; 2 3 6 7; ...

    def test_both_run(self) -> None:
        latent, times, text = clip()
        both = [
            drawn(compress_ratios=(2, 4, 4), proxy_compress_ratios=(2, 2, 2), proxy=form)(
                latent, times, encoder_hidden_states=text
            ).sample
            for form in ("comb", "cell")
        ]
        assert both[0].shape == (2, 8, 4, 8, 8) and not torch.equal(*both)


def test_cost_formula_against_the_paper() -> None:
    """Equation 4 at 256, 512, 1024, 2048 px, grids of 16 to 128; the paper prints 2.3 % for the last."""
    costs = [relative_attention_cost(r * r, (8 * r) ** 2) for r in (2, 4, 8, 16)]
    assert [round(100 * cost, 1) for cost in costs] == [34.4, 9.8, 4.7, 3.5]


@pytest.mark.parametrize(("side", "window"), [(16, 2), (32, 4), (64, 4)])
def test_cost_formula_against_the_counter(side: int, window: int) -> None:
    """Attention is the only batched product of a block without text."""
    with torch.device("meta"):
        model = models.create(
            "pt-dit-s-class", depth=1, compress_ratios=(1, window, window), input_size=2 * side
        )
        latent, zero = torch.empty(1, 4, 2 * side, 2 * side), torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latent, zero, zero)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    full = 2 * 2 * (side**2) ** 2 * 288
    assert counted / full == pytest.approx(relative_attention_cost(window**2, side**2), rel=1e-6)


@torch.no_grad()
def test_clips_and_pictures_are_one_network() -> None:
    model = drawn(compress_ratios=(1, 2, 2))
    latent, times, text = clip(frames=1)
    as_clip = model(latent, times, encoder_hidden_states=text).sample
    as_picture = model(latent[:, :, 0], times, encoder_hidden_states=text[:, None]).sample
    assert torch.equal(as_clip[:, :, 0], as_picture)
    views = model(torch.randn(1, 4, 3, 4, 12), times[:1], encoder_hidden_states=text[:1]).sample
    assert views.shape == (1, 8, 3, 4, 12)


@torch.no_grad()
def test_times_and_masked_text_belong_to_their_sample() -> None:
    model = drawn()
    latent, times, text = clip()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    options = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    together = model(latent, times, **options).sample
    for i, length in enumerate((5, 2)):
        alone = model(latent[i : i + 1], times[i : i + 1], encoder_hidden_states=text[i : i + 1, :length])
        torch.testing.assert_close(together[i : i + 1], alone.sample, atol=1e-5, rtol=1e-5)


def test_starts_without_proxies_and_shifts() -> None:
    block = PTDiT(**TEXT).transformer_blocks[0]
    assert not any(p.any() for m in (block.linear_1_visual, block.linear_2) for p in m.parameters())


def test_without_shifted_windows_and_routed() -> None:
    latent, times, text = clip()
    outputs = [
        drawn(**config)(latent, times, encoder_hidden_states=text).sample
        for config in ({}, {"shift_window": False}, {"routing": {"sharing_ratio": 0.5}})
    ]
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:])


def test_wrong_calls_are_explained() -> None:
    model, labelled = drawn(), CASES["pt-dit"].model()
    latent, times, text = clip()
    with pytest.raises(ValueError, match="the model reads text"):
        model(latent, times)
    with pytest.raises(ValueError, match="class_labels was given"):
        model(latent, times, torch.zeros(2, dtype=torch.long), encoder_hidden_states=text)
    with pytest.raises(ValueError, match="encoder_hidden_states was given"):
        labelled(*inputs(labelled), encoder_hidden_states=text)
    with pytest.raises(ValueError, match="windows of"):
        model(latent[:, :, :3], times, encoder_hidden_states=text)
    for change, message in (
        ({"hidden_size": 24}, "multiple of 16"),
        ({"proxy_compress_ratios": (2, 3, 2)}, "must divide"),
        ({"proxy": "first"}, "neither"),
    ):
        with pytest.raises(ValueError, match=message):
            PTDiT(**{**TEXT, **change})
