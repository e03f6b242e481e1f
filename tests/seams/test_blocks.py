"""Skipping the stack and replacing units: what is put in is seen, what is skipped does not run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ditkit
from ditkit.seams.anatomy import describe
from ditkit.seams.apply import Host
from ditkit.seams.blocks import Outputs, StackCache, UnitCache, UnitRef
from ditkit.seams.errors import ConflictError, SeamError
from ditkit.seams.stats import flop_counter
from ditkit.seams.steps import Step
from tiny_models import TINY, Tiny, output

every_class = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())


class Memory(UnitCache):
    """Records every unit's outputs; `chosen` are then given back instead of running."""

    def __init__(self) -> None:
        self.kept: dict[int, Outputs] = {}
        self.chosen: set[int] = set()

    def replaced(self, step: Step, units: Sequence[UnitRef]) -> Sequence[bool]:
        return [unit.index in self.chosen for unit in units]

    def store(self, step: Step, unit: UnitRef, outputs: Outputs) -> None:
        self.kept[unit.index] = outputs

    def recall(self, step: Step, unit: UnitRef) -> Outputs:
        return self.kept[unit.index]


class StackMemory(StackCache):
    def __init__(self, after: int) -> None:
        self.after = after
        self.kept: Tensor | None = None
        self.skip = False
        self.asked: list[Tensor | None] = []

    def skips(self, step: Step, hidden_states: Tensor | None) -> bool:
        self.asked.append(hidden_states)
        return self.skip

    def store(self, step: Step, hidden_states: Tensor) -> None:
        self.kept = hidden_states

    def recall(self, step: Step, hidden_states: Tensor) -> Tensor:
        assert self.kept is not None and hidden_states.shape == self.kept.shape
        return self.kept


class Using:
    """A method that hands one cache to the block seam."""

    claims = frozenset({"blocks"})

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def attach(self, host: Host) -> None:
        if isinstance(self.cache, StackCache):
            host.blocks.cache_stack(self.cache)
        else:
            host.blocks.cache_units(self.cache)


@every_class
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000))
def test_replacing_units_by_their_own_outputs_changes_no_bit(tiny: Tiny, seed: int) -> None:
    model, inputs, cache = tiny.model(), tiny.inputs(batch=2), Memory()
    with torch.no_grad(), ditkit.apply(model, Using(cache)) as run:
        dense = output(model(**inputs))
        units = run.hosts[0].blocks.units
        assert set(cache.kept) == {unit.index for unit in units}
        draw = random.Random(seed)
        for share in (0.3, 0.7, 1.0):
            cache.chosen = {unit.index for unit in units if draw.random() < share}
            assert torch.equal(output(model(**inputs)), dense)


@every_class
def test_replaced_units_and_their_norms_do_not_run(tiny: Tiny) -> None:
    model, inputs, cache = tiny.model(), tiny.inputs(), Memory()
    with torch.no_grad(), ditkit.apply(model, Using(cache), count_flops=False) as run:
        model(**inputs)
        host = run.hosts[0]
        cache.chosen = set(cache.kept)
        inner: list[str] = []
        for unit in host.blocks.units:
            prefix = unit.name.rsplit(unit.module, 1)[0]
            stack = next(stack for stack in host.anatomy.stacks if unit.name.startswith(stack.path + "."))
            facts = next(one for one in stack.units if one.module == unit.module)
            inner += [prefix + path for path in (unit.module, *facts.bypass)]
        calls: list[str] = []
        for name in set(inner):
            module = model.get_submodule(name)
            for below, part in module.named_modules():
                # A unit's own forward is replaced: what lies below it must not be reached.
                if below:
                    part.register_forward_hook(lambda *_, name=f"{name}.{below}": calls.append(name))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        attended: list[int] = []

        def counting(*args: Any, **kwargs: Any) -> Tensor:
            attended.append(1)
            return sdpa(*args, **kwargs)

        torch.nn.functional.scaled_dot_product_attention = counting
        try:
            model(**inputs)
        finally:
            torch.nn.functional.scaled_dot_product_attention = sdpa
    # HunyuanVideo refines its text, HunyuanDiT pools it, with attention outside the blocks.
    assert len(attended) == (1 if "Hunyuan" in tiny.name else 0)
    assert calls == []


