"""What every method of the registry must satisfy on every class of the anatomy.

A method may refuse a class at `apply`, with an error that names it; then nothing else is asked of it there.
"""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ditkit
from ditkit.registry import Entry, entries
from ditkit.seams.anatomy import describe
from ditkit.seams.errors import SeamError, UnsupportedModelError
from ditkit.seams.stats import flop_counter
from loops import Pipe, denoise, join
from tiny_models import TINY, Tiny, output

METHODS = entries("method")
# Settings at which a method works on 16 tokens and 10 steps; its defaults where nothing is given.
ACTIVE: dict[str, dict[str, Any]] = {
    "taylorseer": {"interval": 3, "order": 2},
    "predict-correct": {"interval": 3},
    "local-window": {"radius": 1},
    "ras": {"start": 2, "error_reset_steps": (5,)},
    "sla": {"topk": 0.25, "block_q": 4, "block_kv": 2},
    "sparse-vdit": {"uniform": "diagonal", "block": 2, "diag_width": 1},
    # A learned table is for one model; its own tests have some.
    "harmonica": {"uniform": 2},
    # By the mean over a batch samples do depend on each other; its own tests show that.
    "cg-taylor": {"threshold": 0.1, "warmup": 2, "per_sample": True, "passes": "each"},
    "grat": {"group": (1, 2, 1)},
    "draft-attention": {"sparsity": 0.5, "pool": (2, 2), "dense_blocks": 1, "dense_steps": 0.2},
    "re-ttention": {"keep": 0.25, "block": 2, "warmup": 1, "refresh": 3},
}

every_method = pytest.mark.parametrize("entry", METHODS.values(), ids=METHODS.keys())
every_class = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())
some_classes = pytest.mark.parametrize(
    "tiny",
    [TINY[name] for name in ("FluxTransformer2DModel", "WanTransformer3DModel", "DiT")],
    ids=lambda t: t.name,
)


def active(entry: Entry) -> Any:
    return entry.target(**ACTIVE.get(entry.name, {}))


def accepts(entry: Entry, tiny: Tiny) -> bool:
    """Does the method take this class? If not, its refusal must name the class."""
    try:
        with ditkit.apply(tiny.model(), active(entry)):
            return True
    except (SeamError, UnsupportedModelError) as refusal:
        assert tiny.name in str(refusal)
        return False


def traces(model: nn.Module) -> list[str]:
    return [
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute in ("_diffusers_hook", "forward")
        if attribute in vars(module)
    ]


@every_method
@every_class
def test_off_is_off(entry: Entry, tiny: Tiny) -> None:
    if not accepts(entry, tiny):
        return
    model = tiny.model()
    dense = denoise(model, tiny, 5)
    with ditkit.apply(model, entry.target(**entry.neutral)):
        neutral = denoise(model, tiny, 5)
    assert float((neutral - dense).abs().max()) <= 1e-6


@every_method
@every_class
def test_removal_restores_the_model(entry: Entry, tiny: Tiny) -> None:
    if not accepts(entry, tiny):
        return
    model = tiny.model()
    attention = torch.nn.functional.scaled_dot_product_attention
    names = set(model.state_dict())
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    dense = denoise(model, tiny, 4)
    with ditkit.apply(model, active(entry)):
        denoise(model, tiny, 6)
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert set(model.state_dict()) == names
    assert torch.equal(denoise(model, tiny, 4), dense)


@every_method
@every_class
def test_removal_after_an_exception_in_every_block(entry: Entry, tiny: Tiny) -> None:
    if not accepts(entry, tiny):
        return
    model = tiny.model()
    dense = denoise(model, tiny, 3)
    attention = torch.nn.functional.scaled_dot_product_attention
    for _, _, block in describe(model).blocks(model):
        handle = next(iter(block.children())).register_forward_pre_hook(_fail)
        with pytest.raises(ArithmeticError), ditkit.apply(model, active(entry)):
            denoise(model, tiny, 3)
        handle.remove()
        assert traces(model) == []
        assert torch.nn.functional.scaled_dot_product_attention is attention
    assert torch.equal(denoise(model, tiny, 3), dense)


def _fail(module: nn.Module, args: Any) -> None:
    raise ArithmeticError("on purpose")


