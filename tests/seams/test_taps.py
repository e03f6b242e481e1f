"""Reading what lies inside: on every class, without a trace, and no further than asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from architectures import CASES, inputs
from ditkit.seams.anatomy import readable
from ditkit.seams.attention import attention_modules
from ditkit.seams.errors import SeamError, UnsupportedModelError
from ditkit.seams.facts import FACTS
from ditkit.seams.taps import Reading, check, hidden_after, reading
from tiny_models import output
from zoo import ZOO

GRIDLESS = {
    *(
        "StableAudioDiTModel",
        "StableAudio3DiTModel",
        "AceStepTransformer1DModel",
        "LongCatAudioDiTTransformer",
    ),
    *("MiniMaxMusic3Transformer1DModel", "MiniMaxH3Transformer3DModel"),  # sound
    *("HunyuanVideoFramepackTransformer3DModel", "HeliosTransformer3DModel"),  # frames of the past beside it
    *("SanaWMLTX2RefinerTransformer3DModel", "QwenImage21Transformer2DModel"),  # packed by lists of places
}
OURS = ("dtr", "switch-dit", "lit", "pt-dit", "dico")


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_every_class_shows_its_tokens(name: str) -> None:
    model, arguments = ZOO[name].model(), ZOO[name].inputs(batch=2)
    arguments[ZOO[name].timestep] = ZOO[name].time(2, 0.8)
    expected = output(model(**arguments))
    stacks = [stack for stack, _, _ in readable(model).blocks(model)]
    first = 1 + next(at for at, stack in enumerate(stacks) if "hidden_states" in stack.returns)
    if name in GRIDLESS:
        with pytest.raises(SeamError), reading(model, Reading(frozenset({first}))):
            model(**arguments)
        assert hooks(model) == 0
        return
    with reading(model, Reading(frozenset({first, len(stacks)}))) as inside:
        assert torch.equal(output(model(**arguments)), expected)
    frames, height, width = inside.grid
    for tokens in inside.hidden.values():
        assert tokens.shape[:2] == (2, frames * height * width), (tokens.shape, inside.grid)
    assert set(inside.hidden) == {first, len(stacks)} and hooks(model) == 0
    assert not hasattr(model, "_diffusers_hook")
    assert torch.equal(output(model(**arguments)), expected)
    early = hidden_after(model, first, lambda: model(**arguments))
    assert torch.equal(early, inside.hidden[first]) and hooks(model) == 0


@pytest.mark.parametrize("name", [n for n in ZOO if FACTS[n].refuses("attention") is None])
@torch.no_grad()
def test_every_class_shows_its_attention(name: str) -> None:
    model, arguments = ZOO[name].model(), ZOO[name].inputs(batch=2)
    arguments[ZOO[name].timestep] = ZOO[name].time(2, 0.8)
    expected = output(model(**arguments))
    layers = sum(kind != "cross" for _, kind, _ in attention_modules(model))
    with reading(model, Reading(attention=frozenset({layers}))) as inside:
        assert torch.equal(output(model(**arguments)), expected)
    logits = inside.attention[layers].logits()
    assert logits.shape[-1] == logits.shape[-2] and bool(logits.isfinite().all())
    assert not hasattr(model, "_diffusers_hook")


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_our_architectures_show_their_tokens(name: str) -> None:
    model = CASES[name].model()
    arguments = inputs(model)
    expected = model(*arguments).sample
    blocks = len(readable(model).blocks(model))
    with reading(model, Reading(frozenset(range(1, blocks + 1)))) as inside:
        assert torch.equal(model(*arguments).sample, expected)
    assert len(inside.hidden) == blocks
    for number, tokens in inside.hidden.items():
        assert tokens.shape[:2] == (2, inside.grid[1] * inside.grid[2])
        assert torch.equal(hidden_after(model, number, lambda: model(*arguments)), tokens)


@torch.no_grad()
def test_windows_are_read_in_raster_order() -> None:
    """With closed gates and proxies the tokens behind a block are those that were embedded."""
    model: Any = CASES["pt-dit"].model()
    for block in model.transformer_blocks:
        for parameter in block.parameters():
            parameter.zero_()
    model.adaln_single.linear.weight.zero_()
    model.adaln_single.linear.bias.zero_()
    latent, times, labels = inputs(model)
    with reading(model, Reading(frozenset({1}))) as inside:
        model(latent, times, labels)
    embedded = model.pos_embed(latent.unsqueeze(2))
    embedded = embedded + model.positions(tuple(embedded.shape[1:4]))
    torch.testing.assert_close(inside.hidden[1], embedded.flatten(1, 3))


def test_queries_and_keys_are_those_of_the_softmax() -> None:
    model = CASES["dtr"].model()
    block = model.blocks[1]
    attended: list[Any] = []
    hook = block.attn.register_forward_hook(lambda module, args, out: attended.append((args[0], out)))
    with reading(model, Reading(attention=frozenset({2}))) as inside:
        model(*inputs(model))
    hook.remove()
    (entered, left), seen = attended[0], inside.attention[2]
    heads = block.attn.num_heads
    value = block.attn.qkv(entered).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)[2]
    found = F.softmax(seen.logits(), dim=-1) @ value
    torch.testing.assert_close(block.attn.proj(found.transpose(1, 2).flatten(2)), left)
    assert seen.query.requires_grad and seen.logits(1).shape[1] == 1


@torch.no_grad()
def test_nothing_behind_the_block_runs() -> None:
    model = CASES["dtr"].model()
    ran: list[int] = []
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    hidden_after(model, 1, lambda: model(*inputs(model)))
    assert ran == [1]


def test_gradients_reach_what_is_read_through_gradient_checkpointing() -> None:
    model = CASES["dtr"].model().train()
    grads = []
    for on in (False, True):
        if on:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        with reading(model, Reading(frozenset({1}), frozenset({2}))) as inside:
            model(*inputs(model), force_drop_ids=torch.zeros(2, dtype=torch.long))
        (inside.hidden[1].square().mean() + inside.attention[2].logits().square().mean()).backward()
        grads.append([p.grad.clone() for p in model.blocks.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_nothing_stays_after_an_error() -> None:
    model = CASES["dtr"].model()
    with pytest.raises(ValueError), reading(model, Reading(frozenset({1}), frozenset({1}))):
        model(torch.zeros(1, 4, 7, 7), torch.zeros(1))
    assert hooks(model) == 0 and not hasattr(model, "_diffusers_hook")


@pytest.mark.parametrize(
    ("name", "what", "words"),
    [
        ("dtr", Reading(frozenset({9})), "block 9 of a DiT: it has"),
        ("dtr", Reading(frozenset({0})), "counted from 1"),
        ("dtr", Reading(attention=frozenset({9})), "attention layer 9"),
        ("lit", Reading(attention=frozenset({1})), "linear"),
        ("pt-dit", Reading(attention=frozenset({1})), "windows"),
    ],
)
def test_what_is_not_there_is_refused(name: str, what: Reading, words: str) -> None:
    with pytest.raises(SeamError, match=words):
        check(CASES[name].model(), what)


def test_classes_without_one_sequence_of_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="DiMR"):
        check(CASES["dimr"].model(), Reading(frozenset({1})))
