"""What a run did, counted: forwards computed and forecast, FLOPs, bytes cached, seconds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ditkit.seams.cost import ModelCost
from ditkit.seams.layout import TokenLayout


@dataclass
class Count:
    """FLOPs of one forward: as it ran, as it would have with dense attention, and that attention's alone."""

    flops: int = 0
    dense: int = 0
    attention: int = 0


@dataclass
class _Open:
    """A forward that is being counted."""

    mode: FlopCounterMode
    unseen: int = 0
    spared: int = 0
    attention_elsewhere: int = 0

    def total(self) -> int:
        return int(self.mode.get_total_flops()) + self.unseen

    def attention(self) -> int:
        return attention_of(self.mode)


_counting: ContextVar[_Open | None] = ContextVar("ditkit_counting", default=None)


def _attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """torch counts the attention kernels of GPUs only; shapes (B, heads, L, D)."""
    return sdpa_flop_count(query, key, value)


_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}


def flop_counter() -> FlopCounterMode:
    """torch's counter, taught the CPU attention kernel."""
    return FlopCounterMode(display=False, custom_mapping=dict(_ON_CPU))


def attention_of(mode: FlopCounterMode) -> int:
    """What a counter saw of attention: its kernels, and products of batches, which only attention makes."""
    seen = mode.get_flop_counts().get("Global", {})
    return sum(flops for op, flops in seen.items() if "attention" in str(op) or str(op).endswith("bmm"))


def unseen(flops: int) -> None:
    """Tell the counter of work that it can't see, e.g. a compiled kernel. Does nothing when none counts."""
    current = _counting.get()
    if current is not None:
        current.unseen += flops


@contextmanager
def stands_for(dense_flops: int) -> Iterator[None]:
    """What runs inside replaces work of `dense_flops` in the dense model."""
    current = _counting.get()
    if current is None:
        yield
        return
    before, attention = current.total(), current.attention()
    yield
    current.spared += dense_flops - (current.total() - before)
    current.attention_elsewhere += dense_flops - (current.attention() - attention)


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """FLOPs of dense attention, shapes (B, heads, L, D)."""
    return sdpa_flop_count(tuple(query), tuple(key), tuple(value))


@contextmanager
def counting() -> Iterator[Count]:
    """Count the FLOPs of what runs inside; the result is filled in at the end."""
    count = Count()
    mode = flop_counter()
    current = _Open(mode)
    token = _counting.set(current)
    try:
        with mode:
            yield count
    finally:
        _counting.reset(token)
    count.flops = current.total()
    count.dense = count.flops + current.spared
    count.attention = current.attention() + current.attention_elsewhere


