"""TaylorSeer: schedules, forecasts on whole models, and what its report says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, TaylorSeerCacheConfig
from torch import Tensor

import ditkit
from ditkit.methods.taylorseer import TaylorSeer
from ditkit.registry import OptionError, parse_method
from ditkit.seams.extrapolate import Trajectory
from loops import Pipe, denoise
from tiny_models import TINY, output

FLUX, OWN = TINY["FluxTransformer2DModel"], TINY["DiT"]


def test_published_schedules() -> None:
    down = {n: [49 - i for i in TaylorSeer(interval=n, schedule="dit").full_steps(50)] for n in (3, 4, 5, 6)}
    assert [len(down[n]) for n in (3, 4, 5, 6)] == [18, 14, 11, 10]
    assert down[3] == [49, *range(48, -1, -3)]
    assert down[4] == [49, *range(48, -1, -4)]
    assert down[5] == [49, *range(48, 2, -5)]
    assert down[6] == [49, *range(48, -1, -6)]
    flux = TaylorSeer(interval=6, schedule="flux").full_steps(50)
    assert flux == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]
    for name in ("hunyuan", "wan"):
        assert TaylorSeer(interval=5, schedule=name).full_steps(50) == list(range(0, 50, 5))  # type: ignore[arg-type]
    assert TaylorSeer(interval=5, schedule="diffusers").full_steps(50) == [0, 1, 2, *range(4, 50, 5)]


@pytest.mark.parametrize(
    ("schedule", "computed"),
    [
        ("dit", {3: 18, 4: 14, 5: 11, 6: 10}),
        ("flux", {6: 10}),
        ("hunyuan", {5: 10}),
        ("wan", {5: 10}),
        ("diffusers", {5: 13}),
    ],
)
def test_published_counts(schedule: Any, computed: dict[int, int]) -> None:
    """Full steps of 50, without a model."""
    for interval, full in computed.items():
        assert TaylorSeer(interval=interval, schedule=schedule).computed_steps(50) == full


def test_named_passes_have_caches_of_their_own() -> None:
    """As Wan's pipeline calls its transformer: each pass in a cache context."""
    wan = TINY["WanTransformer3DModel"]
    model, sizes, outputs = wan.model(), [], []
    rows = [wan.inputs(seed=seed) for seed in (0, 1)]
    rows[1]["hidden_states"] = rows[0]["hidden_states"]  # both passes of a step read one sample
    for contexts in (("cond", "uncond"), ("cond",), ("uncond",)):
        found = []
        with torch.no_grad(), ditkit.apply(model, TaylorSeer(interval=3, schedule="wan")) as run:
            for index in range(8):
                for context, row in zip(("cond", "uncond"), rows, strict=True):
                    if context in contexts:
                        with model.cache_context(context):
                            time = torch.full((1,), 1000.0 - 100 * index)
                            found.append((context, output(model(**{**row, "timestep": time}))))
        sizes.append(run.report().bytes_cached)
        outputs.append({name: [out for context, out in found if context == name] for name in contexts})
        assert set(run.report().branches) == set(contexts)
    assert sizes[0] == sizes[1] + sizes[2]
    for alone in outputs[1:]:
        for name, values in alone.items():
            for one, other in zip(values, outputs[0][name], strict=True):
                assert torch.equal(one, other)


def test_schedule_is_that_of_diffusers_own_hook() -> None:
    for interval, warmup in ((2, 3), (5, 3), (4, 1)):
        model = FLUX.model()
        model.enable_cache(TaylorSeerCacheConfig(cache_interval=interval, disable_cache_before_step=warmup))
        ran: list[int] = []
        now: list[int] = []
        model.transformer_blocks[0].attn.to_q.register_forward_hook(
            lambda *_, ran=ran, now=now: ran.append(now[-1])
        )
        with model.cache_context("cond"):
            for index in range(20):
                now.append(index)
                model(**FLUX.inputs(noise=1 - index / 20))
        method = TaylorSeer(interval=interval, warmup=warmup, schedule="diffusers")
        assert method.full_steps(20) == ran


