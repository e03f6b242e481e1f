"""What sparse attention leaves of dense attention: the claims of the papers on smooth fields and along a
trajectory. `sparse_attention.py` runs this and writes the result.

B batch, h heads, L tokens, d head dim, S tiles.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import Claim
from ditkit.analysis.metrics import relative_l2
from ditkit.methods.draft_attention import DraftAttention
from ditkit.methods.re_ttention import ReTtention
from ditkit.seams import executors
from ditkit.seams.attention import AttentionCall
from ditkit.seams.layout import TokenLayout
from ditkit.seams.steps import Step

Grid = tuple[int, int, int]
QKV = tuple[Tensor, Tensor, Tensor]
DRAFT, RE = "arXiv 2505.14708", "arXiv 2505.22918"


class Call(AttentionCall):
    """A call of no model, behind the layers that a method keeps dense."""

    def __init__(self, name: str = "attn") -> None:
        self.layer, self.name = 1000, name
        self.kept: dict[Any, Any] = {}
        self.share = 1.0

    @property
    def state(self) -> dict[Any, Any]:
        return self.kept

    def attended(self, share: float) -> None:
        self.share = share


def smooth(grid: Grid, heads: int, channels: int, cells: Grid, noise: float) -> Tensor:
    """A random field that changes slowly over the grid, and noise: (1, h, L, d), each with variance 1."""
    coarse = torch.randn(1, heads * channels, *cells)
    field = F.interpolate(coarse, grid, mode="trilinear", align_corners=False).flatten(2)
    field = field.view(1, heads, channels, -1).transpose(-1, -2)
    field = field / field.std() + noise * torch.randn_like(field)
    return (field / field.std()).contiguous()


def queries_keys_values(grid: Grid, heads: int, channels: int, noise: float = 0.5) -> QKV:
    """Queries and keys that are near where the pictures are alike, as trained ones are."""
    content = smooth(grid, heads, channels, (4, 4, 4), 0.0)
    q, k = (F.normalize(content + noise * torch.randn_like(content), dim=-1) * channels**0.5 for _ in "qk")
    return q, k, smooth(grid, heads, channels, (4, 6, 6), 0.2)


def lines(chosen: Tensor, tiling: executors.Tiling, layout: TokenLayout) -> executors.BlockPlan:
    return executors.BlockPlan(executors.BlockLists.from_map(chosen), tiling, layout, "gather")


def first_pairs(order: Tensor, kept: Tensor) -> Tensor:
    """The first `kept` (B, h) tile pairs of an order (B, h, S, S), as a map."""
    rank = order.flatten(-2).argsort(-1).argsort(-1)
    return (rank < kept[..., None]).view_as(order)


def mass_and_error(qkv: QKV, plan: executors.BlockPlan, dense: Tensor, lse: Tensor) -> dict[str, float]:
    """Mean share of the softmax mass inside the mask, and the output's relative distance to dense."""
    out, inside = plan.attend_with_lse(*qkv)
    return {"mass": float((inside - lse).exp().mean()), "error": relative_l2(out, dense)}


