"""LaMamba-Diff: paths, windows at odd sizes, options, published costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from architectures import CASES, inputs
from ditkit import models
from ditkit.models.lamamba_diff import (
    LaMambaBlock,
    LaMambaDiff,
    WindowAttention,
    merge,
    scan,
    scan_paths,
)
from ditkit.models.selective_scan import scan_multiply_adds


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (6, 2), (1, 4)])
def test_paths_visit_every_cell_without_jumps(height: int, width: int) -> None:
    for continuous in (True, False):
        paths = scan_paths(height, width, continuous)
        assert all(sorted(path.tolist()) == list(range(height * width)) for path in paths)
    for path in scan_paths(height, width):
        row, column = path // width, path % width
        assert (row.diff().abs() + column.diff().abs() == 1).all()


def test_merging_what_was_scanned_gives_it_four_times() -> None:
    maps, paths = torch.randn(2, 3, 4, 6), scan_paths(4, 6)
    torch.testing.assert_close(merge(scan(maps, paths), paths), 4 * maps.flatten(2))


def block(window: int = 4, shifted: bool = False) -> LaMambaBlock:
    torch.manual_seed(0)
    made = LaMambaBlock(8, None, 2, (window, window), shifted, 4.0, {"state": 1})
    torch.nn.init.normal_(made.attn.relative_position_bias_table)
    return made.eval()


@torch.no_grad()
def test_padding_is_not_seen() -> None:
    """A map of 6 x 5 in windows of 4: a token reads the real tokens of its window, and no others."""
    made, maps = block(), torch.randn(1, 6, 5, 8)
    corner = made._attend(maps)[:, 4:, 4:]
    alone = made.attn(maps[:, 4:, 4:].reshape(1, 1, 2, 8), (2, 1))
    torch.testing.assert_close(corner.reshape(1, 1, 2, 8), alone)


@torch.no_grad()
def test_shifted_windows_do_not_wrap_around() -> None:
    made, maps = block(shifted=True), torch.randn(1, 8, 8, 8)
    changed = maps.clone()
    changed[:, 0, 0] += 1  # after the shift it lies in a window with the opposite corner
    difference = (made._attend(maps) - made._attend(changed)).abs().sum(-1)[0]
    assert (difference[:2, :2] > 0).all() and difference[2:].max() == 0 and difference[:, 2:].max() == 0


def test_a_small_stage_is_one_window() -> None:
    model = CASES["lamamba-diff"].model(window_size=8)
    windows = [stage.blocks[0].attn.window for stage in model.layers]
    assert windows == [(8, 8), (4, 4), (2, 2), (2, 2)]
    assert model(*inputs(model)).sample.isfinite().all()


def test_small_windows_share_the_table() -> None:
    attention = WindowAttention(8, 2, (4, 4))
    torch.nn.init.normal_(attention.relative_position_bias_table)
    large = attention.bias(4, 4).unflatten(2, (4, 4)).unflatten(1, (4, 4))
    assert torch.equal(attention.bias(2, 3), large[:, :2, :3, :2, :3].flatten(3).flatten(1, 2))


@pytest.mark.parametrize(
    "change",
    [{"continuous_scan": False}, {"ssm_conv_bias": True}, {"extra_decoder_blocks": False}, {"patch_size": 2}],
)
def test_options(change: dict[str, Any]) -> None:
    model = CASES["lamamba-diff"].model(**change)
    assert model(*inputs(model)).sample.shape == (2, 8, 8, 8)


def test_multiply_adds_grow_linearly_with_the_pixels() -> None:
    """Those that depend on the pixels; the modulation's do not."""
    counts = []
    for side in (16, 32, 64):
        with torch.device("meta"):
            made = LaMambaBlock(64, None, 4, (8, 8), True, 4.0, {"state": 16})
            maps, condition = torch.empty(1, side, side, 64), torch.empty(1, 64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(maps, condition)
        counts.append(counter.get_total_flops() // 2 - 64 * 9 * 64 + scan_multiply_adds(1, side**2, 512, 16))
    assert counts[2] == 4 * counts[1] == 16 * counts[0]


@pytest.mark.parametrize(("side", "billions"), [(32, 50.47), (64, 201.2)])
def test_published_cost_with_the_scan(side: int, billions: float) -> None:
    """57.6 % and 61.6 % below DiT-XL/2, with a state of 16."""
    with torch.device("meta"):
        model = models.create("lamamba-diff-xl", input_size=side).eval()
        zero = torch.empty(1, dtype=torch.long)
        latent = torch.empty(1, 4, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latent, zero, zero)
    scans = 0
    stages = [*zip(model.layers, (1, 2, 4, 4), strict=True), (model.mid_layer, 4)]
    stages += list(zip(model.layers_up, (4, 4, 2, 1), strict=True))
    for stage, factor in stages:
        channels = 4 * 2 * 320 * factor
        scans += len(stage.blocks) * scan_multiply_adds(1, (side // factor) ** 2, channels, 16)
    assert (counter.get_total_flops() / 2 + scans) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(("width", "millions"), [(96, 59.5), (128, 105.3), (192, 235.8), (256, 418.2)])
def test_smaller_widths(width: int, millions: float) -> None:
    with torch.device("meta"):
        model = models.create(f"lamamba-diff-e{width}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": (1, 1)}, "four numbers"),
        ({"ssm_conv": 4}, "odd"),
        ({"input_size": 6}, "multiples of 4"),
        ({"num_heads": 3}, "num_heads=3"),
    ],
)
def test_wrong_configurations_are_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaMambaDiff(**{**CASES["lamamba-diff"].tiny, **change})
