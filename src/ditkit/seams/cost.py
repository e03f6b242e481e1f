"""What a model's forward is made of, and so how much a method can save at most.

Three ways to save: not to run the blocks at some steps, to read fewer query-key pairs, to run fewer tokens.
Each has a ceiling that follows from counts alone, whatever the implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LITTLE = 1.1
"""A ceiling below which a method is not worth trying: what it adds takes what it saves."""


@dataclass(frozen=True)
class ModelCost:
    """What one dense forward takes, in any one unit: floating-point operations, or seconds.

    Args:
        steps: denoising steps of a generation.
        whole: one forward.
        attention: of it, the softmax attention of image tokens (scores and values).
        outside: of it, what lies outside of the blocks: embeddings, modulation, head. It runs at skipped
            steps too.
        block: of it, one block; 0 where that is not known.
        grid: (F, H, W) in tokens, None where the tokens are no grid.
        text_length: text tokens in the attention sequence.
    """

    steps: int
    whole: float
    attention: float = 0.0
    outside: float = 0.0
    block: float = 0.0
    grid: tuple[int, int, int] | None = None
    text_length: int = 0

    @property
    def attention_share(self) -> float:
        """a: attention's share of a forward, 0 to 1."""
        return self.attention / self.whole if self.whole else 0.0

    def skipping(self, computed: int, blocks: float = 0) -> float:
        """At most so many times less, when only `computed` steps run all blocks.

        With full steps a share 1/N and a skipped step costing c of a full one: 1 / (1/N + (1 - 1/N) c).

        Args:
            computed: full steps of a generation, 1 to `steps`.
            blocks: so many blocks run at the other steps too.
        """
        share = min(max(computed, 1), self.steps) / self.steps
        cost = min((self.outside + blocks * self.block) / self.whole, 1.0) if self.whole else 0.0
        return 1 / (share + (1 - share) * cost)

    def sparse(self, density: float) -> float:
        """At most so many times less, when attention reads this share of its pairs: 1 / (1 - a + a d)."""
        return 1 / (1 - self.attention_share * (1 - density))

    def on_tokens(self, share: float, computed: float = 0.0) -> float:
        """At most so many times less, when the blocks run on a share of the tokens.

        Args:
            share: of the tokens, at the steps that do not run all.
            computed: share of the steps that run all tokens.
        """
        inside = 1 - self.outside / self.whole if self.whole else 1.0
        kept = computed + (1 - computed) * share
        return 1 / (1 - inside * (1 - kept))


def ceiling(method: Any, cost: ModelCost) -> float | None:
    """At most so many times less work with a method, by its own counts; None when it gives none.

    A method may offer `ceiling(cost)`. Else its `computed_steps(num_steps)` or `density(grid, text_length)`
    is read.
    """
    if hasattr(method, "ceiling"):
        return method.ceiling(cost)
    if hasattr(method, "computed_steps"):
        return cost.skipping(method.computed_steps(cost.steps))
    if hasattr(method, "density") and cost.grid is not None:
        return cost.sparse(method.density(cost.grid, cost.text_length))
    return None


def together(methods: Any, cost: ModelCost) -> float | None:
    """The ceiling of methods that are applied together: the product of theirs; None when none gives one.

    Savings at steps, tokens and pairs multiply at best.
    """
    known = [found for found in (ceiling(method, cost) for method in methods) if found is not None]
    product = 1.0
    for found in known:
        product *= found
    return product if known else None


def words(cost: ModelCost) -> str | None:
    """Why sparse attention can't pay on this model, when it can't."""
    most = cost.sparse(0.0)
    if not cost.attention or most >= LITTLE:
        return None
    tokens = "" if cost.grid is None else f" at {_tokens(cost)} tokens"
    return (
        f"attention is {100 * cost.attention_share:.0f} % of this model's FLOPs{tokens}, too little for "
        f"sparse attention to pay: with no pair read at all it could be {most:.2f} times faster"
    )


def _tokens(cost: ModelCost) -> int:
    frames, height, width = cost.grid or (0, 0, 0)
    return frames * height * width + cost.text_length
