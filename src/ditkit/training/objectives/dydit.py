"""A budget of multiply-adds: a dynamic network learns which of its parts to run.

"Dynamic Diffusion Transformer", arXiv 2410.03456, and its journal version DyDiT++, arXiv 2504.06803: beside
the loss of the network as it chooses, `weight` (mean ratio - lambda)^2 of the multiply-adds that it spends
over a batch, and the loss of the complete network, in which everything runs. lambda comes down from 1. Each
batch holds all quarters of the schedule alike, since the budget is one on average over them. The authors skip
steps whose gradient is large: `optimizer.skip_grad_norm` of the run. Their least share of tokens has weight
0; its form here, a mean over blocks and samples, is inferred. The budget is one of the whole batch; of a
batch in several accumulation steps it is one of each of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, distributed

from ditkit.data.config import Section
from ditkit.models.dydit import budget_loss
from ditkit.models.dynamic import Choosing, choosing
from ditkit.registry import Paper, register
from ditkit.training.objectives.base import Objective, Setting, Term, TrainingStep
from ditkit.training.order import BatchNoise


class DyDiTOptions(Section):
    """`flops`: lambda, the share of the blocks' multiply-adds to be spent. `weight`: of the budget's loss.
    `warmup`: updates until lambda is reached, `hold`: those before it falls at all. `complete_weight`: of the
    complete network's loss, `complete_until`: when it ends, as a share of the run, or, above 1, after so many
    updates; None: never. `quarters`: whether a batch is spread over the quarters of the schedule.
    `least_tokens`: share of tokens below which blocks are penalised with `least_tokens_weight`."""

    flops: float = Field(default=0.5, gt=0, le=1)
    weight: float = Field(default=2.0, ge=0)
    warmup: int = Field(default=1000, ge=1)
    hold: int = Field(default=100, ge=0)
    complete_weight: float = Field(default=1.0, ge=0)
    complete_until: float | None = Field(default=None, gt=0)
    quarters: bool = True
    least_tokens: float = Field(default=0.1, ge=0, le=1)
    least_tokens_weight: float = Field(default=0.0, ge=0)


def everywhere(mean: Tensor) -> Tensor:
    """The mean over all processes of a mean over each; its gradient is right once theirs are averaged."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return mean
    whole = mean.detach().clone()
    distributed.all_reduce(whole)
    return mean + whole / distributed.get_world_size() - mean.detach()


def target(options: DyDiTOptions, step: int) -> float:
    """lambda after `step` updates: 1 up to `hold`, then a straight line that starts at update 0."""
    if step < options.hold:
        return 1.0
    return 1.0 - (1.0 - options.flops) * min(1.0, step / options.warmup)


@register(
    "objective",
    "dydit",
    summary="a dynamic network spends a share of its multiply-adds, and stays whole when all of it runs",
    paper=Paper("Dynamic Diffusion Transformer", "2410.03456", 2024),
    seam=("terms", "times"),
    needs=("a dydit",),
)
class DyDiTBudget(Objective):
    Options = DyDiTOptions
    without_labels: ClassVar[bool] = True

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__(options, setting)
        if not hasattr(setting.model, "choosing"):
            raise ValueError(
                f"the blocks of a {type(setting.model).__name__} choose nothing; train a dydit, or start "
                "with `ditkit compress --method dydit`"
            )
        self.claims = frozenset({"times"} if options.quarters else ())
        self.chosen = Choosing()

    @contextlib.contextmanager
    def around(self, model: Any, draws: BatchNoise) -> Iterator[None]:
        with choosing(model, draw=draws.uniform) as self.chosen:
            yield

    def times(self, uniform: Tensor, draws: BatchNoise) -> Tensor:
        """Row j of the batch lies in quarter j mod 4."""
        return (draws.rows.to(uniform) % 4 + uniform) / 4

    def terms(self, step: TrainingStep) -> dict[str, Term]:
        options, ratio = self.options, self.chosen.ratio()
        if options.flops < self.chosen.least():
            least = self.chosen.least()
            raise ValueError(
                f"dydit.flops={options.flops}: what always runs spends {least:.3f} already; ask for more"
            )
        budget = budget_loss(everywhere(ratio.mean()), target(options, step.step))
        terms = {"budget": Term(budget, options.weight), "flops": Term(ratio.detach(), 0.0)}
        if options.least_tokens_weight and (shares := self.chosen.tokens()) is not None:
            below = (options.least_tokens - shares).clamp(min=0).mean()
            terms["least_tokens"] = Term(below, options.least_tokens_weight)
        if options.complete_weight and self.stays_whole(step):
            with choosing(step.model, complete=True):
                terms["complete"] = Term(step.again()["loss"], options.complete_weight)
        return terms

    def stays_whole(self, step: TrainingStep) -> bool:
        """Whether the complete network is still trained."""
        end = self.options.complete_until
        return end is None or (step.step < end if end > 1 else step.progress < end)
