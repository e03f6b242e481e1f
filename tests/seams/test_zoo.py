"""Every class of the facts table: dense is identity, a cache skips, a mask masks, tokens are dropped.

What a class does not allow is refused with the reason of the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditkit
from ditkit.methods.clear import LocalWindow
from ditkit.methods.taylorseer import TaylorSeer
from ditkit.seams.anatomy import Seam, Stack, child, describe
from ditkit.seams.attention import Dense
from ditkit.seams.errors import SeamError
from ditkit.seams.facts import FACTS
from ditkit.seams.layout import TokenLayout
from probes import Chosen, Memory, StackMemory, Using
from tiny_models import output
from zoo import ZOO
from zoo.common import TEXT

every_class = pytest.mark.parametrize("name", ZOO)


def allowing(*seams: Seam) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in ZOO if FACTS[name].refuses(*seams) is None])


def refusing(seam: Seam) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in ZOO if FACTS[name].refuses(seam) is not None])


@functools.cache
def model_of(name: str) -> nn.Module:
    return ZOO[name].model()


@functools.cache
def arguments_of(name: str, batch: int = 2, size: int = 0, seed: int = 0) -> dict[str, Any]:
    return ZOO[name].inputs(batch=batch, size=size, seed=seed)


@functools.cache
def dense(name: str, batch: int = 2, size: int = 0, noise: float = 0.8) -> Tensor:
    """What the class gives on its own: call it while nothing is applied."""
    assert not hasattr(model_of(name), "_diffusers_hook")
    return forward(name, batch, size, noise)


@torch.no_grad()
def forward(name: str, batch: int = 2, size: int = 0, noise: float = 0.8) -> Tensor:
    tiny = ZOO[name]
    arguments = {**arguments_of(name, batch, size), tiny.timestep: tiny.time(batch, noise)}
    found = output(model_of(name)(**arguments))
    # Ideogram 4 gives rows for its text, too; its pipeline reads those of the picture.
    return found[:, TEXT:] if name == "Ideogram4Transformer2DModel" else found


def test_every_class_has_a_tiny_instance() -> None:
    assert set(ZOO) == set(FACTS)


@every_class
def test_nothing_applied_changes_no_bit(name: str) -> None:
    expected = dense(name)
    assert bool(expected.isfinite().all()) and float(expected.abs().max()) > 0
    with ditkit.apply(model_of(name)):
        assert torch.equal(forward(name), expected)
    assert torch.equal(forward(name), expected)


# Blocks and units.


class Ran:
    """Counts forwards of what lies inside the blocks, or inside given modules of them."""

    def __init__(self, name: str, inside: Callable[[Stack, nn.Module], Sequence[nn.Module]]) -> None:
        model = model_of(name)
        self.names: list[str] = []
        self._handles = [
            module.register_forward_hook(
                lambda *_, at=f"{stack.path}.{index}": self.names.append(at)  # type: ignore[misc]
            )
            for stack, index, block in describe(model).blocks(model)
            for module in inside(stack, block)
        ]

    def __enter__(self) -> Ran:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def everything(stack: Stack, block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if module is not block]


@allowing("stack")
def test_skipped_blocks_do_not_run_and_their_kept_output_is_exact(name: str) -> None:
    blocks = describe(model_of(name)).blocks(model_of(name))
    expected = dense(name)
    for after in {0, len(blocks) - 1}:
        cache = StackMemory(after)
        with ditkit.apply(model_of(name), Using(cache), count_flops=False):
            assert torch.equal(forward(name), expected)
            cache.skip = True
            with Ran(name, everything) as ran:
                assert torch.equal(forward(name), expected)
        always = {f"{stack.path}.{index}" for stack, index, _ in blocks[:after]}
        # DiTTransformer2DModel's head reads the embedder inside its first block.
        assert set(ran.names) - always <= (
            {"transformer_blocks.0"} if name == "DiTTransformer2DModel" else set()
        )


@allowing("units")
def test_replaced_units_do_not_run_and_their_kept_outputs_are_exact(name: str) -> None:
    cache, expected = Memory(), dense(name)
    with ditkit.apply(model_of(name), Using(cache), count_flops=False) as run:
        assert torch.equal(forward(name), expected)
        units = run.hosts[0].blocks.units
        assert set(cache.kept) == {unit.index for unit in units}
        assert {unit.block for unit in units} == set(range(run.hosts[0].blocks.depth))
        for chosen in (lambda unit: unit.index % 2 == 0, lambda unit: True):
            cache.chosen = chosen
            assert torch.equal(forward(name), expected)
        with Ran(name, inside_units) as ran:
            forward(name)
        assert ran.names == []


def inside_units(stack: Stack, block: nn.Module) -> list[nn.Module]:
    """What lies below the units of a block and below what they bypass."""
    paths = {place for unit in stack.units for place in (unit.module, *unit.bypass)}
    modules = [module for place in paths if (module := child(block, place)) is not None]
    parts = [part for module in modules for part in module.modules() if part is not module]
    # LuminaNextDiT2DModel's self-attention ends in the output projection of its cross-attention.
    shared = block.attn2.to_out[0] if type(block).__name__ == "LuminaNextDiTBlock" else None  # type: ignore[union-attr]
    return [part for part in parts if part is not shared]


@every_class
@pytest.mark.parametrize("granularity", ["module", "last-block"])
def test_taylorseer(name: str, granularity: Any) -> None:
    """Interval 1 is dense; interval 2 computes every other step."""
    reason = FACTS[name].refuses("units" if granularity == "module" else "stack")
    options = {"granularity": granularity, "warmup": 1}
    if reason is not None:
        with pytest.raises(SeamError, match=name) as refusal:
            ditkit.apply(model_of(name), TaylorSeer(interval=2, **options))
        assert reason in str(refusal.value)
        return
    expected = [dense(name, noise=noise) for noise in (0.8, 0.7)]
    with ditkit.apply(model_of(name), TaylorSeer(interval=1, **options), count_flops=False):
        found = [forward(name, noise=noise) for noise in (0.8, 0.7)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    inside = inside_units if granularity == "module" else everything
    ran_at = []
    with ditkit.apply(model_of(name), TaylorSeer(interval=2, **options), count_flops=False) as run:
        for noise in (0.8, 0.7, 0.6, 0.5, 0.4):
            with Ran(name, inside) as ran:
                predicted = forward(name, noise=noise)
            assert predicted.shape == expected[0].shape and bool(predicted.isfinite().all())
            ran_at.append(len(set(ran.names)) > (1 if name == "DiTTransformer2DModel" else 0))
    assert ran_at == [True, False, True, False, True]
    report = run.report()
    assert (report.steps_computed, report.steps_forecast) == (3, 2)


# Attention.


def visible(layout: TokenLayout, radius: float) -> Tensor:
    """(L, L) bool: image tokens see a disc of their frames and all text; text sees everything."""
    frames, height, width = layout.grid
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
    places = places.reshape(-1, 3)
    apart = (places[:, None, 1:] - places[None, :, 1:]).square().sum(-1)
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    mask[layout.image_span, layout.image_span] = apart < radius**2
    return mask


class Spy(Dense):
    def __init__(self) -> None:
        self.calls: list[tuple[int, str, TokenLayout, tuple[int, int]]] = []

    def attend(self, q, k, v, mask, scale, call, plan):  # type: ignore[no-untyped-def]
        self.calls.append((call.layer, call.name, call.layout, (q.shape[-2], k.shape[-2])))
        return super().attend(q, k, v, mask, scale, call, plan)


class Masked(Dense):
    """The same masks as LocalWindow's, by the formula."""

    radius: ClassVar[float] = 1.5

    def attend(self, q, k, v, mask, scale, call, plan):  # type: ignore[no-untyped-def]
        scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        scores = scores.masked_fill(~visible(call.layout, self.radius), -torch.inf)
        # A padded text token may see nothing at all: it gets zeros.
        return scores.softmax(-1).nan_to_num(0.0) @ v