@pytest.mark.parametrize(
    "options", [{}, {"interval": 2, "warmup": 0}, {"schedule": "diffusers", "interval": 3}]
)
@pytest.mark.parametrize("granularity", ["module", "last-block"])
def test_full_steps_are_those_of_a_run(options: dict[str, Any], granularity: str) -> None:
    method = TaylorSeer(granularity=granularity, last_steps=2, **options)  # type: ignore[arg-type]
    pipe, computed = Pipe(FLUX.model(), FLUX), []
    pipe.transformer.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *_: computed.append(at[0]))
    at = [0]
    with ditkit.apply(pipe, method) as run:
        pipe(steps=13, before=lambda index: at.__setitem__(0, index))
    assert computed == method.full_steps(13)
    assert run.report().steps_computed == len(computed) and computed[-2:] == [11, 12]


def test_forecast_of_the_last_block_is_the_series_over_its_outputs() -> None:
    """Every step's head input, from a model that computes all, continued by hand."""
    model, steps = FLUX.model(), 9
    inputs = [FLUX.inputs(seed=3, noise=1 - index / steps) for index in range(steps)]
    entered: list[torch.Tensor] = []
    model.norm_out.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        for one in inputs:
            model(**one)
        true = [*entered]
        for expansion in ("authors", "newton"):
            entered.clear()
            method = TaylorSeer(interval=3, order=2, granularity="last-block", expansion=expansion)  # type: ignore[arg-type]
            with ditkit.apply(model, method):
                for one in inputs:
                    model(**one)
            series, full = Trajectory(2, expansion), method.full_steps(steps)  # type: ignore[arg-type]
            for index in range(steps):
                if index in full:
                    series.add(index, true[index], method.highest_order(index))
                expected = true[index] if index in full else series.at(index)
                torch.testing.assert_close(entered[index], expected, atol=1e-5, rtol=1e-5)