def draft(grid: Grid, heads: int, channels: int, seeds: int) -> tuple[list[Claim], list[dict[str, Any]]]:
    """DraftAttention's map against random and fixed local masks of as many tile pairs, and its options."""
    layout, rows = TokenLayout(grid), []
    tiling = executors.tile_grid(grid, (1, 8, 16))
    places = torch.stack(executors.places(grid, tiling.order)).double().mean(-1).T  # (S, 3) centres
    near = torch.cdist(places, places)[None, None].expand(1, heads, -1, -1)
    for seed in range(seeds):
        torch.manual_seed(seed)
        qkv = queries_keys_values(grid, heads, channels)
        dense, lse = executors.attention_with_lse(*qkv)
        for sparsity in (0.75, 0.9):
            mean, greatest = (
                DraftAttention(sparsity=sparsity, pooling=pooling, empty_rows="authors")
                for pooling in ("mean", "max")
            )
            maps = {form.pooling: form.select(form.draft_map(*qkv[:2], tiling)) for form in (mean, greatest)}
            kept = maps["mean"].sum((-2, -1))
            maps["random"] = first_pairs(torch.rand(near.shape), kept)
            maps["local"] = first_pairs(near, kept)
            for name, chosen in maps.items():
                found = mass_and_error(qkv, lines(chosen, tiling, layout), dense, lse)
                rows.append({"seed": seed, "sparsity": sparsity, "mask": name, **found})
        # Queries that have little to do with the keys: then rows of the map can lie below the threshold.
        qkv = tuple(smooth(grid, heads, channels, (2, 3, 3), 0.3) for _ in range(3))
        dense, lse = executors.attention_with_lse(*qkv)
        for rule in ("authors", "best"):
            method = DraftAttention(sparsity=0.9, empty_rows=rule)
            chosen = method.select(method.draft_map(*qkv[:2], tiling))
            found = mass_and_error(qkv, lines(chosen, tiling, layout), dense, lse)
            empty = float((~chosen.any(-1)).double().mean())
            rows.append({"seed": seed, "sparsity": 0.9, "mask": f"rows: {rule}", "empty": empty, **found})
    return _draft_claims(rows, f"{' x '.join(map(str, grid))} tokens, smooth fields, {seeds} seeds"), rows


def _draft_claims(rows: list[dict[str, Any]], where: str) -> list[Claim]:
    found = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in rows):
        of = {
            name: [row for row in rows if row["mask"] == name and row["sparsity"] == sparsity]
            for name in ("mean", "max", "random", "local")
        }

        def mean(name: str, what: str, of: dict[str, list[dict[str, Any]]] = of) -> float:
            return statistics.mean(row[what] for row in of[name])

        def figures(*names: str, mean: Any = mean) -> str:
            return "; ".join(
                f"{name}: mass {mean(name, 'mass'):.3f}, error {mean(name, 'error'):.3f}" for name in names
            )

        each = [
            all(
                one["mass"] > other["mass"] and one["error"] < other["error"]
                for one, other in zip(of["mean"], of[name], strict=True)
            )
            for name in ("random", "local")
        ]
        at = f"{sparsity:.0%} sparse, {where}"
        found += [
            Claim(
                "draft-attention",
                f"{at}: more kept mass and less error than a random and a fixed local mask of equal density",
                DRAFT,
                figures("mean", "random", "local"),
                all(each),
                "in every seed",
            ),
            Claim(
                "draft-attention",
                f"{at}: average pooling keeps more mass than max pooling",
                DRAFT,
                figures("mean", "max"),
                mean("mean", "mass") > mean("max", "mass"),
            ),
        ]
    left, filled = ([row for row in rows if row["mask"] == name] for name in ("rows: authors", "rows: best"))
    errors = [statistics.mean(row["error"] for row in some) for some in (left, filled)]
    found.append(
        Claim(
            "draft-attention",
            f"90% sparse, {where} of queries apart from keys: rows without a key, filled as with "
            "`empty_rows=best`, come nearer to dense than as the authors leave them",
            "ditkit",
            f"{statistics.mean(row['empty'] for row in left):.1%} of the rows are empty: error "
            f"{errors[0]:.3f}; filled: {errors[1]:.3f}",
            errors[1] < errors[0],
            "without text; the authors' kernel gives such rows zeros or NaN, zeros here",
        )
    )
    return found


FORMS: dict[str, dict[str, Any]] = {
    "(a) plain sparse": {"ratio": False, "residual": False},
    "(b) ratio only": {"residual": False},
    "(c) residual only": {"ratio": False},
    "(d) both": {},
}


