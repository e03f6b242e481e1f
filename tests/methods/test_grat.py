"""Group attention: its patterns pair by pair, the published counts, and what bad options get."""

from __future__ import annotations

import math

import pytest
import torch
from calls import Call
from hypothesis import given, settings
from hypothesis import strategies as st

from ditkit import registry
from ditkit.methods.grat import GRAT
from ditkit.seams.executors import tile_grid
from ditkit.seams.layout import TokenLayout

CPU = torch.device("cpu")
FLUX_8192 = (1, 512, 512)
HUNYUAN = (32, 48, 80)
TEXTS = [("prefix", 3), ("suffix", 2), ("none", 0), ("cross", 4)]
patterns = st.sampled_from(
    [
        {"pattern": "cross"},
        {"pattern": "cross", "cross": "lines"},
        *({"pattern": "block", "radius": radius} for radius in (0, 1, 2)),
    ]
)


def allowed_by_definition(method: GRAT, layout: TokenLayout) -> torch.Tensor:
    """The mask (L, L), pair by pair from the paper's rule."""
    _, height, width = layout.grid
    span = range(layout.length)[layout.image_span]
    size = method.group_of(layout.grid)
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    for i in span:
        for j in span:
            places = []
            for token in (i - span.start, j - span.start):
                f, y, x = token // (height * width), token // width % height, token % width
                places.append((f // size[0], y // size[1], x // size[2]))
            apart = [abs(a - b) for a, b in zip(*places, strict=True)]
            if method.pattern == "block":
                mask[i, j] = max(apart) <= method.radius
            elif layout.grid[0] == 1:
                mask[i, j] = apart[1] == 0 or apart[2] == 0
            else:
                equal = sum(step == 0 for step in apart)
                mask[i, j] = equal >= (1 if method.cross == "planes" else 2)
    return mask


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    group=st.tuples(*[st.integers(1, 3)] * 3),
    text=st.sampled_from(TEXTS),
    options=patterns,
)
def test_mask_and_counts_are_the_definition(grid, group, text, options):
    layout = TokenLayout(grid, text[1], text[0])
    method = GRAT(group=group, **options)
    expected = allowed_by_definition(method, layout)
    plan = method.static_mask(layout, CPU)
    assert torch.equal(plan.mask[0, 0], expected)
    length = layout.joint_text_length
    assert method.density(grid, length) == pytest.approx(plan.share)
    assert plan.share == pytest.approx(expected.double().mean().item())
    image = expected[layout.image_span].double().mean().item()
    assert method.density(grid, length, queries="image") == pytest.approx(image)
    assert method.flops(grid, length, 3, 8) == 4 * 3 * 8 * int(expected.sum())


def test_published_counts_of_pictures():
    """FLUX at 8192 x 8192, 512 text tokens."""
    cross, block = GRAT(), GRAT(pattern="block")
    assert f"{1 - cross.density(FLUX_8192, 512, queries='image'):.2%}" == "93.66%"  # published 93.67
    assert f"{1 - cross.density(FLUX_8192, 512):.2%}" == "93.48%"  # text queries read everything
    # Published 99.03: neither count gives it.
    assert f"{1 - block.density(FLUX_8192):.2%}" == "99.16%"
    assert f"{1 - block.density(FLUX_8192, 512, queries='image'):.2%}" == "98.96%"
    assert block.density(FLUX_8192, clip=False) == 9 * 256 / 512**2
    assert block.density(FLUX_8192) * 1024 == pytest.approx(8.63, abs=0.005)


def test_published_counts_of_video():
    """HunyuanVideo, 122,880 tokens in 480 groups."""
    cross, block = GRAT(), GRAT(pattern="block")
    assert math.prod(tile_grid((8, 6, 10), (1, 1, 1)).counts) == 480
    assert block.density(HUNYUAN, clip=False) == 27 / 480  # published 94.3 % sparse
    assert f"{1 - block.density(HUNYUAN):.1%}" == "95.7%"
    assert cross.density(HUNYUAN) == pytest.approx(1 - 7 / 8 * 5 / 6 * 9 / 10)  # 34.4 %; published 39.2
    assert GRAT(cross="lines").density(HUNYUAN) == (8 + 6 + 10 - 2) / 480


def test_groups_by_default():
    assert GRAT().group_of((1, 64, 64)) == (1, 16, 16)
    assert GRAT().group_of((5, 64, 64)) == (4, 8, 8)
    assert GRAT(group="8x16") == GRAT(group=(8, 16)) == GRAT(group=(1, 8, 16))
    assert registry.parse_method("grat:pattern=block,group=2x8x8,radius=2") == GRAT(
        pattern="block", group=(2, 8, 8), radius=2
    )


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("options", [{"group": (1, 9, 9)}, {"pattern": "block", "group": "2x2", "radius": 4}])
def test_one_group_or_all_of_them_is_full_attention(options, text):
    torch.manual_seed(0)
    layout = TokenLayout((1, 7, 9), text[1], text[0])
    q, k, v = (torch.randn(2, 2, layout.length, 8) for _ in range(3))
    strategy, call = GRAT(**options).strategy(), Call()
    found = strategy.attend(q, k, v, None, None, call, strategy.plan(layout, 2, CPU))
    assert torch.equal(found, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert call.shares == [1.0]
    assert "nothing is saved" in strategy.notes()[0]


def test_text_queries_do_not_see_the_groups():
    torch.manual_seed(0)
    layout = TokenLayout((1, 8, 8), 5, "prefix")
    q, k, v = (torch.randn(1, 2, layout.length, 8) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for group in ("2x2", "4x4"):
        strategy = GRAT(group=group, executor="gather").strategy()
        found = strategy.attend(q, k, v, None, None, Call(), strategy.plan(layout, 2, CPU))
        torch.testing.assert_close(found[:, :, :5], dense[:, :, :5], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(found[:, :, 5:], dense[:, :, 5:], atol=1e-3)


def test_report_says_how_it_ran():
    strategy = GRAT(pattern="block", group="4x8").strategy()
    strategy.plan(TokenLayout((1, 16, 16), 4, "prefix"), 2, CPU)
    strategy.plan(TokenLayout((1, 64, 64)), 2, CPU)
    few, many = strategy.notes()
    assert "too few" in few and "slower than plain attention" in few
    assert "runs gather" in many and many.startswith("GRAT-B on 64 x 64 tokens: 6.")


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "disc"},
        {"group": "8"},
        {"group": (0, 8, 8)},
        {"group": (8, 8, 8, 8)},
        {"radius": -1},
        {"radius": 1.5},
        {"cross": "points"},
        {"executor": "magic"},
    ],
)
def test_bad_option_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GRAT(**options)
