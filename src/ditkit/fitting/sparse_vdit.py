"""The search of Sparse-vDiT: which mode each head of each layer runs in (section 4.3).

With the inputs of the full model, every mode i runs beside full attention: L_i = MSE(O_i, O_0) + lambda (1 -
S_i), i = 1..4, averaged over the measured steps, samples and guidance branches. A head keeps full attention
when all L_i exceed epsilon, otherwise it takes the smallest. 1 - S_i is the share of blocks a mode reads, or
(`cost="time"`) its time on this machine as a share of full attention's.

The stripes of M4 are the key blocks with most attention, so a first round over the samples measures that.

B batch, h heads, L tokens of the sequence, N image tokens, d head dim, n blocks, K stripes.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit import artifact
from ditkit.analysis.sampling import Sampling, sample
from ditkit.files import write_text
from ditkit.fitting.errors import FittingError
from ditkit.fitting.loop import deferred_interrupt
from ditkit.fitting.recording import transformer_of
from ditkit.fitting.run import PROGRESS, FitData, Progress
from ditkit.methods.sparse_vdit import FULL, MODES, SKIP, STRIPE, Patterns, SparseVDiT, Table
from ditkit.registry import register
from ditkit.seams.apply import Host, apply
from ditkit.seams.attention import AttentionCall
from ditkit.seams.layout import TokenLayout
from ditkit.training import checkpoint

METHOD_OPTIONS = ("block", "diag_width", "n_stripe", "first_frame")
_SCORE_BYTES = 64 << 20  # attention weights that are held at once


@register("fitter", "sparse-vdit", summary="search the mode of every attention head", needs=("calibration",))
@dataclass(frozen=True)
class FitSparseVDiT:
    """Search the modes.

    Args:
        lam: lambda, weight of the cost beside the error (paper: 0.5).
        eps: epsilon, the largest L_i of a sparse head; None: 1 (paper), or 0.25 with `normalize`.
        normalize: divide the error by the mean square of O_0, so that it means the same in every model.
        cost: where 1 - S_i comes from: `"blocks"` counted, `"time"` measured here.
        samples: generations that are measured.
        sampling_steps: denoising steps of each.
        every: steps between two that are measured.
        seed: sample i starts from the noise of seed + i.
        others: as in the method.

    Raises:
        ValueError: an option out of range.
    """

    lam: float = 0.5
    eps: float | None = None
    normalize: bool = False
    cost: Literal["blocks", "time"] = "blocks"
    block: int = 128
    diag_width: int | None = None
    n_stripe: int | None = None
    first_frame: bool = True
    samples: int = 4
    sampling_steps: int = 28
    every: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        self.method()
        if min(self.samples, self.sampling_steps, self.every) < 1:
            raise ValueError("samples, sampling_steps and every must be at least 1")
        if self.lam < 0 or (self.eps is not None and self.eps < 0):
            raise ValueError(f"lam and eps must not be negative; got {self.lam} and {self.eps}")

    @property
    def epsilon(self) -> float:
        """The largest L_i of a sparse head."""
        if self.eps is not None:
            return self.eps
        return 0.25 if self.normalize else 1.0

    def method(self, table: Table | None = None) -> SparseVDiT:
        """The method as it is searched for."""
        return SparseVDiT(table=table, **{name: getattr(self, name) for name in METHOD_OPTIONS})

    def fit(self, pipe: Any, data: FitData, folder: Path, progress: Progress) -> None:
        """Search and save the table."""
        model = transformer_of(pipe)
        total = 2 * self.samples
        states = folder / PROGRESS / "states"
        with searching(pipe, self) as search, deferred_interrupt() as stopped:
            done = _restore(search, states)
            for number in range(done, total):
                progress("searching", number, total)
                search.round = number // self.samples
                index = number % self.samples
                sampling = Sampling(steps=self.sampling_steps, seed=self.seed + index)
                sample(pipe, [data.prompts[index % len(data.prompts)]], sampling)
                _save(search, states, number + 1)
                if stopped():
                    raise KeyboardInterrupt
            costs = self._costs(search, folder)
            result = search.result(costs)
            progress("searching", total, total)
            options = {name: getattr(self, name) for name in METHOD_OPTIONS}
            facts = artifact.model_facts(model) | {
                "grid": list(search.layout.grid),
                "text_length": search.layout.joint_text_length,
                "search": {"costs": costs, "errors": result.errors.tolist(), "shares": result.table.shares()},
            }
            stripes = result.table.stripes
            assert stripes is not None
            modes = torch.tensor(result.table.modes, dtype=torch.int64)
            artifact.save(folder, "sparse-vdit", options, facts, {"modes": modes, "stripes": stripes})

    def _costs(self, search: Search, folder: Path) -> list[float]:
        """1 - S_i; measured once, so that a search which goes on does not change its mind."""
        if self.cost == "blocks":
            return search.block_costs()
        file = folder / PROGRESS / "costs.json"
        if not file.is_file():
            write_text(file, json.dumps(search.measured_costs()))
        return json.loads(file.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Result:
    """What a search gave: the table, and errors (layers, heads, 5), mean over everything measured."""

    table: Table
    errors: Tensor


def decide(errors: Tensor, costs: list[float], lam: float, eps: float) -> Tensor:
    """Modes (layers, heads) from errors (layers, heads, 5) and costs 1 - S_i of the five modes."""
    losses = errors[..., SKIP:] + lam * torch.tensor(costs[SKIP:], dtype=errors.dtype)  # (layers, heads, 4)
    best, mode = losses.min(-1)
    return torch.where(best > eps, FULL, mode + SKIP)


class Search:
    """The strategy that measures: its output is full attention's.

    Attributes:
        round: 0 measures where attention goes, 1 the errors of the modes.
    """

    def __init__(self, options: FitSparseVDiT) -> None:
        self.options = options
        self.round = 0
        self.patterns: Patterns | None = None
        self.heads = self.head_dim = 0
        self.mass: dict[int, Tensor] = {}  # layer -> (h, n) attention of each key block, summed
        self.errors: dict[int, Tensor] = {}  # layer -> (h, 5) errors, summed
        self.counts: dict[int, int] = {}  # layer -> measured calls in round 1

    @property
    def layout(self) -> TokenLayout:
        if self.patterns is None:
            raise FittingError("the search has seen no forward of the transformer")
        return self.patterns.layout

    def plan(self, layout: TokenLayout, heads: int, device: torch.device) -> Patterns:
        """The modes on this layout.

        Raises:
            FittingError: another grid than before.
        """
        patterns = self.options.method().patterns(layout, device)
        if self.patterns is not None:
            # Some classes have attention over the image tokens alone beside joint attention.
            seen, texts = self.patterns.layout, {self.patterns.layout.joint_text_length, 0}
            both = {*texts, layout.joint_text_length}
            if seen.grid != layout.grid or len(both) > 2:
                raise FittingError(
                    f"the search saw grids of {seen.grid} + {seen.joint_text_length} text tokens and of "
                    f"{layout.grid} + {layout.joint_text_length}; modes hold for one grid"
                )
        if self.patterns is None or layout.joint_text_length:
            self.patterns = patterns
        self.heads = heads
        return patterns

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall,
        plan: Patterns,
    ) -> Tensor:
        """Full attention (B, h, L, d), measured at every so many steps."""
        full = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if call.step.index % self.options.every == 0:
            self.head_dim = q.shape[-1]
            with torch.no_grad():
                if self.round == 0:
                    _add(self.mass, call.layer, block_mass(q, k, plan, mask, scale))
                else:
                    _add(self.errors, call.layer, self._errors(full, q, k, v, mask, scale, plan, call.layer))
                    self.counts[call.layer] = self.counts.get(call.layer, 0) + 1
        return full

    def _errors(
        self, full: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any, plan: Patterns, layer: int
    ) -> Tensor:
        """(h, 5): mean squares over samples, tokens and channels of what each mode gets wrong."""
        square = full.double().square().mean((0, 2, 3)).cpu()
        found = [torch.zeros_like(square), square]
        striped = plan.striped(self.stripes(layer))
        for mode in range(SKIP + 1, len(MODES)):
            out = plan.run(mode, q, k, v, mask, scale, striped if mode == STRIPE else None)
            found.append((out - full).double().square().mean((0, 2, 3)).cpu())
        errors = torch.stack(found, dim=-1)
        return errors / square.clamp(min=1e-30)[:, None] if self.options.normalize else errors

    def stripes(self, layer: int) -> Tensor:
        """(h, K): the key blocks of a layer with most attention, ascending, without the first frame's."""
        assert self.patterns is not None
        first = self.patterns.first
        chosen = self.mass[layer][:, first:].topk(self.patterns.stripes, dim=-1).indices + first
        return chosen.sort(-1).values

    def block_costs(self) -> list[float]:
        """1 - S_i of the five modes by the pairs that they read."""
        assert self.patterns is not None
        return list(self.patterns.shares)

    def measured_costs(self, rounds: int = 5) -> list[float]:
        """Time of the five modes at this size on this machine, as a share of full attention's."""
        assert self.patterns is not None
        patterns, device = self.patterns, self.patterns.device
        shape = (1, self.heads, patterns.layout.length, self.head_dim)
        q, k, v = (
            torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3)
        )
        striped = patterns.striped(patterns.even_stripes(self.heads))
        seconds: dict[int, list[float]] = {mode: [] for mode in range(len(MODES))}
        with torch.no_grad():
            for number in range(rounds + 1):
                for mode, times in seconds.items():
                    start = _now(device)
                    patterns.run(mode, q, k, v, striped=striped if mode == STRIPE else None)
                    if number:  # the first round warms up
                        times.append(_now(device) - start)
        medians = [statistics.median(times) for times in seconds.values()]
        return [median / medians[FULL] for median in medians]

    def result(self, costs: list[float]) -> Result:
        """The table that the measurements give."""
        layers = sorted(self.errors)
        errors = torch.stack([self.errors[layer] / self.counts[layer] for layer in layers])
        modes = decide(errors, costs, self.options.lam, self.options.epsilon)
        stripes = torch.stack([self.stripes(layer) for layer in layers])
        rows = tuple(tuple(int(mode) for mode in layer) for layer in modes)
        return Result(Table(rows, stripes, self.layout.grid, self.layout.joint_text_length), errors)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _add(sums: dict[int, Tensor], layer: int, value: Tensor) -> None:
    sums[layer] = sums[layer] + value if layer in sums else value