@dataclass
class Stats:
    """Counters of one model while methods are applied to it.

    Forwards of one kind (same input shapes, same modules run) cost the same FLOPs, so each kind is counted
    once and multiplied. A seam that changes the work of a forward adds to `modes` a function that tells, at
    the start of a forward, how this one will run. Where the model's own work `varies`, each forward is a kind
    of its own: (what the modes tell, its number).
    """

    count_flops: bool = True
    varies: bool = False
    steps: int = 0
    steps_computed: int = 0
    generations: int = 0
    seconds: float = 0.0
    bytes_cached: int = 0
    branches: dict[str, Counter[str]] = field(default_factory=dict)
    kinds: dict[tuple[Hashable, Any], Count] = field(default_factory=dict)
    forwards: Counter[tuple[Hashable, Any]] = field(default_factory=Counter)
    dense_kind: dict[Hashable, Any] = field(default_factory=dict)
    densities: list[tuple[float, int]] = field(default_factory=list)
    token_shares: list[float] = field(default_factory=list)
    modes: list[Callable[[], Hashable]] = field(default_factory=list)
    computed_at: list[int] = field(default_factory=list)
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    _holders: list[Callable[[], int]] = field(default_factory=list)
    _step: tuple[int, int] | None = None
    _step_computed: bool = False
    _series_of: int = -1

    def holds(self, size: Callable[[], int]) -> None:
        """Register a function that tells how many bytes a method holds right now."""
        self._holders.append(size)

    def measure(self) -> None:
        """Update the most bytes held at one time."""
        if self._holders:
            self.bytes_cached = max(self.bytes_cached, sum(size() for size in self._holders))

    def record(self, name: str, generation: int, index: int, value: float) -> None:
        """Note a figure of a step that a method decided by; those of the last generation are kept."""
        if generation != self._series_of:
            self._series_of, self.series = generation, {}
        self.series.setdefault(name, {})[index] = value

    def attended(self, density: float, calls: int = 1) -> None:
        """Note that attention calls computed this share of their query-key pairs, 0 to 1."""
        self.densities.append((density, calls))

    def ran(self, share: float) -> None:
        """Note the share of the image tokens, 0 to 1, that a forward ran on."""
        self.token_shares.append(share)

    def forward(
        self, step: tuple[int, int], branch: str, computed: bool, shapes: Hashable, kind: Hashable
    ) -> None:
        """Note one finished forward; `step` is its generation and index, `kind` tells how it ran."""
        if step != self._step:
            if self._step is None or step[0] != self._step[0]:
                self.computed_at = []
            self._step, self._step_computed = step, False
            self.steps += 1
        if computed and not self._step_computed:
            self._step_computed = True
            self.steps_computed += 1
            self.computed_at.append(step[1])
        self.branches.setdefault(branch, Counter())["computed" if computed else "forecast"] += 1
        self.forwards[shapes, kind] += 1
        if computed:
            self.dense_kind.setdefault(shapes, kind)

    def misses(self, shapes: Hashable) -> bool:
        """Has a forward of these shapes run in a way that was not counted? How a forward runs may be decided
        in its midst; then the next ones are counted until that way comes again."""
        return any(key[0] == shapes and key not in self.kinds for key in self.forwards)

    def flops(self) -> tuple[int, int] | None:
        """FLOPs of all forwards as they ran and as the dense model would have; None when not counted."""
        if not self.count_flops or any(key not in self.kinds for key in self.forwards):
            return None
        ran = dense = 0
        for (shapes, kind), number in self.forwards.items():
            ran += number * self.kinds[shapes, kind].flops
            dense += number * self._dense(shapes, kind)
        return ran, dense

    def _dense(self, shapes: Hashable, kind: Any) -> int:
        """FLOPs of the dense model in a forward's place. What a model that varies would have chosen where a
        method left something out is not known: the mean of its full forwards stands for it."""
        first = self.dense_kind.get(shapes, kind)
        if not self.varies:
            return (self.kinds.get((shapes, first)) or self.kinds[shapes, kind]).dense
        if kind[0] == first[0]:
            return self.kinds[shapes, kind].dense
        full = [count.dense for key, count in self.kinds.items() if (key[0], key[1][0]) == (shapes, first[0])]
        return round(sum(full) / len(full))

    def cost(self, steps: int, layout: TokenLayout | None = None) -> ModelCost | None:
        """What a dense forward takes, by what was counted; None when no full one was.

        What a skipped forward took stands for what lies outside of the blocks.
        """
        full = [(key[0], self.kinds[key]) for key in self.dense_kind.items() if key in self.kinds]
        if not full:
            return None
        shapes, most = max(full, key=lambda pair: pair[1].dense)
        rest = [
            count.flops for key, count in self.kinds.items() if key[0] == shapes and count.flops < most.flops
        ]
        return ModelCost(
            steps,
            most.dense,
            most.attention,
            min(rest, default=0),
            grid=None if layout is None else layout.grid,
            text_length=0 if layout is None else layout.joint_text_length,
        )


