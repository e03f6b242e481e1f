"""Keys and values kept from step to step."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.seams.attention import Dense
from ditkit.seams.errors import SeamError
from ditkit.seams.keys import KeyPolicy
from ditkit.seams.steps import Step
from ditkit.seams.tokens import TokenChoice
from tiny_models import TINY, Tiny, output

every_class = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())


class Some(TokenChoice, KeyPolicy):
    """Runs all tokens at first, then those at given places; also the method that does so."""

    claims: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __init__(self, indices: Tensor, reach: float | None = None, strategy: Any = None) -> None:
        self.indices, self.reach, self.strategy = indices, reach, strategy
        self.all = True
        self.at = 0.0
        self.host: Any = None

    def attach(self, host: Any) -> None:
        self.host = host
        if self.strategy is not None:
            host.attention.use(self.strategy)
        host.tokens.choose(self)
        host.attention.keep_keys(self)

    def select(self, step: Step, hidden_states: Tensor) -> Tensor | None:
        return None if self.all else self.indices

    def keys(self) -> Literal["pass", "keep"]:
        return "keep"

    def level(self) -> float:
        return self.at


@torch.no_grad()
def second(tiny: Tiny, method: Some, batch: int = 2, **changed: Any) -> tuple[Tensor, Tensor]:
    """Outputs of a step over all tokens and of one over some, with equal inputs unless changed."""
    model, inputs = tiny.model(), tiny.inputs(batch)
    with ditkit.apply(model, method):
        dense = output(model(**inputs))
        method.all = False
        return dense, output(model(**{**inputs, **next_step(tiny, inputs), **changed}))


def next_step(tiny: Tiny, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The next smaller timestep: another step, and as good as the same time."""
    time = inputs[tiny.timestep]
    return {tiny.timestep: torch.nextafter(time, torch.zeros_like(time))}


@every_class
def test_with_equal_inputs_some_tokens_see_what_all_saw(tiny: Tiny) -> None:
    """The output at the chosen tokens is the dense one: they read all keys, in their right places."""
    chosen = torch.tensor([11, 1, 6, 5])
    dense, partial = second(tiny, Some(chosen))
    differs = (dense - partial).abs() > 1e-5
    if dense.ndim == 3:
        assert not differs[:, chosen].any()
    # Elsewhere the head works on what entered the blocks; as large as the share of tokens left out.
    assert 0.2 < float(differs.float().mean()) <= 12 / 16


@every_class
def test_a_strategy_gets_the_whole_grid(tiny: Tiny) -> None:
    seen: list[tuple[int, int, int]] = []

    class Look(Dense):
        def attend(self, q, k, v, mask, scale, call, plan):
            seen.append((q.shape[2], k.shape[2], call.layout.length))
            return super().attend(q, k, v, mask, scale, call, plan)

    chosen = torch.tensor([11, 1, 6, 5])
    _, alone = second(tiny, Some(chosen))
    _, together = second(tiny, Some(chosen, strategy=Look()))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert seen
    assert all(len(set(lengths)) == 1 for lengths in seen)


def test_samples_have_their_own_rows() -> None:
    for name in ("FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"):
        tiny = TINY[name]
        both = torch.tensor([[3, 1, 2], [9, 8, 15], [3, 1, 2]])
        inputs = {"hidden_states": tiny.inputs(3, seed=5)["hidden_states"]}
        _, together = second(tiny, Some(both), 3, **inputs)
        for row in range(3):
            _, alike = second(tiny, Some(both[row]), 3, **inputs)
            torch.testing.assert_close(together[row], alike[row], atol=1e-5, rtol=1e-5)


def test_lines_are_continued() -> None:
    """Where keys and values change evenly, those of tokens that do not run are read as if they had run."""
    tiny = TINY["FluxTransformer2DModel"]
    model = tiny.model()
    method = Some(torch.arange(4), reach=0.75)
    read: list[tuple[Tensor, Tensor]] = []

    class Look(Dense):
        def attend(self, q, k, v, mask, scale, call, plan):
            if call.layer == 0:
                read.append((k.clone(), v.clone()))
            return super().attend(q, k, v, mask, scale, call, plan)

    method.strategy = Look()
    with torch.no_grad(), ditkit.apply(model, method):
        for at in (1.0, 0.5):
            method.at = at
            model(**tiny.inputs(seed=int(2 * at), noise=at))
        for at in (0.25, 0.0):  # the second one is beyond the reach
            method.all, method.at = False, at
            model(**tiny.inputs(seed=3, noise=at))
    image = slice(5 + 4, None)  # after the text and the tokens that ran
    for part in (0, 1):
        first, last, half, far = (pair[part][:, :, image] for pair in read)
        torch.testing.assert_close(half, last + (last - first) / 2)
        torch.testing.assert_close(far, last + 0.75 * (last - first))


def test_every_generation_begins_with_nothing() -> None:
    tiny = TINY["FluxTransformer2DModel"]
    model, inputs = tiny.model(), tiny.inputs()
    method = Some(torch.arange(4))
    with torch.no_grad(), ditkit.apply(model, method) as run:
        model(**inputs)
        kept = method.host.attention.kept
        layers = method.host.attention.layers
        assert kept.holds("0", layers)
        # Keys and values, 2 x 16 wide, of 5 + 16 tokens.
        assert kept.nbytes() == layers * 2 * 21 * 32 * 4
        run.restart()
        assert kept.nbytes() == 0
        method.all = False
        with pytest.raises(SeamError, match=r"transformer_blocks.0.attn: no keys were kept"):
            model(**inputs)
    assert method.host.attention.kept is None


def test_one_method_keeps_keys() -> None:
    tiny = TINY["FluxTransformer2DModel"]

    class Twice(Some):
        def attach(self, host: Any) -> None:
            super().attach(host)
            host.attention.keep_keys(self)

    with pytest.raises(SeamError, match="are kept already"):
        ditkit.apply(tiny.model(), Twice(torch.arange(4)))
