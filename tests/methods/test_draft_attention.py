"""DraftAttention: map, threshold, published counts, what stays dense, and what bad options get."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from calls import Call
from torch import Tensor

import ditkit
from ditkit import registry
from ditkit.methods.draft_attention import DraftAttention
from ditkit.seams import executors
from ditkit.seams.layout import TokenLayout
from ditkit.seams.steps import Step
from loops import Pipe
from tiny_models import TINY

CPU = torch.device("cpu")
# The resolutions of the paper in tokens and their tiles of 8 x 16.
RESOLUTIONS = {(33, 48, 80): 990, (21, 32, 48): 252, (21, 48, 80): 630}


def run(method: DraftAttention, layout: TokenLayout, qkv: list[Tensor], layer: int = 9) -> Tensor:
    strategy = method.strategy()
    plan = strategy.plan(layout, qkv[0].shape[1], CPU)
    q, k, v = qkv
    return strategy.attend(q, k, v, None, None, Call(layer), plan)


def step(index: int, num_steps: int | None = 50, timestep: float = 500.0) -> Step:
    return Step(index, num_steps, timestep, "0", 0)


def test_published_tiles():
    for grid, tiles in RESOLUTIONS.items():
        assert DraftAttention().draft_tokens(grid) == tiles
        assert tiles * 128 == math.prod(grid)


@pytest.mark.parametrize("sparsity", [0.0, 0.55, 0.6, 0.75, 0.8, 0.9])
def test_published_count_of_kept_pairs(sparsity: float):
    method = DraftAttention(sparsity=sparsity, pool=(2, 2), empty_rows="authors")
    kept = 1 - sparsity
    for grid, tiles in {**RESOLUTIONS, (2, 6, 8): 24}.items():
        n = tiles**2
        dropped = int((1 - kept) * n)
        counting = DraftAttention(sparsity=sparsity) if tiles > 24 else method
        assert counting.kept(grid) == (n - dropped + 1 if dropped else n)
        assert counting.density(grid) == counting.kept(grid) / n
    # And so many are chosen.
    torch.manual_seed(0)
    draft = torch.randn(2, 3, 24, 24).softmax(-1)
    assert (method.select(draft).sum((-2, -1)) == method.kept((2, 6, 8))).all()


def test_density_and_flops_with_text():
    method, grid = DraftAttention(sparsity=0.9), (33, 48, 80)
    image, text = math.prod(grid), 256
    pairs = method.kept(grid) * 128**2 + 2 * image * text + text**2
    assert method.density(grid, text) == pytest.approx(pairs / (image + text) ** 2)
    assert method.flops(grid, text, 24, 128) == 24 * 128 * (4 * pairs + 2 * 990**2)
    # The draft costs next to nothing.
    assert 2 * 990**2 / (4 * (image + text) ** 2) < 1e-4


def test_threshold_is_of_the_head_not_of_the_row():
    draft = torch.tensor([[[[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.34, 0.33, 0.33]]]])
    method = DraftAttention(sparsity=0.7, empty_rows="authors")  # 6 of 9 set the threshold: 0.34
    expected = torch.tensor([[True, False, False], [True, True, False], [True, False, False]])
    assert torch.equal(method.select(draft)[0, 0], expected)
    high = DraftAttention(sparsity=0.9, empty_rows="authors").select(draft)[0, 0]  # 8: threshold 0.4
    assert high.any(-1).tolist() == [True, True, False]
    mended = DraftAttention(sparsity=0.9, empty_rows="best").select(draft)[0, 0]
    assert torch.equal(mended[:2], high[:2])
    assert mended[2].tolist() == [True, False, True]  # its best tile and itself
    assert not DraftAttention(sparsity=1.0, empty_rows="authors").select(draft).any()
    assert DraftAttention(sparsity=0.05).select(draft).all()  # int(0.05 * 9) = 0


@pytest.mark.parametrize("text", [("suffix", 7), ("none", 0)])
def test_sparsity_0_is_dense(text):
    torch.manual_seed(0)
    layout = TokenLayout((2, 5, 7), text[1], text[0])
    qkv = [torch.randn(1, 2, layout.length, 8) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*qkv)
    assert torch.equal(run(DraftAttention(sparsity=0.0, pool="2x3"), layout, qkv), expected)
    # So small that nothing is dropped: through the blocks.
    found = run(DraftAttention(sparsity=1e-9, pool="2x3", executor="gather"), layout, qkv)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("grid", [(2, 4, 6), (3, 5, 7)])
def test_draft_of_constant_tiles_is_exact(grid, pooling):
    torch.manual_seed(0)
    tiling = executors.tile_grid(grid, (1, 2, 3))
    of = tiling.inverse // tiling.order.shape[1]
    q, k = (torch.randn(2, 2, len(tiling.order), 8) for _ in range(2))
    expected = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    found = DraftAttention(pooling=pooling).draft_map(q[:, :, of], k[:, :, of], tiling)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_filling_of_a_ragged_tile_is_not_averaged():
    torch.manual_seed(0)
    tiling = executors.tile_grid((1, 3, 3), (1, 2, 2))
    q = torch.randn(1, 1, 9, 4)
    pooled = F.avg_pool2d(q[0, 0].view(3, 3, 4).permute(2, 0, 1)[None], 2, ceil_mode=True)
    torch.testing.assert_close(executors.pooled_tiles(q, tiling)[0, 0], pooled[0].flatten(1).T)


def test_each_sample_has_its_own_map():
    torch.manual_seed(0)
    layout = TokenLayout((1, 8, 8), 3, "suffix")
    qkv = [torch.randn(2, 2, layout.length, 8) for _ in range(3)]
    method = DraftAttention(sparsity=0.7, pool="2x2", executor="gather")
    together = run(method, layout, qkv)
    for row in (0, 1):
        alone = run(method, layout, [x[row : row + 1] for x in qkv])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-6, rtol=1e-6)


def test_steps_that_stay_dense():
    share = DraftAttention()
    assert [share.is_dense(step(i)) for i in (0, 11, 12, 49)] == [True, True, False, False]
    assert not DraftAttention(dense_steps=0.0).is_dense(step(0))
    # Without a schedule by the timestep, also where a transformer takes it divided by 1000.
    assert share.is_dense(step(0, None, 800.0)) and share.is_dense(step(0, None, 0.8))
    assert not share.is_dense(step(3, None, 700.0))
    authors = DraftAttention(dense_until=925)
    assert authors.is_dense(step(30, timestep=926.0)) and authors.is_dense(step(0, None, 0.95))
    assert not authors.is_dense(step(0, timestep=925.0))


@pytest.mark.parametrize(
    "name, layers", [("HunyuanVideoTransformer3DModel", 2), ("WanTransformer3DModel", 1)]
)
def test_layers_and_steps_on_a_model(name: str, layers: int):
    tiny = TINY[name]
    with ditkit.apply(
        Pipe(tiny.model(), tiny), DraftAttention(sparsity=0.5, pool=(1, 1)), count_flops=False
    ) as r:
        r.hosts[0].pipeline(steps=8)
        shares = [density for density, _ in r.hosts[0].stats.densities]
    each = len(shares) // 8
    assert all(share == 1 for share in shares[: 2 * each])
    for later in range(2, 8):
        here = shares[later * each : (later + 1) * each]
        assert here[:layers] == [1.0] * layers
        assert max(here[layers:]) < 1


def test_a_choice_carries_no_gradient():
    layout = TokenLayout((1, 4, 4))
    q, k, v = (torch.randn(1, 1, 16, 4, requires_grad=True) for _ in range(3))
    strategy = DraftAttention(pool="2x2").strategy()
    assert not strategy.blocks(q, k, None, strategy.plan(layout, 1, CPU)).requires_grad
    run(DraftAttention(sparsity=0.5, pool="2x2", executor="gather"), layout, [q, k, v]).sum().backward()
    assert q.grad.isfinite().all()


def test_from_the_command_line():
    found = registry.parse_method("draft-attention:sparsity=0.9,pool=4x8,dense_until=945,empty_rows=authors")
    assert found == DraftAttention(sparsity=0.9, pool=(4, 8), dense_until=945.0, empty_rows="authors")


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.5},
        {"sparsity": -0.1},
        {"pool": "8"},
        {"pool": None},
        {"dense_blocks": -1},
        {"dense_steps": 2.0},
        {"empty_rows": "zero"},
        {"pooling": "median"},
        {"executor": "magic"},
    ],
)
def test_bad_option_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DraftAttention(**options)