@every_method
@every_class
def test_samples_of_a_batch_do_not_influence_each_other(entry: Entry, tiny: Tiny) -> None:
    if not accepts(entry, tiny):
        return
    model = tiny.model()
    singles = [tiny.inputs(1, seed) for seed in range(4)]
    if tiny.name == "QwenImageTransformer2DModel":
        # Its text rotary table depends on the longest valid text of the batch: equal masks.
        for one in singles:
            one["encoder_hidden_states_mask"] = torch.ones(1, 5, dtype=torch.bool)
    batch = functools.reduce(join, singles)
    with torch.no_grad(), ditkit.apply(model, active(entry)) as run:
        together = [output(model(**at(batch, tiny, step))) for step in range(8)]
        for row, one in enumerate(singles):
            run.restart()
            for step in range(8):
                alone = output(model(**at(one, tiny, step)))
                torch.testing.assert_close(together[step][row : row + 1], alone, atol=1e-5, rtol=1e-5)


def at(arguments: dict[str, Any], tiny: Tiny, step: int) -> dict[str, Any]:
    """The arguments at a step of eight, with a sample that changes as in a loop."""
    level = 1 - step / 8
    sample = arguments["hidden_states"]
    return {
        **arguments,
        "hidden_states": sample * (0.4 + 0.6 * level),
        tiny.timestep: torch.full((sample.shape[0],), level * tiny.scale),
    }


@every_method
@some_classes
def test_guidance_sequential_and_batched_agree(entry: Entry, tiny: Tiny) -> None:
    if not accepts(entry, tiny):
        return
    model = tiny.model()
    with ditkit.apply(model, active(entry)):
        sequential = denoise(model, tiny, 8, guidance="sequential")
        batched = denoise(model, tiny, 8, guidance="batched")
        alone = denoise(model, tiny, 8)
        again = denoise(model, tiny, 8, guidance="sequential")
    torch.testing.assert_close(sequential, batched, atol=1e-5, rtol=1e-5)
    assert torch.equal(sequential, again) and not torch.equal(sequential, alone)


Case = tuple[int, int, int, int, bool]  # steps, batch, seed, size, guidance


@functools.cache
def fresh(name: str, tiny: str, case: Case) -> Tensor:
    """What a fresh model with a fresh method gives."""
    steps, batch, seed, size, guidance = case
    pipe = Pipe(TINY[tiny].model(), TINY[tiny])
    with ditkit.apply(pipe, active(METHODS[name]), count_flops=False):
        return pipe(steps, batch, seed, size, guidance)


cases = st.tuples(
    st.sampled_from([1, 2, 4, 6, 9]), st.integers(1, 2), st.integers(0, 1), st.integers(0, 1), st.booleans()
)
# Which of two pipelines, what it makes, where it is given up, when and what the other one makes in between.
generations = st.tuples(
    st.integers(0, 1), cases, st.none() | st.integers(0, 5), st.none() | st.tuples(st.integers(0, 5), cases)
)


class _Abort(Exception):
    pass


@every_method
@settings(max_examples=100, deadline=None)
@example(
    sequence=[(0, (60, 1, 0, 0, True), 30, None), (0, (60, 1, 1, 0, True), None, (5, (40, 2, 0, 1, False)))]
)
@given(sequence=st.lists(generations, min_size=2, max_size=3))
def test_any_sequence_of_generations_is_as_if_fresh(entry: Entry, sequence: list[Any]) -> None:
    names = [name for name in ("DiT", "FluxTransformer2DModel") if accepts(entry, TINY[name])]
    pipes = {name: Pipe(_model(name), TINY[name]) for name in names}
    runs = [ditkit.apply(pipe, active(entry), count_flops=False) for pipe in pipes.values()]
    try:
        for which, case, abort, between in sequence:
            name, other = names[which % len(names)], names[(which + 1) % len(names)]

            def before(
                index: int, abort: Any = abort, between: Any = between, other: str = other, name: str = name
            ) -> None:
                if between is not None and index == between[0] and other != name:
                    _check(entry, other, between[1], pipes[other](*between[1]))
                if index == abort:
                    raise _Abort

            try:
                result = pipes[name](*case, before=before)
            except _Abort:
                continue
            _check(entry, name, case, result)
    finally:
        for run in runs:
            run.remove()


@functools.cache
def _model(name: str) -> nn.Module:
    return TINY[name].model()


def _check(entry: Entry, name: str, case: Case, result: Tensor) -> None:
    assert torch.equal(result, fresh(entry.name, name, case)), (name, case)


