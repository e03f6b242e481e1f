"""Predict and correct: its schedule, exactness on polynomials, and what its report says."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

import ditkit
from ditkit.methods.predict_correct import PredictCorrect
from ditkit.seams.cost import ModelCost
from loops import Pipe, denoise
from tiny_models import TINY

FLUX, OWN = TINY["FluxTransformer2DModel"], TINY["DiT"]


def test_schedule() -> None:
    method = PredictCorrect(interval=4)
    assert method.full_steps(28) == [0, 6, 11, 16, 20, 24, 26]
    assert [method.computed_steps(steps) for steps in (1, 2, 3, 28, 50)] == [1, 1, 1, 7, 13]
    for steps, interval, bend in itertools.product(range(1, 60), range(1, 9), (1, 1.5, 2, 7)):
        method = PredictCorrect(interval=interval, bend=bend)
        full = method.full_steps(steps)
        gaps = [b - a for a, b in itertools.pairwise([*full, steps])]
        assert full[0] == 0 and all(gap > 0 for gap in gaps), (steps, method)
        # Never wider again, but for rounding.
        assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(gaps)), (steps, method)
        assert len(full) == method.computed_steps(steps) == -(-steps // interval)
    assert PredictCorrect(interval=1).full_steps(7) == list(range(7))


def test_full_steps_are_those_of_a_run() -> None:
    pipe, method = Pipe(FLUX.model(), FLUX), PredictCorrect(interval=3)
    calls = [0]
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    with ditkit.apply(pipe, method) as run:
        pipe(steps=13)
    assert run.report().computed_at == method.full_steps(13) and calls[0] == len(method.full_steps(13))
    report = run.report()
    assert report.flops is not None and report.flops_dense is not None
    # Nothing of the transformer runs at a skipped step.
    assert report.flops * 13 == report.flops_dense * len(method.full_steps(13))


def test_without_a_known_end_gaps_are_even() -> None:
    for options, computed in (({}, [0, 3, 6, 9, 12]), ({"num_steps": 14}, [0, 4, 7, 10, 13])):
        with ditkit.apply(model := FLUX.model(), PredictCorrect(interval=3, **options)) as run:
            denoise(model, FLUX, 14)
        assert run.report().computed_at == computed


def drawn(degree: float, steps: int, scheduler: Any, *methods: PredictCorrect) -> Tensor:
    """The final state where the prediction is a power of the noise level, whatever the state."""
    pipe = Pipe(FLUX.model(), FLUX, scheduler)
    direction = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))

    def head(*args: Any, **kwargs: Any) -> Tensor:
        level = float(pipe.scheduler.sigmas[pipe.scheduler.step_index or 0])
        return direction * (1 + level - 2 * level**degree)

    pipe.transformer.proj_out.forward = head
    with ditkit.apply(pipe, *methods, count_flops=False):
        return pipe(steps=steps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_exact_on_polynomials(shift: float) -> None:
    """Whatever the predictor, the corrector restores dense sampling if v is a polynomial of its order."""

    def scheduler() -> Any:
        return FlowMatchEulerDiscreteScheduler(shift=shift)

    dense = drawn(2, 20, scheduler())
    for order, corrector, exact in ((2, 0, False), (0, 2, True), (1, 2, True), (2, 3, True), (1, 0, False)):
        # The last step is a computed one here, so that no forecast is left uncorrected.
        method = PredictCorrect(interval=2, bend=2, order=order, corrector=corrector)
        assert method.full_steps(20)[-1] == 19
        found = drawn(2, 20, scheduler(), method)
        error = float((found - dense).abs().max())
        # An order-2 predictor alone has too few samples at its first forecasts.
        assert (error < 1e-5) is exact, (order, corrector, error)


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("bend", [1.0, 1.5, 2.5])
def test_the_corrector_helps_where_the_prediction_is_smooth(interval: int, bend: float) -> None:
    """Also where steps are computed one after the other, so that gaps fall out of the polynomial."""
    dense = drawn(0.5, 30, FlowMatchEulerDiscreteScheduler())
    errors = []
    for corrector in (0, 2, 3):
        method = PredictCorrect(interval, bend=bend, corrector=corrector)
        errors.append(float((drawn(0.5, 30, FlowMatchEulerDiscreteScheduler(), method) - dense).norm()))
    assert max(errors[1:]) < errors[0], errors


def test_euler_in_sigma() -> None:
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    dense = drawn(1, 12, EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    found = drawn(1, 12, scheduler, PredictCorrect(2, bend=2, order=0, corrector=1))
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)


def test_guidance_commutes() -> None:
    """Passes are corrected apart; their mixture is the mixture's correction."""
    with ditkit.apply(model := FLUX.model(), PredictCorrect(interval=3, num_steps=10)):
        apart = denoise(model, FLUX, 10, guidance="sequential")
    with ditkit.apply(model, PredictCorrect(interval=3, num_steps=10)):
        together = denoise(model, FLUX, 10, guidance="batched")
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)


