"""Running the blocks on some tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ditkit
from ditkit.methods.taylorseer import TaylorSeer
from ditkit.seams.anatomy import child, describe
from ditkit.seams.apply import Host
from ditkit.seams.errors import ConflictError, SeamError
from ditkit.seams.steps import Step
from ditkit.seams.tokens import TokenChoice
from tiny_models import TINY, Tiny, output

every_class = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())


class Chosen(TokenChoice):
    """Keeps the tokens at given places; also a method that owns the tokens."""

    claims = frozenset({"tokens"})

    def __init__(self, indices: Tensor | None) -> None:
        self.indices = indices

    def attach(self, host: Host) -> None:
        host.tokens.choose(self)

    def select(self, step: Step, hidden_states: Tensor) -> Tensor | None:
        return self.indices


def tokens_of(tiny: Tiny) -> int:
    model = tiny.model()
    return describe(model).layout(model, tiny.inputs()).image_length


@every_class
def test_all_tokens_in_order_change_no_bit(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(batch=2)
    with torch.no_grad():
        dense = output(model(**inputs))
        for indices in (torch.arange(tokens_of(tiny)), None):
            with ditkit.apply(model, Chosen(indices)):
                assert torch.equal(output(model(**inputs)), dense)


@every_class
def test_a_permutation_is_undone(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(batch=2)
    shuffled = torch.randperm(tokens_of(tiny), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense = output(model(**inputs))
        with ditkit.apply(model, Chosen(shuffled)):
            permuted = output(model(**inputs))
    torch.testing.assert_close(permuted, dense, atol=1e-5, rtol=0)


@every_class
def test_every_attention_sees_the_chosen_tokens_only(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs()
    lengths: list[int] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        text = kwargs.get("encoder_hidden_states")
        hidden = args[0] if args else kwargs["hidden_states"]
        # Flux' single blocks join text and image before their attention.
        joined = 5 if tiny.name == "FluxTransformer2DModel" and text is None else 0
        lengths.append(hidden.shape[1] - joined)

    for stack, _, block in describe(model).blocks(model):
        for site in stack.attention:
            module = child(block, site.module)
            if module is not None:
                module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        dense = output(model(**inputs))
        assert set(lengths) == {tokens_of(tiny)}
        lengths.clear()
        with ditkit.apply(model, Chosen(torch.tensor([1, 5, 6, 11]))):
            partial = output(model(**inputs))
    assert set(lengths) == {4}
    assert partial.shape == dense.shape and bool(partial.isfinite().all())


def test_rows_left_out_keep_what_fill_gives() -> None:
    tiny = TINY["PixArtTransformer2DModel"]

    class Zero(Chosen):
        def fill(self, step: Step, hidden_states: Tensor) -> Tensor:
            return torch.zeros_like(hidden_states)

    model, inputs, kept = tiny.model(), tiny.inputs(), torch.tensor([2, 3])
    entered: list[Tensor] = []
    model.norm_out.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad(), ditkit.apply(model, Zero(kept)):
        model(**inputs)
    others = [place for place in range(16) if place not in kept.tolist()]
    assert float(entered[0][:, others].abs().max()) == 0
    assert float(entered[0][:, kept].abs().min()) > 0


def test_fewer_tokens_cost_fewer_flops() -> None:
    tiny = TINY["WanTransformer3DModel"]
    flops = []
    for indices in (None, torch.arange(4)):
        model = tiny.model()
        with torch.no_grad(), ditkit.apply(model, Chosen(indices)) as run:
            model(**tiny.inputs())
        flops.append(run.report().flops)
    assert flops[1] < 0.6 * flops[0]


def test_per_token_modulation_follows_the_tokens() -> None:
    for name in ("WanTransformer3DModel", "LTXVideoTransformer3DModel"):
        tiny = TINY[name]
        model, inputs = tiny.model(), tiny.inputs()
        inputs["timestep"] = torch.linspace(0, 900, tiny.tokens)[None]
        with torch.no_grad():
            dense = output(model(**inputs))
            with ditkit.apply(model, Chosen(torch.arange(tiny.tokens).flip(0))):
                torch.testing.assert_close(output(model(**inputs)), dense, atol=1e-5, rtol=0)


def test_refusals_name_the_class_and_the_reason() -> None:
    from diffusers import HunyuanVideoTransformer3DModel

    config = {
        **TINY["HunyuanVideoTransformer3DModel"].model().config,
        "image_condition_type": "token_replace",
    }
    with pytest.raises(SeamError, match=r"HunyuanVideoTransformer3DModel.*first frame"):
        ditkit.apply(HunyuanVideoTransformer3DModel(**config), Chosen(torch.arange(4)))
    tiny = TINY["FluxTransformer2DModel"]
    inputs = {**tiny.inputs(), "controlnet_block_samples": [torch.zeros(1, 16, 32)]}
    with (
        torch.no_grad(),
        ditkit.apply(model := tiny.model(), Chosen(torch.arange(4))),
        pytest.raises(SeamError, match=r"controlnet_block_samples adds a residual"),
    ):
        model(**inputs)


@pytest.mark.parametrize("indices", [torch.zeros(2, 4, dtype=torch.long), torch.zeros(0, dtype=torch.long)])
def test_bad_indices_are_refused(indices: Tensor) -> None:
    tiny = TINY["FluxTransformer2DModel"]
    model = tiny.model()
    with ditkit.apply(model, Chosen(indices)), pytest.raises(SeamError, match="select must give indices"):
        model(**tiny.inputs())


@pytest.mark.parametrize("options", [{}, {"granularity": "last-block"}])
def test_a_cache_beside_a_choice_of_tokens_is_refused_with_both_names(options) -> None:
    model = TINY["FluxTransformer2DModel"].model()
    cache, choice = TaylorSeer(**options), Chosen(torch.arange(2))
    for methods in ((cache, choice), (choice, cache)):
        with pytest.raises(ConflictError, match=r"TaylorSeer\(.*\) continues .*Chosen.* computes other"):
            ditkit.apply(model, *methods)