def block_mass(
    q: Tensor, k: Tensor, patterns: Patterns, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """(h, n) float64: softmax weight of image queries on each block of image keys, mean over queries and
    samples."""
    B, h, L, d = q.shape
    span = patterns.layout.image_span
    scale = 1 / math.sqrt(d) if scale is None else scale
    total = torch.zeros(h, L, dtype=torch.float64)
    q = q[:, :, span]
    step = max(1, _SCORE_BYTES // (4 * B * h * L))
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        scores = q[:, :, rows].float() @ k.float().transpose(-1, -2) * scale  # (B, h, rows, L)
        if mask is not None:
            here = mask[..., span, :][..., rows, :] if mask.shape[-2] == L else mask
            scores = scores.masked_fill(~here, -math.inf) if here.dtype == torch.bool else scores + here
        total += scores.softmax(-1).double().sum((0, 2)).cpu()
    image = total[:, span] / (B * q.shape[2])
    tiling = patterns.tiling
    order = tiling.order.cpu()
    mass = image[:, order]  # (h, n, t)
    return mass.sum(-1) if tiling.valid is None else (mass * tiling.valid.cpu()).sum(-1)


@dataclass(frozen=True)
class _Searching:
    """A method that only measures."""

    claims: ClassVar[frozenset[str]] = frozenset({"attention"})

    search: Search = field(compare=False)

    def attach(self, host: Host) -> None:
        host.attention.use(self.search)


@contextlib.contextmanager
def searching(target: Any, options: FitSparseVDiT) -> Iterator[Search]:
    """Measure the generations of a pipeline or transformer in the body."""
    search = Search(options)
    with apply(target, _Searching(search), count_flops=False):
        yield search


def _save(search: Search, states: Path, done: int) -> None:
    tensors = {
        "mass": {str(layer): value for layer, value in search.mass.items()},
        "errors": {str(layer): value for layer, value in search.errors.items()},
    }
    layout = search.layout
    state = {
        "counts": {str(layer): count for layer, count in search.counts.items()},
        "layout": [list(layout.grid), layout.text_length, layout.text, search.heads, search.head_dim],
    }
    checkpoint.write(states, checkpoint.Checkpoint(done, tensors, state), keep=1)


def _restore(search: Search, states: Path) -> int:
    """Sums of an earlier start; how many generations they are of."""
    saved = checkpoint.newest(states)
    if saved is None:
        return 0
    search.mass = {int(layer): value for layer, value in saved.tensors["mass"].items()}
    search.errors = {int(layer): value for layer, value in saved.tensors["errors"].items()}
    search.counts = {int(layer): count for layer, count in saved.state["counts"].items()}
    grid, text_length, text, heads, search.head_dim = saved.state["layout"]
    search.plan(TokenLayout(tuple(grid), text_length, text), heads, torch.device("cpu"))
    return saved.step
