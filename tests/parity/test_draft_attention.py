"""DraftAttention against its authors' code: draft map, mask of each head, order of the tokens, block mask;
and the attention under that mask, which no CPU kernel of theirs can run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Call
from torch import Tensor

from ditkit.methods.draft_attention import DraftAttention
from ditkit.seams import executors
from ditkit.seams.layout import TokenLayout
from golden import cases, read

MAP_TOLERANCE = 1e-6
TOLERANCE = 1e-5
FILES = cases("draft-attention")


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], TokenLayout, DraftAttention]:
    case, tensors = read(path)
    grid = (case["frames"], case["latent_h"], case["latent_w"])
    text = case.get("text_len", 0)
    layout = TokenLayout(grid, text, "suffix" if text else "none")
    assert layout.image_length == case["visual_len"]
    method = DraftAttention(
        sparsity=case["sparsity_ratio"],
        pool=(case["pool_h"], case["pool_w"]),
        dense_blocks=0,
        empty_rows="authors",
    )
    return case, tensors, layout, method


def qkv(tensors: dict[str, Tensor], layout: TokenLayout) -> list[Tensor]:
    """(B, h, L, d) from the authors' (B L, h, d), one sample after another."""
    return [tensors[f"inputs.{x}"].unflatten(0, (-1, layout.length)).transpose(1, 2) for x in "qkv"]


def stacked(tensors: dict[str, Tensor], name: str) -> Tensor:
    """(B, h, S, S): a map for each sample of the batch."""
    keys = sorted(key for key in tensors if key.startswith(f"outputs.{name}_"))
    assert keys == [f"outputs.{name}_{i}" for i in range(len(keys))]
    return torch.stack([tensors[key] for key in keys])


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("path", FILES)
def test_draft_map_and_mask(path: Path):
    case, tensors, layout, method = load(path)
    tiling = executors.tile_grid(layout.grid, method.pool)
    q, k, _ = (x[:, :, layout.image_span] for x in qkv(tensors, layout))
    expected = stacked(tensors, "draft_map")
    assert len(expected) == (2 if case["classifier_free_guidance_variant"] else 1)
    draft = method.draft_map(q, k, tiling)[: len(expected)]
    torch.testing.assert_close(draft, expected, atol=MAP_TOLERANCE, rtol=0)
    assert torch.equal(method.select(draft), stacked(tensors, "draft_mask").bool())
    kept = stacked(tensors, "draft_mask").sum((-2, -1))
    assert (kept >= method.kept(layout.grid)).all()  # more where entries are equal


@pytest.mark.parametrize("path", FILES)
def test_order_of_the_tokens(path: Path):
    _, tensors, layout, method = load(path)
    tiling = executors.tile_grid(layout.grid, method.pool)
    tokens = layout.length
    text = torch.arange(layout.image_length, tokens)
    order = torch.cat([tiling.order.flatten(), text])
    back = torch.cat([tiling.inverse, text])
    batch = len(tensors["outputs.reorg_idx"]) // tokens
    starts = tokens * torch.arange(batch)[:, None]
    assert torch.equal((order + starts).flatten(), tensors["outputs.reorg_idx"].long())
    assert torch.equal((back + starts).flatten(), tensors["outputs.restore_idx"].long())
    q = tensors["inputs.q"].unflatten(0, (-1, tokens))
    video = tiling.split(q[:, : layout.image_length].transpose(1, 2)).flatten(2, 3).transpose(1, 2)
    found = torch.cat([video, q[:, layout.image_length :]], dim=1).flatten(0, 1)
    expected = tensors["outputs.q_reordered"]
    assert torch.equal(found[: len(expected)], expected)


@pytest.mark.parametrize("executor", ["auto", "dense", "gather"])
@pytest.mark.parametrize("path", FILES)
def test_attention(path: Path, executor: str):
    _, tensors, layout, method = load(path)
    method = DraftAttention(
        sparsity=method.sparsity, pool=method.pool, dense_blocks=0, empty_rows="authors", executor=executor
    )
    strategy = method.strategy()
    q, k, v = qkv(tensors, layout)
    plan = strategy.plan(layout, q.shape[1], q.device)
    blocks = strategy.blocks(q, k, None, plan)  # (B, h, S, S)
    expected = tensors["outputs.block_mask"].bool()
    tiles = blocks.shape[-1]
    assert torch.equal(blocks, expected[..., :tiles, :tiles])
    assert expected[..., tiles:, :].all() and expected[..., tiles:].all()  # text is read and reads
    call = Call()
    found = strategy.attend(q, k, v, None, None, call, plan).transpose(1, 2)
    reads = torch.ones(found.shape[:3], dtype=torch.bool)
    if not layout.text_length:
        # Of a query without a key the exact evaluation can't say anything: ours is zero.
        rows = blocks.any(-1).transpose(1, 2)  # (B, S, h)
        reads = rows[:, plan.tiling.inverse // plan.tiling.order.shape[1]]
        assert (found[~reads] == 0).all()
    exact = tensors["derived.attention"]
    torch.testing.assert_close(found[reads], exact[reads], atol=TOLERANCE, rtol=TOLERANCE)
    assert call.shares[0] == pytest.approx(
        executors.dense_mask(executors.BlockLists.from_map(blocks), plan.tiling, layout)
        .double()
        .mean()
        .item()
    )