def test_a_pipeline_may_write_to_the_prediction() -> None:
    results = []
    for spoil in (False, True):
        pipe = Pipe(FLUX.model(), FLUX)
        pipe.transformer.register_forward_hook(lambda module, args, out, spoil=spoil: _spoilt(out, spoil))
        with ditkit.apply(pipe, PredictCorrect(interval=3)):
            results.append(pipe(steps=9))
    assert torch.equal(*results)


def _spoilt(out: Any, spoil: bool) -> Any:
    """The prediction handed on as a copy, its own memory overwritten."""
    copy = type(out)(sample=out.sample.clone())
    if spoil:
        out.sample.zero_()
    return copy


@pytest.mark.parametrize(
    ("steps", "options", "words"),
    [
        (9, {"interval": 1}, "interval=1 computes every step"),
        (1, {"num_steps": 1}, "nothing was forecast"),
        (9, {}, "nothing was corrected"),
        (9, {}, "set num_steps"),
        (9, {"num_steps": 9}, r"3 of 9 forwards were computed.*at most 3.00 times"),
    ],
)
def test_plain_words(steps: int, options: dict[str, Any], words: str) -> None:
    with ditkit.apply(model := FLUX.model(), PredictCorrect(**{"interval": 3, **options})) as run:
        denoise(model, FLUX, steps)
    assert re.search(words, " ".join(run.report().notes)), run.report().notes


def test_other_schedulers_are_not_corrected() -> None:
    pipe = Pipe(FLUX.model(), FLUX, FlowMatchHeunDiscreteScheduler())
    with ditkit.apply(pipe, PredictCorrect()) as run:
        pipe(steps=9)
    assert any("nothing was corrected" in note for note in run.report().notes)


def test_bad_options() -> None:
    for options, words in (
        ({"interval": 0}, "interval must be a whole number of at least 1; got 0"),
        ({"bend": 0.5}, "bend must be a number of at least 1; got 0.5"),
        ({"order": -1}, "order must be"),
        ({"corrector": 1.5}, "corrector must be"),
    ):
        with pytest.raises(ValueError, match=words):
            PredictCorrect(**options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled_without_a_graph_break() -> None:
    """The decision is taken outside of the compiled model."""
    method = PredictCorrect(interval=3, num_steps=7)
    with ditkit.apply(model := FLUX.model(), method):
        eager = denoise(model, FLUX, 7)
    torch.compiler.reset()
    compiled: Any = torch.compile(FLUX.model(), backend="eager", fullgraph=True)
    with ditkit.apply(compiled, method) as run:
        result = denoise(compiled, FLUX, 7)
    torch.testing.assert_close(result, eager, atol=1e-5, rtol=1e-5)
    assert run.report().steps_computed == method.computed_steps(7)
    torch.compiler.reset()


def test_ceiling() -> None:
    cost = ModelCost(steps=28, whole=11.0, outside=1.0, block=1.0)
    assert PredictCorrect(interval=4).ceiling(cost) == 28 / 7