@every_class
def test_skipping_blocks_with_the_last_output_kept_changes_no_bit(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(batch=2)
    depth = len(describe(model).blocks(model))
    for after in {0, 1, depth - 1}:
        cache = StackMemory(after)
        with torch.no_grad(), ditkit.apply(model, Using(cache), count_flops=False):
            dense = output(model(**inputs))
            cache.skip = True
            assert torch.equal(output(model(**inputs)), dense)
        assert all((hidden is None) == (after == 0) for hidden in cache.asked)


@every_class
def test_skipped_blocks_do_not_run(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs()
    blocks = describe(model).blocks(model)
    cache = StackMemory(after=1)
    with torch.no_grad(), ditkit.apply(model, Using(cache), count_flops=False):
        model(**inputs)
        ran: list[str] = []
        for stack, index, block in blocks:
            for module in block.modules():
                if module is not block:
                    module.register_forward_hook(lambda *_, at=f"{stack.path}.{index}": ran.append(at))
        cache.skip = True
        model(**inputs)
    # DiTTransformer2DModel's head reads the embedder inside its first block.
    assert set(ran) == {f"{blocks[0][0].path}.0"}


def test_the_kept_output_is_what_enters_the_head() -> None:
    tiny = TINY["FluxTransformer2DModel"]
    model, inputs, cache = tiny.model(), tiny.inputs(), StackMemory(0)
    entered: list[Tensor] = []
    model.norm_out.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad(), ditkit.apply(model, Using(cache)):
        model(**inputs)
        assert cache.kept is not None and torch.equal(cache.kept, entered[0])
        cache.skip, cache.kept = True, torch.randn_like(cache.kept)
        model(**inputs)
        assert torch.equal(cache.kept, entered[1])


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "LTXVideoTransformer3DModel"])
def test_modulation_for_each_token_apart(name: str) -> None:
    tiny = TINY[name]
    model, inputs, cache = tiny.model(), tiny.inputs(batch=2), Memory()
    inputs["timestep"] = torch.linspace(0, 900, 2 * tiny.tokens).reshape(2, tiny.tokens)
    with torch.no_grad(), ditkit.apply(model, Using(cache)):
        dense = output(model(**inputs))
        cache.chosen = set(cache.kept)
        assert torch.equal(output(model(**inputs)), dense)


def test_token_replace_and_two_part_modulation() -> None:
    from diffusers import HunyuanVideoTransformer3DModel, QwenImageTransformer2DModel

    hunyuan, qwen = TINY["HunyuanVideoTransformer3DModel"], TINY["QwenImageTransformer2DModel"]
    torch.manual_seed(0)
    replaced = HunyuanVideoTransformer3DModel(
        **{**hunyuan.model().config, "image_condition_type": "token_replace"}
    )
    edited = QwenImageTransformer2DModel(**{**qwen.model().config, "zero_cond_t": True})
    inputs = {**qwen.inputs(), "img_shapes": [[(1, 2, 4), (1, 2, 4)]]}
    for model, arguments in ((replaced, hunyuan.inputs()), (edited, inputs)):
        cache = Memory()
        with torch.no_grad(), ditkit.apply(model.eval(), Using(cache)):
            dense = output(model(**arguments))
            cache.chosen = set(cache.kept)
            assert torch.equal(output(model(**arguments)), dense)


def test_controlnet_residuals_are_added_to_what_is_replaced() -> None:
    tiny = TINY["FluxTransformer2DModel"]
    model, inputs = tiny.model(), tiny.inputs()
    inputs["controlnet_block_samples"] = [torch.randn(1, 16, 32)]
    inputs["controlnet_single_block_samples"] = [torch.randn(1, 16, 32)]
    units, stack = Memory(), StackMemory(0)
    with torch.no_grad():
        with ditkit.apply(model, Using(units)):
            dense = output(model(**inputs))
            units.chosen = set(units.kept)
            assert torch.equal(output(model(**inputs)), dense)
        with ditkit.apply(model, Using(stack)):
            model(**inputs)
            stack.skip = True
            assert torch.equal(output(model(**inputs)), dense)


def test_only_one_cache_owns_the_blocks() -> None:
    class Twice(Using):
        def attach(self, host: Host) -> None:
            host.blocks.cache_stack(StackMemory(0))
            host.blocks.cache_units(Memory())

    model = TINY["FluxTransformer2DModel"].model()
    with pytest.raises(ConflictError, match="already belong to a cache"):
        ditkit.apply(model, Twice(None))
    assert not hasattr(model, "_diffusers_hook")


def test_chunked_feed_forward_is_refused_before_any_work() -> None:
    model = TINY["SD3Transformer2DModel"].model()
    model.enable_forward_chunking(4, dim=1)
    with pytest.raises(SeamError, match="disable_forward_chunking"):
        ditkit.apply(model, Using(Memory()))
    assert not hasattr(model, "_diffusers_hook")


def test_a_start_beyond_the_depth_is_refused() -> None:
    with pytest.raises(SeamError, match="after must be 0 to 3"):
        ditkit.apply(TINY["FluxTransformer2DModel"].model(), Using(StackMemory(4)))


def test_flops_are_counted_when_the_decision_falls_inside_the_forward() -> None:
    tiny = TINY["FluxTransformer2DModel"]
    model, cache = tiny.model(), StackMemory(after=1)
    with torch.no_grad(), ditkit.apply(model, Using(cache)) as run, flop_counter() as counter:
        for step, skip in enumerate([False, False, True, False, True, True, False]):
            cache.skip = skip
            model(**tiny.inputs(noise=1 - step / 8))
    assert run.report().flops == counter.get_total_flops()
    assert (run.report().steps_computed, run.report().steps_forecast) == (4, 3)
