"""Blocks that choose how much of themselves they run: heads, groups of hidden channels, tokens.

A router scores the parts; scores become 0 and 1 (`binarise`). Training multiplies what is computed by them
(the masked form), so that the routers get gradients; inference computes only what is chosen (the sliced
form): rows of the weights, gathered tokens. Both give the same output. Samples of a batch that choose the
same parts run together, the others one group after the other, so that a sample never depends on its
neighbours.

Dimensions: B batch, T tokens, D width, H heads and groups of hidden channels, E = D/H, R hidden channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.models.layers import Attention, Mlp

# --- scores to choices --------------------------------------------------------------------------------


def binarise(scores: Tensor, noise: Tensor | None = None, temperature: float = 5.0) -> Tensor:
    """Scores to 0 and 1, of their shape.

    Args:
        scores: above 0 is more likely 1.
        noise: the difference of two Gumbel draws, like the scores: the choice is then drawn and passes the
            gradient of `sigmoid((scores + noise) / temperature)` on, so that it may be off 0 and 1 by
            rounding. None: the choice is whether the score is above 0.
        temperature: of the drawn choice's gradient.
    """
    if noise is None:
        return (torch.sigmoid(scores) > 0.5).to(scores.dtype)
    soft = torch.sigmoid((scores + noise) / temperature)
    hard = (soft > 0.5).to(soft.dtype)
    return hard - soft.detach() + soft


def logistic(uniform: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) to draws of the difference of two Gumbel variables."""
    return torch.logit(uniform, eps=1e-7)


class WidthRouter(nn.Module):
    """Scores (B, parts - 1) of a time embedding (B, D); the first part is always on.

    Raises:
        ValueError: fewer than two parts.
    """

    def __init__(self, width: int, parts: int, bias: float) -> None:
        super().__init__()
        if parts < 2:
            raise ValueError(f"num_heads={parts}: there is nothing to choose from; it takes at least 2")
        self.router = nn.Linear(width, parts - 1)
        self.start = bias

    def reset(self) -> None:
        """Everything on."""
        nn.init.xavier_uniform_(self.router.weight)
        nn.init.constant_(self.router.bias, self.start)

    def forward(self, time: Tensor) -> Tensor:
        return self.router(time)