def sites(name: str) -> list[tuple[str, str]]:
    """Path and kind of the attention modules of the blocks, in running order."""
    model = model_of(name)
    paths = {module: path for path, module in model.named_modules()}
    return [
        (paths[module], site.kind)
        for stack, _, block in describe(model).blocks(model)
        for site in stack.attention
        if (module := child(block, site.module)) is not None
    ]


@allowing("attention")
def test_identity_strategy_changes_no_bit_and_gets_the_calls_it_should(name: str) -> None:
    expected, spy = [dense(name, size=size) for size in (0, 1)], Spy()
    with ditkit.apply(model_of(name), Using(spy), count_flops=False) as run:
        found = [forward(name, size=size) for size in (0, 1)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    counts = run.hosts[0].attention.counts
    places = sites(name)
    own = [path for path, kind in places if kind != "cross"]
    assert own and [path for _, path, *_ in spy.calls] == 2 * own
    assert [layer for layer, *_ in spy.calls] == 2 * list(range(len(own)))
    assert counts["joint"] + counts["self"] == len(spy.calls)
    assert counts["cross"] >= 2 * (len(places) - len(own))  # one for each text, where there are several
    assert counts["other"] == 0
    for _, path, layout, lengths in spy.calls:
        assert lengths == (layout.length, layout.length)
        assert (dict(places)[path] == "joint") == (layout.joint_text_length > 0)


@allowing("attention")
@pytest.mark.parametrize("size", [0, 1])
def test_local_window_is_masked_dense_attention(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched: list[tuple[int, int]] = []
    original = F.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        untouched.append((query.shape[-2], key.shape[-2]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    plain, calls = forward(name, size=size), len(untouched)
    untouched.clear()
    with ditkit.apply(model_of(name), Using(Masked()), count_flops=False) as run:
        expected = forward(name, size=size)
    # What is not served (cross-attention, text encoders) still goes to the function itself.
    served = sum(kind != "cross" for _, kind in sites(name))
    counts = run.hosts[0].attention.counts
    assert counts["joint"] + counts["self"] == served
    assert len(untouched) == calls - served
    method = LocalWindow(radius=Masked.radius, executor="gather")
    with ditkit.apply(model_of(name), method, count_flops=False):
        found = forward(name, size=size)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-5)


@refusing("attention")
def test_attention_that_can_not_be_reached_is_refused(name: str) -> None:
    with pytest.raises(SeamError, match=name) as refusal:
        ditkit.apply(model_of(name), Using(Dense()))
    assert FACTS[name].unfit["attention"] in str(refusal.value)
    assert not any(hasattr(module, "_diffusers_hook") for module in model_of(name).modules())


# Where the tokens are.


def _last_but_one(sample: Tensor, grid: tuple[int, int, int], axes: str) -> tuple[int, ...]:
    """Index of one value of the last token but one of the sample; `axes` names its dimensions."""
    if "l" in axes:
        return (0, sample.shape[1] - 2, *(0 for _ in axes[2:]))
    whole = {"f": grid[0], "h": grid[1], "w": grid[2]}
    back = {"f": 1, "h": 1, "w": 2}
    return tuple(
        (whole[axis] - back[axis]) * (size // whole[axis]) if axis in whole else 0
        for axis, size in zip(axes, sample.shape, strict=True)
    )


@every_class
@pytest.mark.parametrize("size", [0, 1])
def test_the_grid_is_where_the_tokens_are(name: str, size: int) -> None:
    """A changed value of one latent changes the hidden states of its token alone, at the first block."""
    model, tiny, anatomy = model_of(name), ZOO[name], FACTS[name]
    if anatomy.refuses("tokens") is not None and anatomy.refuses("attention") is not None:
        return  # caches do not ask where a token is
    arguments = arguments_of(name, 1, size)
    layout = anatomy.layout(model, arguments)
    stack, _, block = anatomy.blocks(model)[0]
    entered: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((args[0] if args else kwargs[stack.arguments[0]]).clone())

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    listed = arguments[anatomy.sample]
    sample = torch.stack(listed) if isinstance(listed, list) else listed
    axes = tiny.axes or {3: "blc", 4: "bchw", 5: "bcfhw"}[sample.ndim]
    changed = sample.clone()
    changed[_last_but_one(changed, layout.grid, axes)] += 1.0
    try:
        with torch.no_grad():
            model(**arguments)
            model(**{**arguments, anatomy.sample: list(changed) if isinstance(listed, list) else changed})
    finally:
        handle.remove()
    before, after = (hidden.flatten(0, -2) for hidden in entered)
    # ErnieImage's blocks take sequence-first states, which the seams do not take apart.
    joint = stack.joint or name == "ErnieImageTransformer2DModel"
    assert before.shape[0] == (layout.length if joint else layout.image_length)
    start = layout.joint_text_length if joint and layout.text == "prefix" else 0
    moved = (before != after).any(-1).nonzero().flatten().tolist()
    assert moved == [start + layout.image_length - 2]


# Tokens.


def tokens_of(name: str) -> int:
    return FACTS[name].layout(model_of(name), arguments_of(name)).image_length


@allowing("tokens")
def test_chosen_tokens(name: str) -> None:
    length, expected = tokens_of(name), dense(name)
    with ditkit.apply(model_of(name), Using(Chosen(torch.arange(length))), count_flops=False):
        assert torch.equal(forward(name), expected)
    shuffled = torch.randperm(length, generator=torch.Generator().manual_seed(3))
    with ditkit.apply(model_of(name), Using(Chosen(shuffled)), count_flops=False):
        torch.testing.assert_close(forward(name), expected, atol=2e-5, rtol=1e-5)


class Lengths:
    """Lengths of queries and keys in every attention call, and the stack whose block made it."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[bool, int, int]] = []
        self._dropping = False
        original = F.scaled_dot_product_attention

        def counted(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.seen.append((self._dropping, query.shape[-2], key.shape[-2]))
            return original(query, key, *args, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
        self._handles = []
        for stack, _, block in describe(model_of(name)).blocks(model_of(name)):
            inside = functools.partial(self._set, not stack.whole)
            self._handles.append(block.register_forward_pre_hook(inside))
            self._handles.append(block.register_forward_hook(functools.partial(self._set, False)))

    def _set(self, dropping: bool, *_: Any) -> None:
        self._dropping = dropping

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@allowing("tokens")
def test_the_blocks_see_the_chosen_tokens_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = torch.tensor([1, 5, 6, 11])
    lengths = Lengths(name, monkeypatch)
    try:
        expected = forward(name)
        whole = list(lengths.seen)
        lengths.seen.clear()
        with ditkit.apply(model_of(name), Using(Chosen(chosen)), count_flops=False):
            found = forward(name)
    finally:
        lengths.remove()
    assert found.shape == expected.shape and bool(found.isfinite().all())
    assert not torch.equal(found, expected)
    dropped = tokens_of(name) - len(chosen)
    layout = FACTS[name].layout(model_of(name), arguments_of(name))
    images = {layout.image_length, layout.image_length + layout.text_length}
    if layout.text_mask is not None:  # Mochi attends to the valid text of each sample
        images |= {layout.image_length + valid for valid in layout.text_mask.sum(1).tolist()}
    assert any(dropping for dropping, *_ in whole)
    assert lengths.seen == [
        (dropping, *(side - dropped if dropping and side in images else side for side in sides))
        for dropping, *sides in whole
    ]


@refusing("tokens")
def test_tokens_that_can_not_be_dropped_are_refused(name: str) -> None:
    with pytest.raises(SeamError, match=name) as refusal:
        ditkit.apply(model_of(name), Using(Chosen(torch.arange(4))))
    assert FACTS[name].unfit["tokens"] in str(refusal.value)