@every_method
@some_classes
@pytest.mark.parametrize("guidance", [False, True])
def test_statistics_are_counted(entry: Entry, tiny: Tiny, guidance: bool) -> None:
    if not accepts(entry, tiny):
        return
    pipe = Pipe(tiny.model(), tiny)
    with ditkit.apply(pipe, active(entry)) as run, flop_counter() as counter:
        pipe(steps=9, guidance=guidance)
        pipe(steps=7, size=1, guidance=guidance)
    report = run.report()
    assert report.steps == report.steps_computed + report.steps_forecast == 16
    passes = sum(counts["computed"] + counts["forecast"] for counts in report.branches.values())
    assert passes == 16 * (2 if guidance else 1)
    assert report.generations == 2
    assert report.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    with ditkit.apply(pipe), flop_counter() as counter:
        pipe(steps=9, guidance=guidance)
        pipe(steps=7, size=1, guidance=guidance)
    assert report.flops_dense == pytest.approx(counter.get_total_flops(), rel=0.01)


def held() -> int:
    """Bytes of all dense tensors that Python holds; other tests may have left sparse ones."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@every_method
@some_classes
def test_bytes_cached_are_those_allocated(entry: Entry, tiny: Tiny) -> None:
    if not accepts(entry, tiny):
        return
    pipe, sizes = Pipe(tiny.model(), tiny), []
    for methods in ((), (active(entry),)):
        gc.collect()
        most: list[int] = []

        def look(index: int, most: list[int] = most) -> None:
            if index in (6, 8):
                most.append(held())

        with ditkit.apply(pipe, *methods) as run:
            pipe(steps=9, batch=2, guidance=True, before=look)
        sizes.append(most)
    growth = max(after - before for before, after in zip(*sizes, strict=True))
    # Beside what is cached of features, a plan for this shape may be kept: some index tables.
    assert run.report().bytes_cached == pytest.approx(growth, rel=0.02, abs=2048)


@every_method
def test_nothing_grows_over_many_generations(entry: Entry) -> None:
    tiny = TINY["FluxTransformer2DModel"]
    pipe = Pipe(tiny.model(), tiny)
    with ditkit.apply(pipe, active(entry)):
        pipe(steps=4)
    gc.collect()
    before = held()
    with ditkit.apply(pipe, active(entry), count_flops=False):
        for _ in range(100):
            for size in (0, 1):
                pipe(steps=4, size=size)
        # Released at the end of each generation, not only at removal.
        assert held() - before < 2**14
    for _ in range(20):
        with ditkit.apply(pipe, active(entry)):
            pipe(steps=4)
    gc.collect()
    assert held() - before < 2**14


@every_method
@every_class
def test_bfloat16_and_inference_mode(entry: Entry, tiny: Tiny) -> None:
    if not accepts(entry, tiny):
        return
    model = tiny.model()
    with ditkit.apply(model, active(entry)):
        plain = denoise(model, tiny, 6)
        with torch.inference_mode():
            inference = denoise(model, tiny, 6)
        assert torch.equal(denoise(model, tiny, 6), plain)
    assert torch.equal(plain, inference)
    half = model.to(torch.bfloat16)
    with torch.no_grad(), ditkit.apply(half, active(entry)) as run:
        for step in range(6):
            inputs = at(tiny.inputs(), tiny, step)
            cast = {name: _half(value) for name, value in inputs.items()}
            result = output(half(**cast))
            assert result.dtype == torch.bfloat16 and bool(result.isfinite().all())
    assert run.report().steps == 6


def _half(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_half(part) for part in value)
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value


@every_method
def test_saving_while_applied(entry: Entry, tmp_path: Path) -> None:
    for name in ("FluxTransformer2DModel", "DiT"):
        tiny = TINY[name]
        model = tiny.model()
        dense = denoise(model, tiny, 3)
        with ditkit.apply(model, active(entry)):
            denoise(model, tiny, 4)
            model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        saved = model.state_dict()
        assert set(loaded.state_dict()) == set(saved)
        assert all(torch.equal(value, saved[key]) for key, value in loaded.state_dict().items())
        # Weights mapped from a file may be aligned otherwise in memory, which changes the last bit.
        torch.testing.assert_close(denoise(loaded, tiny, 3), dense, atol=1e-5, rtol=1e-5)