class TokenRouter(nn.Module):
    """Scores (B, T, 1) of tokens (B, T, D), by a perceptron of a sixteenth of their width."""

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        hidden = max(width // 16, 1)
        self.mlp_head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.start = bias

    def reset(self) -> None:
        """Everything on."""
        first, _, last = self.mlp_head
        for layer in (first, last):
            nn.init.xavier_uniform_(layer.weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(first.bias)  # pyright: ignore[reportArgumentType]
        nn.init.constant_(last.bias, self.start)  # pyright: ignore[reportArgumentType]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.mlp_head(hidden_states)


# --- how a forward chooses, and what it chose -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Choice:
    """What a block chose for each sample, and what its parts cost.

    Args:
        always: multiply-adds of what runs in any case, for one sample.
        attention: of all heads.
        mlp: of all groups on all tokens.
        samples: B.
        heads, groups: (B, H); None: all run.
        tokens: (B, T, 1); None: all run.
    """

    always: float
    attention: float
    mlp: float
    samples: int
    heads: Tensor | None = None
    groups: Tensor | None = None
    tokens: Tensor | None = None

    @property
    def whole(self) -> float:
        """Multiply-adds of all parts."""
        return self.always + self.attention + self.mlp

    @property
    def least(self) -> float:
        """Multiply-adds of no more than what can't be left out."""
        least = self.always + self.attention / (1 if self.heads is None else self.heads.shape[1])
        if self.tokens is None:
            least += self.mlp / (1 if self.groups is None else self.groups.shape[1])
        return least

    @property
    def spent(self) -> Tensor:
        """Multiply-adds of the chosen parts, (B,); the gradient goes to the routers.

        `always + mean_h(heads) attention + mean_h(groups) mean_t(tokens) mlp`.
        """
        attention = _share(self.heads) * self.attention
        spent = self.always + attention + _share(self.groups) * _share(self.tokens) * self.mlp
        return torch.as_tensor(spent).expand(self.samples)


def _share(parts: Tensor | None) -> Tensor | float:
    """How much of (B, ...) is chosen, (B,)."""
    return 1.0 if parts is None else parts.float().flatten(1).mean(1)


@dataclass
class Choosing:
    """How the blocks of a model choose in a forward.

    A block asks for the same noise when it runs again in the backward pass of gradient checkpointing.

    Args:
        complete: everything runs, nothing is chosen.
        masked: compute everything and mask it in inference too.
        draw: shape -> uniform numbers (B, *shape) that the choices of training are drawn with; None: the
            process's own generator.

    Attributes:
        made: what each block chose, in running order.
    """

    complete: bool = False
    masked: bool = False
    draw: Callable[..., Tensor] | None = None
    made: dict[nn.Module, Choice] = field(default_factory=dict)
    _drawn: dict[tuple[nn.Module, str], Tensor] = field(default_factory=dict)

    def choose(self, block: nn.Module, part: str, scores: Tensor, temperature: float) -> Tensor:
        """The choice of scores (B, ...): drawn when the block is in training, else the likelier one."""
        if not block.training:
            return binarise(scores)
        key = (block, part)
        if key not in self._drawn:
            shape = scores.shape[1:]
            uniform = (
                torch.rand(scores.shape, device=scores.device) if self.draw is None else self.draw(*shape)
            )
            self._drawn[key] = logistic(uniform).to(scores)
        return binarise(scores, self._drawn[key], temperature)

    def ratio(self) -> Tensor:
        """Multiply-adds of the chosen parts over those of all, of each sample, (B,).

        Raises:
            ValueError: no block chose anything.
        """
        if not self.made:
            raise ValueError("no block has chosen: the model is not dynamic, or was not run")
        spent = torch.stack([choice.spent for choice in self.made.values()]).sum(0)
        return spent / sum(choice.whole for choice in self.made.values())

    def least(self) -> float:
        """What `ratio` can't fall below."""
        return sum(c.least for c in self.made.values()) / sum(c.whole for c in self.made.values())

    def tokens(self) -> Tensor | None:
        """The share of tokens that each block chose for each sample, (B, N); None where all always run."""
        shares = [c.tokens.mean((1, 2)) for c in self.made.values() if c.tokens is not None]
        return torch.stack(shares, 1) if shares else None


@contextlib.contextmanager
def choosing(model: Any, **options: Any) -> Iterator[Choosing]:
    """The forwards of a dynamic model inside choose as `Choosing(**options)` says and are noted there.

    Raises:
        TypeError: a model whose blocks choose nothing.
    """
    if not hasattr(model, "choosing"):
        raise TypeError(f"the blocks of a {type(model).__name__} choose nothing: make it dynamic first")
    before, model.choosing = model.choosing, Choosing(**options)
    try:
        yield model.choosing
    finally:
        model.choosing = before


# --- layers in both forms -------------------------------------------------------------------------------


def together(choice: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Samples that choose the same parts: their rows (b,), None for all; the parts (K,), None for all.

    Args:
        choice: (B, H), about 0 and 1.
    """
    if choice.is_meta:  # counted without memory: everything
        yield None, None
        return
    on = choice > 0.5
    if bool((on == on[:1]).all()):
        yield None, None if bool(on[0].all()) else on[0].nonzero()[:, 0]
        return
    kinds, kind = on.unique(dim=0, return_inverse=True)
    for index, parts in enumerate(kinds):
        yield (kind == index).nonzero()[:, 0], None if bool(parts.all()) else parts.nonzero()[:, 0]


def by_rows(choice: Tensor, hidden_states: Tensor, run: Callable[[Tensor, Any, Any], Tensor]) -> Tensor:
    """`run(rows of the states, parts, rows)` for samples that choose alike, put together: like the states."""
    output = None
    for rows, parts in together(choice):
        if rows is None:
            return run(hidden_states, parts, rows)
        if output is None:
            output = torch.empty_like(hidden_states)
        output[rows] = run(hidden_states[rows], parts, rows).to(output.dtype)
    assert output is not None
    return output


class DynamicAttention(Attention):
    """Self-attention in which a sample runs some heads only: those that do not run add nothing."""

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        heads: Tensor | None = None,
        masked: bool = False,
    ) -> Tensor:
        """Tokens (B, T, D) and chosen heads (B, H) to (B, T, D); the mask as of `Attention`."""
        if heads is None:
            return super().forward(hidden_states, mask)
        if masked:
            attended = self.attend(hidden_states, mask, self.qkv.weight, self.qkv.bias)
            return self.proj((attended * heads[:, None, :, None]).flatten(2))
        return by_rows(heads, hidden_states, lambda x, parts, rows: self.sliced(x, parts, rows, mask))

    def attend(
        self, hidden_states: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """(B, T, D) to (B, T, K, E), of the K heads in a projection (3 K E, D)."""
        width = hidden_states.shape[-1] // self.num_heads
        qkv = F.linear(hidden_states, weight, bias).unflatten(2, (3, -1, width))  # (B, T, 3, K, E)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, K, T, E)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    def sliced(
        self, hidden_states: Tensor, heads: Tensor | None, rows: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Samples (b, T, D) that run the same heads (K,)."""
        if mask is not None and rows is not None and mask.shape[0] > 1:
            mask = mask[rows]
        if heads is None:
            return super().forward(hidden_states, mask)
        width = self.proj.in_features
        weight = self.qkv.weight.view(3, self.num_heads, -1, width)[:, heads].reshape(-1, width)
        bias = self.qkv.bias
        if bias is not None:
            bias = bias.view(3, self.num_heads, -1)[:, heads].flatten()
        attended = self.attend(hidden_states, mask, weight, bias)  # (b, T, K, E)
        out = self.proj.weight.view(width, self.num_heads, -1)[:, heads].flatten(1)  # (D, K E)
        return F.linear(attended.flatten(2), out, self.proj.bias)


class DynamicMlp(Mlp):
    """A perceptron of which a sample runs some groups of hidden channels, on some tokens: 0 on the others."""

    def __init__(self, width: int, hidden_width: int, groups: int) -> None:
        super().__init__(width, hidden_width)
        if hidden_width % groups:
            raise ValueError(f"{hidden_width} hidden channels can't be split in {groups} groups")
        self.groups = groups

    def forward(
        self,
        hidden_states: Tensor,
        groups: Tensor | None = None,
        tokens: Tensor | None = None,
        masked: bool = False,
    ) -> Tensor:
        """Tokens (B, T, D), chosen groups (B, H) and tokens (B, T, 1) to (B, T, D)."""
        if masked:
            hidden = self.fc1(hidden_states)
            if groups is not None:
                hidden = (hidden.unflatten(-1, (self.groups, -1)) * groups[:, None, :, None]).flatten(-2)
            output = self.fc2(self.act(hidden))
            return output if tokens is None else output * tokens

        def run(samples: Tensor, parts: Tensor | None, rows: Tensor | None) -> Tensor:
            chosen = tokens if tokens is None or rows is None else tokens[rows]
            return on_tokens(chosen, samples, lambda x: self.sliced(x, parts))

        if groups is None:
            return run(hidden_states, None, None)
        return by_rows(groups, hidden_states, run)

    def sliced(self, hidden_states: Tensor, groups: Tensor | None) -> Tensor:
        """States (..., D) through the groups (K,)."""
        if groups is None:
            return super().forward(hidden_states)
        width = self.fc1.in_features
        first = self.fc1.weight.view(self.groups, -1, width)[groups].flatten(0, 1)  # (K R/H, D)
        bias = self.fc1.bias.view(self.groups, -1)[groups].flatten()
        last = self.fc2.weight.view(width, self.groups, -1)[:, groups].flatten(1)  # (D, K R/H)
        return F.linear(self.act(F.linear(hidden_states, first, bias)), last, self.fc2.bias)


def on_tokens(tokens: Tensor | None, hidden_states: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run` on the chosen tokens (B, T, 1) of (B, T, D) alone, gathered as (1, K, D); 0 for the others."""
    chosen = None if tokens is None or tokens.is_meta else tokens.flatten() > 0.5
    if chosen is None or bool(chosen.all()):
        return run(hidden_states)
    places = chosen.nonzero()[:, 0]
    states = run(hidden_states.flatten(0, 1).index_select(0, places)[None])[0]  # (K, D)
    output = states.new_zeros(hidden_states.shape[0] * hidden_states.shape[1], states.shape[-1])
    return output.index_copy_(0, places, states).unflatten(0, hidden_states.shape[:2])