@dataclass
class Report:
    """What happened since methods were applied, over all generations.

    Args:
        steps: denoising steps seen; `steps_computed + steps_forecast`.
        steps_computed: steps in which the transformer's blocks ran for at least one guidance branch.
        branches: forwards for each guidance branch, computed and forecast.
        flops: counted floating-point operations of the transformer; None when they were not counted.
        flops_dense: the same for the model without methods.
        bytes_cached: the most bytes that methods held between steps at one time.
        seconds: wall time inside the transformer's forward.
        density: mean share of query-key pairs that replaced attention calls computed; None without any.
        tokens: mean share of the image tokens that forwards ran on; None where no method chooses tokens.
        notes: plain words, e.g. why a method could not help here.
        computed_at: indices of the steps that the last generation computed.
        series: figures by which a method decided in the last generation: name -> step index -> value.
        ceilings: method -> at most so many times fewer FLOPs, by its own counts for this model, size and
            number of steps; `ditkit.seams.cost` has the formulas.
    """

    methods: list[str]
    generations: int
    steps: int
    steps_computed: int
    steps_forecast: int
    branches: dict[str, dict[str, int]]
    flops: int | None
    flops_dense: int | None
    bytes_cached: int
    seconds: float
    density: float | None
    notes: list[str]
    tokens: float | None = None
    computed_at: list[int] = field(default_factory=list)
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def flops_saved(self) -> float | None:
        """Share of the dense model's FLOPs that was not spent, 0 to 1."""
        if self.flops is None or not self.flops_dense:
            return None
        return 1 - self.flops / self.flops_dense

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "flops_saved": self.flops_saved}

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the table."""
        rows = [
            ("methods", ", ".join(self.methods) or "none"),
            ("generations", str(self.generations)),
            ("steps", f"{self.steps_computed} computed + {self.steps_forecast} forecast = {self.steps}"),
        ]
        if self.flops is not None and self.flops_dense:
            ratio = self.flops_dense / max(self.flops, 1)
            rows.append(("FLOPs", f"{self.flops:.3e} of {self.flops_dense:.3e} dense ({ratio:.2f}x fewer)"))
        if self.tokens is not None:
            rows.append(("tokens", f"{100 * self.tokens:.1f} % of the image tokens ran"))
        rows += [("ceiling", f"{most:.2f}x fewer with {name}") for name, most in self.ceilings.items()]
        rows.append(("cached", f"{self.bytes_cached / 2**20:.2f} MiB at most"))
        rows.append(("seconds", f"{self.seconds:.3f} in the transformer"))
        if self.density is not None:
            rows.append(("attention", f"{100 * self.density:.1f} % of query-key pairs read"))
        return rows

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        lines = [f"{label:<{width}}  {value}" for label, value in self.rows()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(show_header=False, title="run")
        for row in self.rows():
            table.add_row(*row)
        for note in self.notes:
            table.add_row("note", note)
        return table


def combine(stats: list[Stats], methods: list[str], notes: list[str]) -> Report:
    """One report on all models of a run."""
    flops = [one.flops() for one in stats]
    counted = [pair for pair in flops if pair is not None]
    branches: dict[str, Counter[str]] = {}
    for one in stats:
        for branch, counts in one.branches.items():
            branches.setdefault(branch, Counter()).update(counts)
    densities = [pair for one in stats for pair in one.densities]
    calls = sum(number for _, number in densities)
    shares = [share for one in stats for share in one.token_shares]
    steps = sum(one.steps for one in stats)
    computed = sum(one.steps_computed for one in stats)
    return Report(
        methods=methods,
        generations=max((one.generations for one in stats), default=0),
        steps=steps,
        steps_computed=computed,
        steps_forecast=steps - computed,
        branches={
            branch: {key: counts[key] for key in ("computed", "forecast")}
            for branch, counts in branches.items()
        },
        flops=sum(pair[0] for pair in counted) if len(counted) == len(stats) else None,
        flops_dense=sum(pair[1] for pair in counted) if len(counted) == len(stats) else None,
        bytes_cached=sum(one.bytes_cached for one in stats),
        seconds=sum(one.seconds for one in stats),
        density=sum(density * number for density, number in densities) / calls if calls else None,
        notes=notes,
        tokens=sum(shares) / len(shares) if shares else None,
        computed_at=sorted({index for one in stats for index in one.computed_at}),
        series={name: values for one in stats for name, values in one.series.items()},
    )
