"""Dynamic networks: masked and sliced, alone and in a batch, what is counted, what they start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import CASES, inputs
from ditkit import models
from ditkit.analysis.meter import count
from ditkit.models import dydit_flux
from ditkit.models.dit import DiT, SiT
from ditkit.models.dydit import DyDiT, DySiT, inherit, multiply_adds
from ditkit.models.dynamic import (
    Choosing,
    DynamicAttention,
    DynamicMlp,
    TokenRouter,
    WidthRouter,
    binarise,
    choosing,
    logistic,
    together,
)
from ditkit.models.routing import route
from tiny_models import TINY

STATIC: dict[str, Any] = dict(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)


def static(cls: type[DiT] = DiT) -> DiT:
    torch.manual_seed(0)
    model = cls(**STATIC).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def network(kind: str) -> tuple[Any, Any]:
    """A model that chooses about half, and a function that runs it on samples `rows` of a batch of six."""
    if kind == "flux":
        tiny = TINY["FluxTransformer2DModel"]
        transformer: Any = tiny.model()
        model = dydit_flux.inherit(transformer, token_bias=0.0).eval()
        batch = tiny.inputs(6)
        batch["timestep"] = torch.linspace(0.1, 0.9, 6)
        shared = ("img_ids", "txt_ids")

        def run(rows: slice) -> Tensor:
            return model(**{k: v if k in shared else v[rows] for k, v in batch.items()}).sample

        return balanced(model, run), run
    model = CASES["dydit"].model() if kind == "dit" else static_dynamic(kind)
    batch = inputs(model, 6)
    if kind == "sit":
        batch = (batch[0], torch.linspace(0, 1, 6) * 40, batch[2])  # untrained, it tells these apart

    def run(rows: slice) -> Tensor:
        return model(*(part[rows] for part in batch)).sample

    return balanced(model, run), run


@torch.no_grad()
def balanced(model: Any, run: Any) -> Any:
    """The model with the biases of its token routers moved, block after block, to where half is chosen."""
    routers = [m for m in model.modules() if isinstance(m, TokenRouter | dydit_flux.JointTokenRouter)]
    for router in routers:
        if isinstance(router, TokenRouter):
            router.mlp_head[0].bias += 1  # pyright: ignore[reportOperatorIssue]  # most of its units work
        seen: list[Tensor] = []
        hook = router.register_forward_hook(lambda module, args, scores, seen=seen: seen.append(scores))
        run(slice(None))
        hook.remove()
        last: Any = router.mlp_head[2] if isinstance(router, TokenRouter) else router.router
        scores = seen[0].flatten().sort().values
        middle = scores[len(scores) // 4 : -len(scores) // 4]
        at = middle.diff().argmax()  # the widest gap, so that no score is close to the threshold
        last.bias -= (middle[at] + middle[at + 1]) / 2
    return model


def static_dynamic(kind: str) -> DyDiT:
    torch.manual_seed(1)
    model = inherit(static(SiT if kind == "sit" else DiT), width_bias=0.0, token_bias=0.0)
    if kind == "routed":
        route(model, sharing_ratio=0.8)
    return model.eval()


EVERY = pytest.mark.parametrize("kind", ["dit", "sit", "routed", "flux"])


@EVERY
@torch.no_grad()
def test_sliced_is_masked(kind: str) -> None:
    model, run = network(kind)
    with choosing(model, masked=True) as masked:
        expected = run(slice(None))
    with choosing(model) as sliced:
        found = run(slice(None))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert 0.2 < masked.ratio().mean() < 0.98  # something runs, something does not
    for one, other in zip(masked.made.values(), sliced.made.values(), strict=True):
        assert one.tokens is not None and other.tokens is not None
        assert torch.equal(one.tokens, other.tokens) and 0 < one.tokens.mean() < 1
    with choosing(model, complete=True) as complete:
        assert not torch.allclose(run(slice(None)), expected, atol=1e-3)
    assert not complete.made


@EVERY
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours(kind: str) -> None:
    """Their timesteps differ, and so their widths."""
    model, run = network(kind)
    with choosing(model) as chosen:
        whole = run(slice(None))
    if kind != "flux":
        heads = next(iter(chosen.made.values())).heads
        assert heads is not None and len(heads.unique(dim=0)) > 1
    for i in range(6):
        torch.testing.assert_close(run(slice(i, i + 1)), whole[i : i + 1], atol=1e-5, rtol=1e-5)


@EVERY
def test_what_is_counted_follows_the_formula(kind: str) -> None:
    """Of the blocks: what is outside of them, and the routers, costs the same either way."""
    model, run = network(kind)
    spent = []
    for how in ({"masked": True}, {}):
        with torch.no_grad(), choosing(model, **how) as chosen, count(model) as counted:
            run(slice(None))
        spent.append(counted.flops_by_forward[0])
    saved = sum((choice.whole - choice.spent).sum().item() for choice in chosen.made.values())
    assert spent[0] - spent[1] == pytest.approx(2 * saved, rel=1e-3) and saved > 0


@pytest.mark.parametrize(("cls", "kind"), [(DiT, DyDiT), (SiT, DySiT)])
@torch.no_grad()
def test_starts_as_the_static_network(cls: type[DiT], kind: type[DyDiT]) -> None:
    before = static(cls)
    model = inherit(before)
    assert type(model) is kind
    batch = inputs(before)
    assert torch.equal(model(*batch).sample, before(*batch).sample)
    block: Any
    for block in model.blocks:
        assert isinstance(block.attn_rate, WidthRouter)
        assert (block.attn_rate.router.bias == 15).all() and (block.mlp_rate.router.bias == 15).all()
        assert block.token_selection.mlp_head[2].bias.item() == 35
    with choosing(model) as chosen:
        model(*batch)
    assert chosen.ratio().tolist() == [1.0, 1.0]


@torch.no_grad()
def test_flux_starts_as_the_static_network() -> None:
    tiny = TINY["FluxTransformer2DModel"]
    before: Any = tiny.model()
    model: Any = dydit_flux.inherit(before)
    assert torch.equal(model(**tiny.inputs(2)).sample, before(**tiny.inputs(2)).sample)
    for block in model.transformer_blocks:
        assert block.token_selection.router.bias.item() == 5.0


def test_published_multiply_adds() -> None:
    attention, mlp = multiply_adds(256, 1152, 4 * 1152)
    assert (attention, mlp) == (1_509_949_440, 2_717_908_992)
    assert 28 * (attention + mlp) / 1e9 == pytest.approx(118.38, abs=0.005)
    assert multiply_adds(256, 384, 1536) == (201_326_592, 301_989_888)
    assert multiply_adds(256, 768, 3072) == (704_643_072, 1_207_959_552)


def test_only_tokens_or_only_width() -> None:
    for options, there in (({"width_bias": None}, "token_selection"), ({"token_bias": None}, "attn_rate")):
        model = inherit(static(), **options)
        names = {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("blocks.")}
        assert there in names and not {"token_selection", "attn_rate"} <= names
        with choosing(model) as chosen:
            model(*inputs(model))
        assert chosen.least() < 0.8


def test_drawn_choices_come_from_the_given_numbers() -> None:
    model, run = network("dit")
    model.train()

    def draw(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return lambda *shape: torch.rand(6, *shape, generator=generator)

    outputs = []
    for seed in (0, 0, 1):
        with choosing(model, draw=draw(seed)) as chosen:
            outputs.append(run(slice(None)))
        for choice in chosen.made.values():
            assert (
                choice.heads is not None and (choice.heads.detach() - choice.heads.round()).abs().max() < 1e-6
            )
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_gradient_checkpointing_draws_nothing_anew(kind: str) -> None:
    model, run = network(kind)
    model.train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(0)
        with choosing(model, draw=lambda *shape, g=generator: torch.rand(6, *shape, generator=g)) as chosen:
            loss = run(slice(None)).square().mean() + chosen.ratio().mean()
        model.zero_grad()
        loss.backward()  # outside of the block, as a trainer does
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_every_router_of_flux_learns() -> None:
    model, run = network("flux")
    model.train()
    with choosing(model) as chosen:
        (run(slice(None)).square().mean() + chosen.ratio().mean()).backward()
    routers = {name: p for name, p in model.named_parameters() if "token_selection" in name}
    assert routers and all(p.grad is not None and p.grad.abs().max() > 0 for p in routers.values())


def test_logistic_noise_turns_scores_into_probabilities() -> None:
    scores = torch.tensor([-2.0, 0.0, 1.5]).expand(20000, 3)
    generator = torch.Generator().manual_seed(0)
    drawn = binarise(scores, logistic(torch.rand(20000, 3, generator=generator)))
    assert drawn.mean(0).tolist() == pytest.approx(torch.sigmoid(scores[0]).tolist(), abs=0.01)
    assert logistic(torch.tensor([0.0, 1.0])).isfinite().all()


def test_samples_that_choose_alike_run_together() -> None:
    choice = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 1.0]])
    found = {tuple(rows.tolist()): parts for rows, parts in together(choice) if rows is not None}
    assert set(found) == {(0, 2), (1,)} and found[1,] is None
    parts = found[0, 2]
    assert parts is not None and parts.tolist() == [0, 2]


@torch.no_grad()
def test_layers_with_nothing_chosen_but_the_first_part() -> None:
    attention, mlp = DynamicAttention(16, 4).eval(), DynamicMlp(16, 64, 4).eval()
    states, first = torch.randn(2, 5, 16), torch.eye(4)[:1].expand(2, 4)
    for layer in (attention, mlp):
        masked = layer(states, None, first, True) if layer is attention else layer(states, first, None, True)
        sliced = layer(states, None, first) if layer is attention else layer(states, first)
        torch.testing.assert_close(sliced, masked, atol=1e-6, rtol=1e-5)
    nobody = mlp(states, first, torch.zeros(2, 5, 1))
    assert not nobody.any()


def test_wrong_use_is_explained() -> None:
    with pytest.raises(ValueError, match="num_heads=1"):
        DyDiT(**{**STATIC, "num_heads": 1})
    with pytest.raises(TypeError, match="a DiT choose nothing"), choosing(static()):
        pass
    with pytest.raises(ValueError, match="no block has chosen"):
        Choosing().ratio()
    with pytest.raises(ValueError, match="config="):
        inherit(static(), hidden_size=64)
    with pytest.raises(ValueError, match="config="):
        inherit(static(), depth=3)
    with pytest.raises(ValueError, match="timestep"):
        model = inherit(static())
        model.run_blocks(*model.embed(*inputs(model)))


def test_of_the_registry() -> None:
    with torch.device("meta"):
        made = models.create("dydit-sit-s/4", num_classes=3)
        assert isinstance(made, DySiT) and made.config["patch_size"] == 4
        assert isinstance(models.create("dydit-sit", **STATIC), SiT)
        assert not isinstance(models.create("dydit", **STATIC), SiT)
    assert isinstance(made.blocks[0], nn.Module)
