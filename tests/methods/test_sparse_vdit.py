"""Sparse-vDiT: the modes against masks, groups of heads, tables on a model, counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit import artifact
from ditkit.methods.sparse_vdit import DIAGONAL, FULL, MODES, MULTI_DIAGONAL, SKIP, STRIPE, SparseVDiT, Table
from ditkit.seams.errors import SeamError
from ditkit.seams.executors import masked_dense
from ditkit.seams.layout import TokenLayout
from tiny_models import TINY, output

LAYOUTS = {
    "video": TokenLayout((4, 4, 8)),
    "ragged": TokenLayout((5, 3, 7)),
    "prefix": TokenLayout((4, 4, 6), 9, "prefix"),
    "suffix": TokenLayout((3, 4, 8), 5, "suffix"),
    "picture": TokenLayout((1, 12, 8)),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def inputs(layout: TokenLayout, heads: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, layout.length, 8) for _ in range(3)]


def reference(mode: int, layout: TokenLayout, block: int, width: int, stripes: list[int]) -> Tensor:
    """(L, L) bool, pair by pair."""
    frames, height, width_ = layout.grid
    area = height * width_
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    start = layout.image_span.start
    first = range(math.ceil(area / block)) if frames > 1 else range(0)
    for i in range(layout.image_length):
        for j in range(layout.image_length):
            a, b = i, j
            if mode == MULTI_DIAGONAL:
                a, b = (x % area * frames + x // area for x in (i, j))
            near = abs(a // block - b // block) <= width
            if mode == STRIPE:
                near = b // block in (*first, *stripes)
            mask[start + i, start + j] = near
    return mask


@pytest.mark.parametrize("executor", ["dense", "gather"])
@every_layout
def test_modes_are_masks(layout: TokenLayout, executor: Any) -> None:
    options = SparseVDiT(block=8, diag_width=1, n_stripe=2, executor=executor)
    patterns = options.patterns(layout)
    q, k, v = inputs(layout)
    keys = torch.rand(2, 1, 1, layout.length) > 0.2
    keys[..., layout.image_span] = True
    stripes = patterns.even_stripes(4)
    striped = patterns.striped(stripes)
    for mode in (DIAGONAL, MULTI_DIAGONAL, STRIPE):
        mask = reference(mode, layout, 8, 1, stripes[0].tolist())
        assert patterns.shares[mode] == pytest.approx(mask.double().mean().item(), rel=0.1)
        for given in (None, keys):
            expected = masked_dense(q, k, v, mask if given is None else mask & given)
            found = patterns.run(mode, q, k, v, given, None, striped if mode == STRIPE else None)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(patterns.run(FULL, q, k, v), full)
    assert not patterns.run(SKIP, q, k, v).any()


@every_layout
def test_multi_diagonal_is_diagonal_on_rearranged_tokens(layout: TokenLayout) -> None:
    patterns = SparseVDiT(block=8).patterns(layout)
    q, k, v = inputs(layout)
    other = [patterns.rearrange(x) for x in (q, k, v)]
    assert torch.equal(patterns.rearrange(other[0], back=True), q)
    expected = patterns.rearrange(patterns.run(DIAGONAL, *other), back=True)
    assert torch.equal(patterns.run(MULTI_DIAGONAL, q, k, v), expected)


class Call:
    layer = 0

    def attended(self, share: float) -> None:
        self.share = share


@pytest.mark.parametrize("executor", ["dense", "gather"])
def test_grouped_heads_are_single_heads_bit_for_bit(executor: Any) -> None:
    from ditkit.methods.sparse_vdit import Attention

    layout = LAYOUTS["prefix"]
    modes = (STRIPE, FULL, DIAGONAL, SKIP, STRIPE, DIAGONAL, MULTI_DIAGONAL, MULTI_DIAGONAL)
    stripes = torch.tensor([[[3, 5]] * 4 + [[4, 9]] * 4])
    options = SparseVDiT(table=Table((modes,), stripes), block=8, n_stripe=2, executor=executor)
    strategy = Attention(options)
    plan = strategy.plan(layout, 8, torch.device("cpu"))
    q, k, v = inputs(layout, 8)
    call = Call()
    together = strategy.attend(q, k, v, None, None, call, plan)
    for head, mode in enumerate(modes):
        one = [x[:, head : head + 1].contiguous() for x in (q, k, v)]
        striped = plan.patterns.striped(stripes[0, head : head + 1]) if mode == STRIPE else None
        alone = plan.patterns.run(mode, *one, None, None, striped)
        assert torch.equal(together[:, head : head + 1], alone), MODES[mode]
    assert call.share == pytest.approx(sum(plan.patterns.shares[mode] for mode in modes) / 8)


def test_gradients_pass_through_groups() -> None:
    from ditkit.methods.sparse_vdit import Attention

    layout = LAYOUTS["video"]
    options = SparseVDiT(table=Table(((FULL, STRIPE, DIAGONAL, MULTI_DIAGONAL),)), block=8, executor="gather")
    strategy = Attention(options)
    q, k, v = (x.requires_grad_() for x in inputs(layout))
    strategy.attend(q, k, v, None, None, Call(), strategy.plan(layout, 4, q.device)).square().sum().backward()
    assert all(bool((x.grad.abs().sum((0, 2, 3)) > 0).all()) for x in (q, k, v))


# Counts.


@pytest.mark.parametrize(
    ("grid", "text", "tokens"),
    [((11, 48, 85), 226, 45_106), ((33, 45, 80), 256, 119_056), ((21, 45, 80), 0, 75_600)],
)
def test_layouts_of_the_paper(grid: tuple[int, int, int], text: int, tokens: int) -> None:
    """CogVideoX 1.5, HunyuanVideo, Wan 2.1: about a quarter is read, and counts follow the modes."""
    full = SparseVDiT().flops(grid, text, 24, 128)
    assert full == 4 * tokens**2 * 24 * 128
    for mode in (DIAGONAL, MULTI_DIAGONAL, STRIPE):
        share = SparseVDiT().mode_density(mode, grid, text)
        assert 0.22 < share < 0.28
        uniform = SparseVDiT(uniform=MODES[mode])  # pyright: ignore[reportArgumentType]
        assert uniform.flops(grid, text, 24, 128) == pytest.approx(share * full)
    half = SparseVDiT(table=Table(((FULL, SKIP), (FULL, SKIP))))
    assert half.flops(grid, text, 24, 128) == full / 2


# On a model.


def table(layers: int, heads: int, **options: Any) -> Table:
    modes = tuple(tuple((layer + head) % 5 for head in range(heads)) for layer in range(layers))
    return Table(modes, **options)


@pytest.mark.parametrize(
    "name", ["WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel"]
)
def test_weights_are_a_table(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    model = tiny.model()
    layers = artifact.model_facts(model)["attention"]
    modes = table(layers, 2)
    joint = 0 if name.startswith("Wan") else 5
    facts = artifact.model_facts(model) | {"grid": [2, 4, 2], "text_length": joint}
    tensors = {"modes": torch.tensor(modes.modes), "stripes": torch.full((layers, 2, 1), 7)}
    folder = artifact.save(
        tmp_path / "a", "sparse-vdit", {"block": 2, "diag_width": 1, "n_stripe": 1}, facts, tensors
    )
    stripes = Table(modes.modes, tensors["stripes"])
    with torch.no_grad():
        with ditkit.apply(model, SparseVDiT(weights=str(folder))) as run:
            found = output(model(**tiny.inputs()))
            assert "skip" in str(run.report())
            with pytest.raises(SeamError, match=r"searched on a grid of \(2, 4, 2\)"):
                model(**tiny.inputs(size=1))
        with ditkit.apply(model, SparseVDiT(table=stripes, block=2, diag_width=1, n_stripe=1)):
            assert torch.equal(output(model(**tiny.inputs())), found)
        assert not torch.equal(output(model(**tiny.inputs())), found)


def test_a_table_of_another_model_is_refused() -> None:
    with pytest.raises(SeamError, match="3 layers, this FluxTransformer2DModel has 4"):
        ditkit.apply(TINY["FluxTransformer2DModel"].model(), SparseVDiT(table=table(3, 2)))
    model = TINY["WanTransformer3DModel"].model()
    with (
        ditkit.apply(model, SparseVDiT(table=table(3, 5))),
        pytest.raises(SeamError, match="5 heads, the model 2"),
    ):
        model(**TINY["WanTransformer3DModel"].inputs())


@pytest.mark.parametrize(
    ("options", "word"),
    [({"uniform": "x"}, "uniform"), ({"block": 0}, "block"), ({"diag_width": -1}, "diag_width"),
     ({"uniform": "skip", "weights": "a"}, "one of them"), ({"executor": "x"}, "executor")],
)  # fmt: skip
def test_wrong_options(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        SparseVDiT(**options)
    with pytest.raises(ValueError, match="0 to 4"):
        Table(((0, 5),))
