"""`ditkit fit sparse-vdit`: planted patterns are found, thresholds act, a search goes on where it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
import tiny_pipelines
from ditkit import artifact
from ditkit.fitting import run
from ditkit.fitting.errors import FittingError
from ditkit.fitting.run import FitData
from ditkit.fitting.sparse_vdit import FitSparseVDiT, Result, Search, block_mass, decide, searching
from ditkit.methods.sparse_vdit import DIAGONAL, FULL, MULTI_DIAGONAL, SKIP, STRIPE, SparseVDiT
from ditkit.seams.layout import TokenLayout
from loops import Pipe
from tiny_models import TINY

GRID = (8, 8, 8)
LAYOUT = TokenLayout(GRID)
BLOCK, WIDTH = 16, 64
KINDS = (FULL, SKIP, DIAGONAL, MULTI_DIAGONAL, STRIPE)
PLANTED = FitSparseVDiT(block=BLOCK, lam=0.02, eps=0.05, every=1)


class Call:
    """As much of an `AttentionCall` as the search reads."""

    class step:
        index = 0

    def __init__(self, layer: int) -> None:
        self.layer = layer


def code(places: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    """(L, WIDTH): dot products fall off with the distance of the places, on the scale of `reach`."""
    angles = places[:, None] * torch.randn(WIDTH // 2, generator=generator) / reach
    return torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(WIDTH // 2)


def head(kind: int, seed: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """q, k, v (L, WIDTH) of a head of a kind, and the blocks of its stripes."""
    g = torch.Generator().manual_seed(seed)
    length, area = LAYOUT.length, GRID[1] * GRID[2]
    number = torch.arange(length)
    v = 1 + torch.randn(length // BLOCK, WIDTH, generator=g).repeat_interleave(BLOCK, 0)
    v = v + torch.randn(length, WIDTH, generator=g)
    stripes: list[int] = []
    q = k = torch.zeros(length, WIDTH)
    if kind == SKIP:
        v = 1e-3 * v
    elif kind == DIAGONAL:
        q = k = 12 * math.sqrt(math.sqrt(WIDTH)) * code(number.float(), 8.0, g) / math.sqrt(12)
    elif kind == MULTI_DIAGONAL:
        q = k = 12 * math.sqrt(math.sqrt(WIDTH)) * code((number % area).float(), 1.0, g) / math.sqrt(12)
    elif kind == STRIPE:
        first = math.ceil(area / BLOCK)
        stripes = sorted((torch.randperm(length // BLOCK - first, generator=g)[:4] + first).tolist())
        towards = torch.randn(WIDTH, generator=g)
        q = towards.expand(length, -1) + 0.1 * torch.randn(length, WIDTH, generator=g)
        seen = torch.isin(number // BLOCK, torch.tensor(stripes))
        k = torch.where(seen[:, None], 1.0 * towards, torch.zeros(WIDTH))
    return q, k, v, stripes


def layer(kinds: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """(1, h, L, WIDTH) three times, and the stripes of each head."""
    heads = [head(kind, 100 * seed + i) for i, kind in enumerate(kinds)]
    q, k, v = (torch.stack([one[part] for one in heads])[None] for part in range(3))
    return q, k, v, [one[3] for one in heads]


def found_in(
    options: FitSparseVDiT, layers: list[list[int]], seed: int
) -> tuple[Result, list[list[list[int]]]]:
    search = Search(options)
    plan = search.plan(LAYOUT, len(layers[0]), torch.device("cpu"))
    stripes = []
    for search.round in (0, 1):
        stripes = []
        for number, kinds in enumerate(layers):
            q, k, v, planted = layer(kinds, seed + number)
            stripes.append(planted)
            full = search.attend(q, k, v, None, None, Call(number), plan)  # pyright: ignore[reportArgumentType]
            assert torch.equal(full, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    return search.result(search.block_costs()), stripes


def agreement(one: Any, other: Any) -> float:
    return (torch.tensor(one) == torch.tensor(other)).double().mean().item()


@pytest.fixture(scope="module")
def planted() -> tuple[list[list[int]], Result, list[list[list[int]]]]:
    kinds = [[KINDS[(i + j) % 5] for j in range(10)] for i in range(2)]
    return (kinds, *found_in(PLANTED, kinds, 0))


def test_planted_patterns_are_found(planted: tuple[Any, Result, Any]) -> None:
    kinds, result, stripes = planted
    hits = [
        a == b
        for row, found in zip(kinds, result.table.modes, strict=True)
        for a, b in zip(row, found, strict=True)
    ]
    assert sum(hits) >= 0.95 * len(hits), result.errors
    assert result.table.stripes is not None
    for row, planted_here, chosen in zip(kinds, stripes, result.table.stripes, strict=True):
        for kind, blocks, found in zip(row, planted_here, chosen.tolist(), strict=True):
            assert kind != STRIPE or set(found) <= set(blocks) or set(blocks) <= set(found)


def test_two_sets_of_samples_agree(planted: tuple[Any, Result, Any]) -> None:
    kinds, result, _ = planted
    other, _ = found_in(PLANTED, kinds, 50)
    same = [
        a == b
        for x, y in zip(result.table.modes, other.table.modes, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert sum(same) >= 0.8 * len(same)


def test_more_is_sparse_with_a_larger_threshold(planted: tuple[Any, Result, Any]) -> None:
    _, result, _ = planted
    costs = [1.0, 0.0, 0.28, 0.28, 0.25]
    counts = [
        int((decide(result.errors, costs, 0.5, eps) != FULL).sum()) for eps in (0, 0.1, 0.3, 0.5, 1, 3, 10)
    ]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == result.errors[..., 0].numel()


def test_the_smallest_loss_decides() -> None:
    errors = torch.tensor([[[0, 0.9, 0.2, 0.3, 0.4], [0, 0.1, 0.2, 0.0, 0.4], [0, 3.0, 2.0, 2.5, 2.2]]])
    costs = [1.0, 0.0, 0.25, 0.25, 0.25]
    assert decide(errors, costs, 0.5, 1.0).tolist() == [[DIAGONAL, SKIP, FULL]]
    assert decide(errors, costs, 0.0, 1.0).tolist() == [[DIAGONAL, MULTI_DIAGONAL, FULL]]
    assert decide(errors, costs, 0.5, 0.11).tolist() == [[FULL, SKIP, FULL]]


def test_normalized_errors_do_not_depend_on_the_scale_of_values() -> None:
    plain, relative = Search(PLANTED), Search(FitSparseVDiT(block=BLOCK, normalize=True))
    q, k, v, _ = layer([DIAGONAL, FULL, STRIPE], 3)
    for search, scale in ((plain, 1.0), (relative, 1.0), (relative, 7.0)):
        plan = search.plan(LAYOUT, 3, torch.device("cpu"))
        for search.round in (0, 1):
            search.attend(q, k, scale * v, None, None, Call(int(scale)), plan)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(relative.errors[1], relative.errors[7], rtol=1e-4, atol=1e-6)
    assert float(relative.errors[1][0, SKIP]) == pytest.approx(1)
    assert float(plain.errors[1][0, SKIP]) != pytest.approx(1, rel=0.05)


def test_block_mass_is_the_mean_attention() -> None:
    layout = TokenLayout((2, 3, 4), 5, "prefix")
    patterns = SparseVDiT(block=7).patterns(layout)
    q, k = torch.randn(2, 3, 29, 8), torch.randn(2, 3, 29, 8)
    mask = torch.rand(2, 1, 1, 29) > 0.2
    weights = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask, -math.inf).softmax(-1)
    weights = weights[:, :, 5:, 5:].mean((0, 2))  # (h, N)
    expected = torch.stack([part.sum(-1) for part in weights.split(7, dim=-1)], dim=-1)
    torch.testing.assert_close(block_mass(q, k, patterns, mask).float(), expected, atol=1e-6, rtol=1e-5)


def test_measured_costs_are_shares_of_full_attention() -> None:
    search = Search(PLANTED)
    search.plan(LAYOUT, 2, torch.device("cpu"))
    search.head_dim = 16
    costs = search.measured_costs(rounds=1)
    assert costs[FULL] == 1 and len(costs) == 5 and min(costs) > 0


def test_another_grid_during_the_search_is_refused() -> None:
    tiny = TINY["WanTransformer3DModel"]
    pipe = Pipe(tiny.model(), tiny)
    with searching(pipe, FitSparseVDiT(block=2, every=1)) as search:
        pipe(steps=2)
        with pytest.raises(FittingError, match="modes hold for one grid"):
            pipe(steps=2, size=1)
        assert search.layout.grid == (2, 4, 2)


@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())
def test_every_class_can_be_searched(tiny: Any) -> None:
    """Guidance, too: both branches are measured."""
    pipe = Pipe(tiny.model(), tiny)
    with searching(pipe, FitSparseVDiT(block=2, every=2, normalize=True, eps=0.5)) as search:
        for search.round in (0, 1):
            pipe(steps=3, guidance=True)
        assert set(search.counts.values()) == {4}
        result = search.result(search.block_costs())
    assert len(result.table.modes) == len(search.mass)
    options = SparseVDiT(table=result.table, block=2)
    with ditkit.apply(pipe, options):
        assert bool(pipe(steps=2).isfinite().all())


DATA = FitData(("red apple", "green rocket"))
SMALL: dict[str, Any] = {
    "samples": 2,
    "sampling_steps": 3,
    "every": 2,
    "block": 2,
    "normalize": True,
    "eps": 0.6,
}


def test_fit_and_use(tmp_path: Path) -> None:
    pipe = tiny_pipelines.flux()
    folder = run.run(pipe, "sparse-vdit", FitSparseVDiT(**SMALL), DATA, tmp_path / "a")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights.safetensors"]
    found = artifact.load(folder, "sparse-vdit")
    assert found.model["grid"] == [1, 4, 4] and found.model["text_length"] == 8
    assert found.tensors["modes"].shape == (4, 2) and len(found.model["search"]["costs"]) == 5
    method = ditkit.registry.parse_method(f"sparse-vdit:weights={folder}")
    with ditkit.apply(pipe, method) as run_:
        pipe("red apple", num_inference_steps=2, output_type="latent", max_sequence_length=8)
    modes = method.fitted().table.modes
    assert any(mode != FULL for layer in modes for mode in layer)
    share = sum(mode == SKIP for layer in modes for mode in layer) / 8
    assert share == 0 or f"{share:.0%} skip" in str(run_.report())


@pytest.mark.parametrize("cost", ["blocks", "time"])
def test_a_killed_search_goes_on(tmp_path: Path, cost: Any) -> None:
    fitter = FitSparseVDiT(**SMALL, cost=cost)
    whole = run.run(tiny_pipelines.flux(), "sparse-vdit", fitter, DATA, tmp_path / "a")

    def kill(what: str, done: int, total: int) -> None:
        if done == 3:
            raise SystemExit

    with pytest.raises(SystemExit):
        run.run(tiny_pipelines.flux(), "sparse-vdit", fitter, DATA, tmp_path / "b", kill)
    seen: list[int] = []
    run.run(
        tiny_pipelines.flux(),
        "sparse-vdit",
        fitter,
        DATA,
        tmp_path / "b",
        lambda w, done, t: seen.append(done),
    )
    assert seen == [3, 4]
    one, two = (artifact.load(folder, "sparse-vdit") for folder in (whole, tmp_path / "b"))
    assert one.model["search"]["errors"] == two.model["search"]["errors"]
    assert torch.equal(one.tensors["stripes"], two.tensors["stripes"])
    if cost == "blocks":
        assert (whole / artifact.WEIGHTS).read_bytes() == (tmp_path / "b" / artifact.WEIGHTS).read_bytes()