def test_gates_and_modulation_are_those_of_the_forecast_step() -> None:
    """Plain reuse equals a model whose modules always give their first outputs, under today's gates."""
    model = OWN.model()
    inputs = [OWN.inputs(seed=1, noise=noise) for noise in (1.0, 0.9, 0.8, 0.7)]
    modules = [module for block in model.blocks for module in (block.attn, block.mlp)]
    with torch.no_grad():
        with ditkit.apply(model, TaylorSeer(interval=4, order=0, warmup=1)):
            forecast = [output(model(**one)) for one in inputs]
        first: dict[int, Tensor] = {}
        for module in modules:
            module.register_forward_hook(lambda module, args, result: first.setdefault(id(module), result))
        expected = [output(model(**one)) for one in inputs]
    assert not torch.equal(forecast[1], forecast[2])
    for one, other in zip(forecast, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_sigma_as_coordinate() -> None:
    """Features that are a line in sigma are forecast without error, whatever the spacing of the steps."""
    direction = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    errors = {}
    for coordinate in ("index", "sigma"):
        pipe = Pipe(FLUX.model(), FLUX, FlowMatchEulerDiscreteScheduler(shift=5.0))
        model, level, worst = pipe.transformer, [0.0], [0.0]

        def line(
            *, encoder_hidden_states: Tensor, level: list[float] = level, **_: Any
        ) -> tuple[Tensor, Tensor]:
            return encoder_hidden_states, level[0] * direction

        def compare(module: Any, args: Any, level: list[float] = level, worst: list[float] = worst) -> None:
            worst[0] = max(worst[0], float((args[0] - level[0] * direction).abs().max()))

        def read(module: Any, args: Any, level: list[float] = level) -> None:
            level[0] = float(args[0][0]) / 1000

        model.single_transformer_blocks[-1].forward = line
        model.time_text_embed.register_forward_pre_hook(read)
        model.norm_out.register_forward_pre_hook(compare)
        method = TaylorSeer(interval=4, granularity="last-block", coordinate=coordinate)  # type: ignore[arg-type]
        with ditkit.apply(pipe, method):
            pipe(steps=12)
        errors[coordinate] = worst[0]
    assert errors["sigma"] < 1e-5 < 1e-2 < errors["index"]


def test_reach_spares_the_first_interval_the_slope_of_the_warm_up() -> None:
    """Steps 0, 1, 2 and 7 are computed: with reach 1 only step 3 follows the slope of 1 and 2."""
    model, inputs = FLUX.model(), [FLUX.inputs(seed=2, noise=1 - index / 14) for index in range(14)]
    entered: list[Tensor] = []
    model.norm_out.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad(), ditkit.apply(model, TaylorSeer(interval=5, granularity="last-block", reach=1.0)):
        for one in inputs:
            model(**one)
    assert not torch.equal(entered[3], entered[2])
    assert all(torch.equal(entered[index], entered[2]) for index in (4, 5, 6))
    assert not any(torch.equal(entered[index], entered[7]) for index in range(8, 12))


def test_branches_have_states_of_their_own() -> None:
    method = TaylorSeer(interval=3, order=2, granularity="module")
    with ditkit.apply(model := FLUX.model(), method):
        apart = denoise(model, FLUX, 10, guidance="sequential")
    with ditkit.apply(model, method):
        together = denoise(model, FLUX, 10, guidance="batched")
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("steps", "options", "words"),
    [
        (3, {}, "nothing was forecast in 3 steps.*first forecast comes at step 4 of at least 4"),
        (1, {}, "nothing was forecast in 1 steps"),
        (9, {"interval": 1}, "interval=1 computes every step"),
        (9, {"order": 4}, r"order=4 was never reached"),
        (9, {"last_steps": 1}, "last_steps=1 had no effect"),
        (9, {}, r"5 of 9 forwards were computed.*at most 1.80 times"),
    ],
)
def test_plain_words(steps: int, options: dict[str, Any], words: str) -> None:
    model = FLUX.model()
    with ditkit.apply(model, TaylorSeer(**{"interval": 3, **options})) as run:
        denoise(model, FLUX, steps)
    assert re.search(words, " ".join(run.report().notes)), run.report().notes
    with ditkit.apply(model, TaylorSeer()) as run:
        pass
    assert "not called" in " ".join(run.report().notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interval": 0}, "interval must be a whole number of at least 1; got 0"),
        ({"interval": 2.5}, "interval must be a whole number"),
        ({"order": -1}, "order must be"),
        ({"warmup": -1}, "warmup must be"),
        ({"last_steps": -2}, "last_steps must be"),
        ({"granularity": "block"}, "granularity must be one of module, last-block; got 'block'"),
        ({"schedule": "sd3"}, "schedule must be one of"),
        ({"factor_dtype": "int8"}, "factor_dtype must be"),
        ({"expansion": "taylor"}, "expansion must be"),
        ({"reach": 0.0}, "reach must be a number above 0"),
        ({"coordinate": "time"}, "coordinate must be"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TaylorSeer(**options)


def test_from_text() -> None:
    assert parse_method("taylorseer:interval=4,order=2,granularity=last-block,warmup=none") == TaylorSeer(
        interval=4, order=2, granularity="last-block"
    )
    with pytest.raises(OptionError, match="no option 'intervall'"):
        parse_method("taylorseer:intervall=4")
    with pytest.raises(OptionError, match="interval must be"):
        parse_method("taylorseer:interval=0")


def test_factor_dtype_halves_the_cache() -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16", "model"):
        with ditkit.apply(model := FLUX.model(), TaylorSeer(interval=3, factor_dtype=dtype)) as run:  # type: ignore[arg-type]
            denoise(model, FLUX, 8)
        sizes[dtype] = run.report().bytes_cached
    assert sizes["float32"] == sizes["model"] == 2 * sizes["bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["module", "last-block"])
def test_compiled_models(granularity: Any) -> None:
    """Every hooked module is a graph break; the result is the eager one."""
    method = TaylorSeer(interval=3, granularity=granularity)
    with ditkit.apply(model := FLUX.model(), method):
        eager = denoise(model, FLUX, 7)
    torch.compiler.reset()
    compiled: Any = torch.compile(FLUX.model(), backend="eager")
    with ditkit.apply(compiled, method) as run:
        result = denoise(compiled, FLUX, 7)
    torch.testing.assert_close(result, eager, atol=1e-5, rtol=1e-5)
    assert run.report().steps_computed == len(method.full_steps(7))
    torch.compiler.reset()
