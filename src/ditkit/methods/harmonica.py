"""HarmoniCa: a learned table tells, for each step and module, whether to compute or to reuse.

"HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in Diffusion Transformer
Acceleration", arXiv 2410.01723. For every step and every attention and feed-forward module a score is learned
along the real denoising path (`ditkit.fitting.harmonica`). Where it is above a threshold the module runs;
elsewhere its last output is taken again, before the gate, and modulation and gates are those of the step. The
table does not look at the picture, so it costs nothing, and it belongs to one model, one number of steps and
one scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ditkit import artifact
from ditkit.registry import Choice, Paper, Search, register
from ditkit.seams.apply import Host
from ditkit.seams.blocks import Outputs, UnitCache, UnitRef
from ditkit.seams.cost import ModelCost
from ditkit.seams.errors import SeamError
from ditkit.seams.extrapolate import owned
from ditkit.seams.steps import Step

Table = tuple[tuple[bool, ...], ...]


@register(
    "method",
    "harmonica",
    summary="reuse module outputs where a learned table of steps and modules says so",
    paper=Paper(
        "HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in Diffusion Transformer "
        "Acceleration",
        "2410.01723",
        2024,
    ),
    seam=("blocks",),
    needs=("training",),
    neutral={"uniform": 1},
)
@dataclass(frozen=True)
class HarmoniCa:
    """Reuse the outputs of modules by a table. Exactly one of `weights`, `mask` and `uniform` is needed.

    Args:
        weights: folder that `ditkit fit harmonica` made.
        threshold: in [0, 1); a module runs where its learned score is above it. None: the one that the table
            was learned with, 0.1 by the authors.
        mask: a table of one's own, (T, U) true values for "compute"; T steps from the noisiest on, U modules
            in running order (two for each block of a DiT: attention, MLP).
        uniform: the plain rule that a learned table has to beat: compute all at every so-many-th step, for
            any number of steps.

    Raises:
        ValueError: an option out of range, or more than one of the three.
    """

    weights: str | None = None
    threshold: float | None = None
    mask: Sequence[Sequence[bool]] | Tensor | None = field(default=None, repr=False)
    uniform: int | None = None

    claims: ClassVar[frozenset[str]] = frozenset({"blocks"})
    search: ClassVar[Search] = {"threshold": Choice((None, 0.05, 0.2, 0.4))}

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be in [0, 1) or None; got {self.threshold!r}")
        given = [name for name in ("weights", "mask", "uniform") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"only one of weights, mask and uniform can be given; got {' and '.join(given)}")
        if self.uniform is not None and (not isinstance(self.uniform, int) or self.uniform < 1):
            raise ValueError(f"uniform must be a whole number of at least 1; got {self.uniform!r}")
        if self.mask is not None:
            object.__setattr__(self, "mask", _as_table(self.mask))

    def computed_steps(self, num_steps: int) -> int:
        """In how many steps of a generation at least one module runs.

        Raises:
            SeamError: the table is for another number of steps, or there is none.
        """
        if self.uniform is not None:
            return -(-num_steps // self.uniform)
        table = self.table()
        _check_steps(len(table), num_steps)
        return sum(any(row) for row in table)

    def ceiling(self, cost: ModelCost) -> float:
        """At most so many times less work, if all modules of a block take the same."""
        if self.uniform is not None:
            return cost.skipping(self.computed_steps(cost.steps))
        table = self.table()
        share = sum(map(sum, table)) / (len(table) * len(table[0]))
        return 1 / (share + (1 - share) * cost.outside / cost.whole)

    def table(self) -> Table:
        """The table (T, U), true where a module runs.

        Raises:
            SeamError: there is none, since none was learned or since `uniform` needs none.
            FileNotFoundError, ArtifactError: `weights` names no fit of this method.
        """
        if self.mask is not None:
            return self.mask  # type: ignore[return-value]
        if self.weights is None:
            raise SeamError(f"HarmoniCa has no learned table. {_HOW}")
        learned = artifact.load(self.weights, "harmonica")
        threshold = learned.options["threshold"] if self.threshold is None else self.threshold
        return table_of(learned.tensors["logits"], threshold)

    def attach(self, host: Host) -> None:
        """Own the modules of the host's blocks.

        Raises:
            SeamError: no table, or one of another model.
        """
        model, table, scheduler = type(host.model).__name__, None, None
        if self.uniform is None:
            if self.mask is None and self.weights is None:
                raise SeamError(f"HarmoniCa has no learned table for this {model}. {_HOW}")
            if self.weights is not None:
                learned = artifact.load(self.weights, "harmonica")
                learned.check(host.model)
                scheduler = learned.options.get("scheduler")
            table, units = self.table(), len(host.blocks.units)
            if len(table[0]) != units:
                raise SeamError(
                    f"the table of HarmoniCa has {len(table[0])} modules, this {model} has {units}. {_HOW}"
                )
        cache = _Reuse(self.uniform or 1, table, scheduler)
        host.clock.on_reset(cache.kept.clear)
        host.stats.holds(cache.nbytes)
        host.note(lambda: cache.notes(host))
        host.blocks.cache_units(cache)


_HOW = (
    "Learn one with `ditkit fit harmonica --model ... --out FOLDER` and give weights=FOLDER, or a table by "
    "mask=, or the plain rule uniform=2"
)


class _Reuse(UnitCache):
    """The last outputs of modules, for each guidance branch."""

    def __init__(self, uniform: int, table: Table | None, scheduler: str | None) -> None:
        self.kept: dict[tuple[str, int], Outputs] = {}
        self._uniform = uniform
        self._table = table
        self._scheduler = scheduler
        self._computed = self._reused = 0

    def runs(self, index: int, unit: int) -> bool:
        if self._table is None:
            return index % self._uniform == 0
        return self._table[index][unit]

    def replaced(self, step: Step, units: Sequence[UnitRef]) -> Sequence[bool]:
        if self._table is not None:
            _check_steps(len(self._table), step.num_steps, step.index)
        replaced = [
            not self.runs(step.index, unit.index) and (step.branch, unit.index) in self.kept for unit in units
        ]
        self._reused += sum(replaced)
        self._computed += len(units) - sum(replaced)
        return replaced

    def store(self, step: Step, unit: UnitRef, outputs: Outputs) -> None:
        """Keep the outputs if the next step will take them again."""
        at = step.index + 1
        ends = self._table is not None and at >= len(self._table)
        if ends or self.runs(at, unit.index):
            self.kept.pop((step.branch, unit.index), None)
        else:
            self.kept[step.branch, unit.index] = tuple(owned(output.detach()) for output in outputs)

    def recall(self, step: Step, unit: UnitRef) -> Outputs:
        return self.kept[step.branch, unit.index]

    def nbytes(self) -> int:
        return sum(output.nbytes for outputs in self.kept.values() for output in outputs)

    def notes(self, host: Host) -> list[str]:
        total = self._computed + self._reused
        if not total:
            return ["HarmoniCa: the transformer was not called."]
        if self._reused:
            found = [f"HarmoniCa: {self._reused} of {total} module outputs were reused."]
        else:
            found = ["HarmoniCa: the table computes every module at every step; nothing can be saved."]
        here = type(getattr(host.pipeline, "scheduler", None)).__name__
        if host.pipeline is not None and self._scheduler not in (None, here):
            found.append(
                f"HarmoniCa: the table was learned with {self._scheduler}, this pipeline has {here}; learn "
                "one for it."
            )
        return found


def table_of(logits: Tensor, threshold: float) -> Table:
    """The table (T, U) of learned logits (T, U): compute where the score is above the threshold."""
    return _as_table(logits.sigmoid() > threshold)


def _as_table(mask: Sequence[Sequence[bool]] | Tensor) -> Table:
    rows = torch.as_tensor(mask).tolist()
    if not rows or not isinstance(rows[0], list) or not rows[0]:
        raise ValueError(
            "mask must be a table of steps and modules (T, U); got shape "
            f"{tuple(torch.as_tensor(mask).shape)}"
        )
    return tuple(tuple(bool(entry) for entry in row) for row in rows)


def _check_steps(steps: int, num_steps: int | None, index: int = 0) -> None:
    if index < steps and num_steps in (None, steps):
        return
    asked = f"{num_steps} steps" if num_steps is not None else f"more than {steps} steps"
    raise SeamError(
        f"the table of HarmoniCa is for {steps} steps, this generation has {asked}. Sample with {steps} "
        "steps, or learn a table for these: `ditkit fit harmonica --set steps=...`"
    )