def trajectory(
    grid: Grid, heads: int, channels: int, keep: float, growth: float, seed: int = 0
) -> dict[str, list[float]]:
    """Relative errors of one layer at each of 20 steps from noise to a smooth field, PixArt's schedule."""
    torch.manual_seed(seed)
    layout, steps = TokenLayout(grid), 20
    data, noise = (
        queries_keys_values(grid, heads, channels),
        [torch.randn(1, heads, grid[1] * grid[2], channels)] * 3,
    )
    turns = [torch.linalg.qr(torch.randn(channels, channels)).Q for _ in range(3)]
    inputs = []
    for index in range(steps):
        level = 1 - index / steps
        inputs.append(
            [((1 - level) * x + level * e @ turn) for x, e, turn in zip(data, noise, turns, strict=True)]
        )
    errors: dict[str, list[float]] = {}
    for name, form in FORMS.items():
        method = ReTtention(keep=keep, band="exact", warmup=5, growth=growth, **form)
        strategy, call = method.strategy(), Call()
        plan = strategy.plan(layout, heads, data[0].device)
        errors[name] = []
        for index, qkv in enumerate(inputs):
            strategy.begin(Step(index, steps, 0.0, "0", 0))
            out = strategy.attend(*qkv, None, None, call, plan)
            errors[name].append(relative_l2(out, F.scaled_dot_product_attention(*qkv)))
    return errors


def re_ttention(
    grid: Grid, heads: int, channels: int, seeds: int
) -> tuple[list[Claim], list[dict[str, Any]]]:
    """The four forms along a trajectory, with the authors' growth of the ratio and without."""
    claims, rows = [], []
    for keep in (1 / 32, 1 / 8):
        grown: dict[float, float] = {}
        for growth in (0.04, 0.0):
            runs = [trajectory(grid, heads, channels, keep, growth, seed) for seed in range(seeds)]
            mean = {
                name: [statistics.mean(run[name][i] for run in runs) for i in range(20)] for name in FORMS
            }
            rows.append({"keep": keep, "growth": growth, "errors": mean})
            # By the distance from the last full step, which is 5, 10 or 15.
            at = {
                name: [statistics.mean(errors[full + away] for full in (5, 10, 15)) for away in range(1, 5)]
                for name, errors in mean.items()
            }
            a, b, c, d = at.values()
            grown[growth] = statistics.mean(d[1:])
            where = (
                f"{grid[1]} x {grid[2]} tokens, keep {keep:.3g}, growth {growth:g}, 20 steps, {seeds} seeds"
            )
            words = "; ".join(
                f"{name}: " + ", ".join(f"{error:.4f}" for error in errors) for name, errors in at.items()
            )
            claims += [
                Claim(
                    "re-ttention",
                    f"{where}: right after a full step the error of ratio and residual is below that of the "
                    "residual alone, and that below plain sparse",
                    RE,
                    words,
                    d[0] < c[0] < a[0],
                    "1 to 4 steps after a full one, one layer, noise to a smooth field",
                ),
                Claim(
                    "re-ttention",
                    f"{where}: that holds at each of the four steps",
                    RE,
                    f"{sum(x < y < z for x, y, z in zip(d, c, a, strict=True))} of 4; ratio alone is below "
                    f"plain sparse at {sum(x < y for x, y in zip(b, a, strict=True))} of 4",
                    all(x < y < z for x, y, z in zip(d, c, a, strict=True)),
                ),
                Claim(
                    "re-ttention",
                    f"{where}: the error grows with the distance from the full step",
                    RE,
                    ", ".join(f"{error:.4f}" for error in d),
                    d == sorted(d),
                ),
            ]
        claims.append(
            Claim(
                "re-ttention",
                f"{grid[1]} x {grid[2]} tokens, keep {keep:.3g}: with lambda = 0.04 the error is lower than "
                "with 0",
                RE,
                f"{grown[0.04]:.4f} against {grown[0.0]:.4f}, 2 to 4 steps after a full one",
                grown[0.04] < grown[0.0],
            )
        )
    return claims, rows
