"""Executors against the masked dense reference: every place of the text, ragged lists, padded prompts."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditkit.seams import executors
from ditkit.seams.executors import BlockLists, tile_grid
from ditkit.seams.layout import TokenLayout

TOLERANCE = 1e-5
# Text that fills whole tiles of 16 takes a way of its own.
TEXTS = [("prefix", 37), ("suffix", 37), ("none", 0), ("cross", 9), ("prefix", 32), ("suffix", 48)]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="compiled flex attention needs a C++ compiler"
)


def random_qkv(layout: TokenLayout, batch: int = 2, heads: int = 3, channels: int = 16) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, heads, layout.length, channels) for _ in range(3))


def random_lists(shape: tuple[int, int], tiles: int, *, ragged: bool) -> BlockLists:
    if ragged:
        allowed = torch.rand(*shape, tiles, tiles) < 0.4
        allowed[..., 0, :] = False  # a query tile with an empty list
        return BlockLists.from_map(allowed)
    return BlockLists(torch.rand(*shape, tiles, tiles).argsort(-1)[..., : max(1, tiles // 3)])


def padded_text(layout: TokenLayout, kind: str) -> Tensor | None:
    """Validity of keys with another number of valid text tokens for each sample."""
    if kind == "none":
        return None
    keys = torch.ones(2, layout.length, dtype=torch.bool)
    keys[0, layout.text_span][20:] = False
    keys[1, layout.text_span][5:] = False
    return keys if kind == "bool" else torch.zeros(2, layout.length).masked_fill(~keys, -1e4)


def reference(q, k, v, lists, tiling, layout, keys=None, scale=None) -> Tensor:
    mask = executors.dense_mask(lists, tiling, layout)
    mask = executors.combine(mask, None if keys is None else keys[:, None, None])
    return executors.masked_dense(q, k, v, mask, scale)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("keys", ["none", "bool", "float"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize(
    "grid, tile", [((2, 8, 12), (1, 4, 4)), ((2, 9, 7), (1, 4, 4)), ((3, 5, 4), (2, 2, 3))]
)
@pytest.mark.parametrize("text", TEXTS)
def test_gather_equals_masked_dense(text, grid, tile, shape, ragged, keys):
    layout = TokenLayout(grid, text[1], text[0])
    tiling = tile_grid(grid, tile)
    lists = random_lists(shape, len(tiling.order), ragged=ragged)
    q, k, v = random_qkv(layout)
    valid = padded_text(layout, keys)
    found = executors.gather_blocks(q, k, v, lists, tiling, layout, keys=valid, scale=0.3)
    torch.testing.assert_close(
        found, reference(q, k, v, lists, tiling, layout, valid, 0.3), atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("text", TEXTS)
def test_gradients_through_gather(text):
    layout = TokenLayout((1, 9, 8), text[1], text[0])
    tiling = tile_grid(layout.grid, (1, 4, 4))
    lists = random_lists((2, 3), len(tiling.order), ragged=True)
    q, k, v = random_qkv(layout)
    weight = torch.randn_like(q)
    grads = []
    for run in (executors.gather_blocks, reference):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        (run(*inputs, lists, tiling, layout) * weight).sum().backward()
        grads.append([x.grad for x in inputs])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_gather_in_bfloat16_is_as_exact_as_dense():
    """Its error against float64 is at most half again that of a dense pass in bfloat16."""
    layout = TokenLayout((1, 16, 16), 20, "prefix")
    tiling = tile_grid(layout.grid, (1, 4, 8))
    lists = random_lists((1, 3), len(tiling.order), ragged=False)
    q, k, v = (x.bfloat16() for x in random_qkv(layout, channels=32))
    exact = reference(q.double(), k.double(), v.double(), lists, tiling, layout)
    dense = reference(q, k, v, lists, tiling, layout).double() - exact
    found = executors.gather_blocks(q, k, v, lists, tiling, layout).double() - exact
    assert found.square().mean().sqrt() <= 1.5 * dense.square().mean().sqrt()
    assert found.mean().abs() <= 0.25 * found.square().mean().sqrt()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS[:3])
def test_flex_blocks_equal_masked_dense(text):
    layout = TokenLayout((2, 8, 32), text[1], text[0])
    tiling = tile_grid(layout.grid, (1, 8, 8))
    q, k, v = random_qkv(layout)
    for ragged in (False, True):
        lists = random_lists((1, 1), len(tiling.order), ragged=ragged)
        found = executors.flex_blocks(
            q, k, v, executors.plan_blocks(lists, tiling, layout), layout, scale=0.3
        )
        expected = reference(q, k, v, lists, tiling, layout, None, 0.3)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS[:3])
def test_flex_table_equals_masked_dense(text):
    layout = TokenLayout((1, 16, 16), text[1], text[0])
    N, T, E = layout.image_length, layout.joint_text_length, 5
    tiling = tile_grid(layout.grid, (1, 8, 8))
    allowed = torch.rand(N, N + E) < 0.3
    allowed[:, :64] = True  # whole blocks, partial ones and empty ones
    allowed[:64, 128:] = False
    q, k, v = random_qkv(layout)
    extra = tuple(torch.randn(2, 3, E, 16) for _ in range(2))
    mask = torch.ones(layout.length, layout.length + E, dtype=torch.bool)
    mask[layout.image_span, layout.image_span] = allowed[:, :N]
    mask[layout.image_span, layout.length :] = allowed[:, N:]
    mask[layout.text_span, layout.length :] = False
    expected = executors.masked_dense(
        q, *(torch.cat([x, e], 2) for x, e in zip((k, v), extra, strict=True)), mask
    )
    plan = executors.plan_table(allowed, tiling, layout)
    found = executors.flex_table(q, k, v, plan, layout, extra=extra)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert layout.length - N == T


def test_flex_refuses_tiles_that_stick_out():
    layout = TokenLayout((1, 9, 8))
    tiling = tile_grid(layout.grid, (1, 4, 4))
    lists = random_lists((1, 1), len(tiling.order), ragged=False)
    with pytest.raises(ValueError, match="whole tiles"):
        executors.plan_blocks(lists, tiling, layout)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 9)] * 3),
    tile=st.tuples(*[st.integers(1, 5)] * 3),
)
def test_tiling_is_a_partition(grid, tile):
    tiling = tile_grid(grid, tile)
    n, t = tiling.order.shape
    assert (n, t) == (math.prod(tiling.counts), math.prod(tile))
    tokens = torch.arange(math.prod(grid))
    assert torch.equal(tiling.order.reshape(-1)[tiling.inverse], tokens)
    x = torch.randn(2, len(tokens), 3)
    assert torch.equal(tiling.join(tiling.split(x)), x)
    valid = torch.ones(n, t, dtype=torch.bool) if tiling.valid is None else tiling.valid
    assert torch.equal(tiling.order[valid].sort().values, tokens)
    # All tokens of a tile lie in one box.
    for line, good in zip(tiling.order, valid, strict=True):
        line = line[good]
        places = torch.stack([line // (grid[1] * grid[2]), line // grid[2] % grid[1], line % grid[2]])
        assert (
            (places // torch.tensor(tile)[:, None]) == (places // torch.tensor(tile)[:, None])[:, :1]
        ).all()


def test_tile_order_is_rows_of_tiles_of_rows():
    tiling = tile_grid((1, 4, 4), (1, 2, 2))
    assert tiling.order.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("tile", [(1, 0, 4), (1, 4), (1, 2.0, 2)])
def test_bad_tile_is_an_error(tile):
    with pytest.raises(ValueError, match="tile must be"):
        tile_grid((1, 8, 8), tile)


def test_density_counts_the_pairs_of_the_mask():
    layout = TokenLayout((2, 9, 7), 11, "suffix")
    tiling = tile_grid(layout.grid, (1, 4, 4))
    lists = random_lists((2, 3), len(tiling.order), ragged=True)
    mask = executors.dense_mask(lists, tiling, layout)
    assert executors.density(lists, tiling, layout) == pytest.approx(mask.double().mean().item(), abs=1e-12)


def test_lists_and_maps_are_the_same():
    allowed = torch.rand(2, 3, 7, 7) < 0.3
    lists = BlockLists.from_map(allowed)
    assert torch.equal(lists.allowed(7), allowed)
    assert torch.equal(lists.count, allowed.sum(-1))
    with pytest.raises(ValueError, match="not of a kind"):
        BlockLists(lists.index, lists.count[:, :2])


def test_log_sum_exp_and_share_of_mass():
    q, k, v = (torch.randn(2, 3, 40, 16, requires_grad=True) for _ in range(3))
    mask = torch.rand(1, 1, 40, 40) < 0.5
    mask |= torch.eye(40, dtype=torch.bool)
    scores = q @ k.transpose(-1, -2) / 4
    out, lse = executors.attention_with_lse(q, k, v, mask)
    torch.testing.assert_close(lse, scores.masked_fill(~mask, -math.inf).logsumexp(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, executors.masked_dense(q, k, v, mask), atol=1e-5, rtol=1e-5)
    full = executors.attention_with_lse(q, k, v, scale=0.25)[1]
    share = scores.softmax(-1).masked_fill(~mask, 0).sum(-1)
    torch.testing.assert_close((lse - full).exp(), share, atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize("keys", ["none", "bool", "float"])
@pytest.mark.parametrize("grid, tile", [((2, 8, 12), (1, 4, 4)), ((2, 9, 7), (1, 4, 4))])
@pytest.mark.parametrize("text", TEXTS)
def test_log_sum_exp_of_the_executors(text, grid, tile, keys):
    """Lists (also empty ones) and windows: the dense pass under the same mask gives the same two."""
    layout = TokenLayout(grid, text[1], text[0])
    tiling = tile_grid(grid, tile)
    valid = padded_text(layout, keys)
    mask = None if valid is None else valid[:, None, None]
    windows = executors.neighbourhoods(grid, tile, (1, 2, 1), lambda f, y, x: (y.abs() <= 2) & (x.abs() <= 1))
    lists = random_lists((2, 3), len(tiling.order), ragged=True)
    q, k, v = random_qkv(layout)
    for plan in (
        executors.BlockPlan(lists, tiling, layout, "gather"),
        executors.WindowPlan(windows, layout, "gather"),
    ):
        out, lse = plan.attend_with_lse(q, k, v, mask, 0.3)
        expected = executors.attention_with_lse(q, k, v, executors.combine(plan.mask, mask), 0.3)
        torch.testing.assert_close(out, expected[0], atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(lse, expected[1], atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(out, plan.attend(q, k, v, mask, 0.3), atol=TOLERANCE, rtol=TOLERANCE)
        assert plan.share == pytest.approx(plan.mask.double().mean().item())
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = plan.attend_with_lse(*inputs, mask, 0.3)
        torch.testing.assert_close(out, expected[0], atol=TOLERANCE, rtol=TOLERANCE)
        out.sum().backward()
        assert all(x.grad.isfinite().all() for x in inputs)


def test_a_query_without_keys_gets_zeros_and_minus_infinity():
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    allowed = torch.rand(6, 6) < 0.5
    allowed[2] = False
    for mask in (allowed, torch.zeros(6, 6).masked_fill(~allowed, float("-inf"))):
        for run in (executors.attention_with_lse, executors.scores.formula_with_lse):
            out, lse = run(q, k, v, mask)
            assert torch.isneginf(lse[..., 2]).all()
            if run is executors.attention_with_lse:
                assert (out[..., 2, :] == 0).all() and out.isfinite().all()


def test_log_sum_exp_of_tensors_that_are_not_packed():
    q, k, v = (torch.randn(1, 2, 8, 20).transpose(-1, -2) for _ in range(3))
    mask = (torch.rand(20, 20) < 0.7).T
    for bias in (None, mask, torch.randn(20, 20).T):
        packed = None if bias is None else bias.contiguous()
        expected = executors.scores.formula_with_lse(*(x.contiguous() for x in (q, k, v)), packed)
        found = executors.attention_with_lse(q, k, v, bias)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_log_sum_exp_in_parts(monkeypatch):
    """Few queries at a time give what all at once give."""
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    mask = torch.rand(20, 20) < 0.7
    whole = executors.scores.formula_with_lse(q, k, v, mask)
    monkeypatch.setattr(executors.scores, "SCORE_BYTES", 4 * 2 * 20 * 3)
    for one, other in zip(executors.scores.formula_with_lse(q, k, v, mask), whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("text, expected", [("4x8x8", (4, 8, 8)), ("8x16", (1, 8, 16))])
def test_sides(text, expected):
    assert executors.sides(text) == expected


@pytest.mark.parametrize("text", ["8", "8x", "axb", "1x2x3x4", ""])
def test_bad_sides_are_an_error(text):
    with pytest.raises(ValueError, match="expected sizes like"):
        executors.sides(text)


def test_log_sum_exp_without_the_kernel():
    """The formula for devices without the CPU kernel gives the same."""
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    mask = torch.rand(20, 20) < 0.7
    mask |= torch.eye(20, dtype=torch.bool)
    for one, other in zip(
        executors.attention_with_lse(q, k, v, mask),
        executors.scores.formula_with_lse(q, k, v, mask),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_pooled_scores_are_scores_of_constant_tiles():
    tiling = tile_grid((2, 9, 7), (1, 4, 4))
    tile_of = tiling.inverse // tiling.order.shape[1]
    means = [torch.randn(1, 2, len(tiling.order), 16) for _ in range(2)]
    q, k = (mean[:, :, tile_of] for mean in means)
    expected = means[0] @ means[1].transpose(-1, -2) / 4
    torch.testing.assert_close(executors.pooled_scores(q, k, tiling), expected, atol=1e-5, rtol=1e-5)
    noise = torch.randn_like(q)
    counts = torch.zeros(len(tiling.order)).index_add_(0, tile_of, torch.ones(len(tile_of)))
    mean = torch.zeros(1, 2, len(tiling.order), 16).index_add_(2, tile_of, noise) / counts[:, None]
    torch.testing.assert_close(executors.pooled_tiles(noise, tiling), mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "length, share, device, whole, name, word",
    [
        (512, 0.1, "cpu", True, "dense", "too few"),
        (8192, 0.7, "cpu", True, "dense", "too many"),
        (8192, 0.1, "cpu", True, "gather", "fastest on cpu"),
        (8192, 0.1, "cuda", True, "flex", "CUDA"),
        (8192, 0.1, "cuda", False, "gather", "divide the grid"),
        (8192, 0.1, "mps", True, "gather", "mps"),
    ],
)
def test_choice(length, share, device, whole, name, word):
    choice = executors.choose(length, share, device=torch.device(device), whole=whole)
    assert choice.name == name
    assert word in choice.reason


@pytest.mark.parametrize("executor", ["auto", "dense", "gather"])
@pytest.mark.parametrize("kind", ["none", "keys", "rows"])
def test_block_plan(executor, kind):
    """One plan, every executor: also under a mask of padded keys, and one with a row for each query."""
    layout = TokenLayout((1, 40, 32), 37, "prefix")
    tiling = tile_grid(layout.grid, (1, 8, 16))
    lists = random_lists((1, 3), len(tiling.order), ragged=True)
    q, k, v = random_qkv(layout)
    mask = {
        "none": lambda: None,
        "keys": lambda: padded_text(layout, "bool")[:, None, None],
        "rows": lambda: torch.rand(1, 1, layout.length, layout.length) < 0.9,
    }[kind]()
    plan = executors.BlockPlan(lists, tiling, layout, executor)
    choice = plan.choose(q, k, v, mask)
    assert choice.name == ("dense" if kind == "rows" or executor == "dense" else "gather")
    expected = executors.masked_dense(q, k, v, executors.combine(plan.mask, mask))
    torch.testing.assert_close(plan.attend(q, k, v, mask), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert plan.share == pytest.approx(plan.mask.double().mean().item())


def test_flex_hands_over_to_gather_for_gradients():
    layout = TokenLayout((1, 16, 16))
    tiling = tile_grid(layout.grid, (1, 8, 16))
    plan = executors.BlockPlan(random_lists((1, 1), 2, ragged=False), tiling, layout, "flex")
    q, k, v = random_qkv(layout)
    assert plan.choose(q, k, v).name == "flex"
    assert plan.choose(q, k.requires_grad_(), v).name == "gather"
    with torch.no_grad():
        assert plan.choose(q, k, v).name == "flex"
    plan.attend(q, k, v).sum().backward()
    assert k.grad is not None
