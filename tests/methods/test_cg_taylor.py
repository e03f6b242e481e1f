"""CG-Taylor: the gate, what is forecast, guidance, memory, and what its report says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import ditkit
from ditkit.methods.cg_taylor import GATE_ERROR, CGTaylor
from ditkit.methods.taylorseer import TaylorSeer
from ditkit.models.dit import DiT
from ditkit.registry import OptionError, parse_method
from ditkit.seams.cost import ModelCost
from ditkit.seams.errors import SeamError
from ditkit.seams.extrapolate import Trajectory
from loops import Pipe, denoise, join
from tiny_models import TINY, output

FLUX, OWN, WAN = (TINY[name] for name in ("FluxTransformer2DModel", "DiT", "WanTransformer3DModel"))
ALWAYS = {"threshold": 1e9, "warmup": 2}


def inputs(steps: int, seed: int = 3) -> list[dict[str, Any]]:
    return [FLUX.inputs(seed=seed, noise=1 - index / steps) for index in range(steps)]


@pytest.mark.parametrize("forecast", ["hidden", "residual"])
@pytest.mark.parametrize("expansion", ["authors", "newton"])
def test_the_rules_by_hand(forecast: str, expansion: str) -> None:
    """Both series and the gate, continued by hand over what a dense model's blocks put out."""
    model, steps = FLUX.model(), 16
    first: list[Tensor] = []
    last: list[Tensor] = []
    model.transformer_blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: first.append(kwargs["hidden_states"]), with_kwargs=True
    )
    model.norm_out.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    options = {"threshold": 0.07, "first_order": 2, "last_order": 2, "warmup": 3, "num_steps": steps}
    with torch.no_grad():
        for one in inputs(steps):
            model(**one)
        true_first, true_last = [*first], [*last]
        last.clear()
        with ditkit.apply(model, CGTaylor(**options, forecast=forecast, expansion=expansion)) as run:  # type: ignore[arg-type]
            for one in inputs(steps):
                model(**one)
    before, behind = Trajectory(2), Trajectory(2, expansion)  # type: ignore[arg-type]
    computed, errors = [], {}
    for index in range(steps):
        h1, base = true_first[index], true_first[index] * (forecast == "residual")
        trusted = False
        if index >= 3:
            error = float((before.at(index) - h1).abs().mean() / h1.abs().mean())
            trusted = error < 0.07
            errors[index] = error
        if not trusted:
            before.add(index, h1)
        if not trusted or index == steps - 1:
            behind.add(index, true_last[index] - base)
            computed.append(index)
        expected = true_last[index] if index in computed else behind.at(index) + base
        torch.testing.assert_close(last[index], expected, atol=1e-5, rtol=1e-5)
    errors.pop(steps - 1)
    report = run.report()
    assert report.computed_at == computed and 4 < len(computed) < steps - 2
    assert report.series[GATE_ERROR] == pytest.approx(errors, rel=1e-4)


@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())
def test_a_skipped_step_runs_one_block(tiny: Any) -> None:
    """On every class, text streams included: the warm-up and the last step are computed, no other."""
    pipe, method = Pipe(tiny.model(), tiny), CGTaylor(**ALWAYS)
    try:
        with ditkit.apply(pipe, method) as run:
            pipe(steps=8)
    except SeamError as refusal:
        assert tiny.name in str(refusal)
        return
    report = run.report()
    assert report.computed_at == [0, 1, 7] and method.computed_steps(8) == 3
    assert report.flops is not None and report.flops_dense is not None
    dense = report.flops_dense / 8
    one_block = (report.flops - 3 * dense) / 5
    assert 0 < one_block < dense


def test_the_gate_costs_one_block_and_the_head() -> None:
    """FLOPs of a skipped step are those of a model of one block."""
    config = dict(input_size=8, hidden_size=32, num_heads=2, num_classes=10)
    flops = {}
    for depth in (1, 6):
        model = DiT(**config, depth=depth).eval()  # type: ignore[arg-type]
        method = [CGTaylor(**ALWAYS)] if depth > 1 else []
        with ditkit.apply(model, *method) as run:
            denoise(model, OWN, 9)
        flops[depth] = run.report()
    deep, single = flops[6], flops[1]
    assert deep.flops is not None and deep.flops_dense is not None and single.flops is not None
    assert deep.flops == 2 * deep.flops_dense // 9 + 7 * single.flops // 9


def test_threshold_trades_steps() -> None:
    computed = []
    for threshold in (0.0, 0.028, 0.04, 0.08, 1e9):
        pipe = Pipe(FLUX.model(), FLUX)
        with ditkit.apply(pipe, CGTaylor(threshold=threshold, warmup=2)) as run:
            pipe(steps=24)
        computed.append(run.report().steps_computed)
    assert computed == sorted(computed, reverse=True)
    assert computed[0] == 24 and computed[-1] == 3 and len(set(computed)) >= 4


def test_samples_decide_for_themselves() -> None:
    """With per_sample a sample's result is that of its own run, though the two compute other steps."""
    model, steps = FLUX.model(), 14
    rows = [FLUX.inputs(1, seed) for seed in (0, 1)]
    method = CGTaylor(threshold=0.03, warmup=2, per_sample=True, num_steps=steps)

    def draw(arguments: dict[str, Any], calm: Tensor) -> tuple[Tensor, list[int]]:
        with torch.no_grad(), ditkit.apply(model, method) as run:
            outputs = []
            for index in range(steps):
                level = 1 - index / steps
                # The first sample hardly changes, the second one does.
                sample = arguments["hidden_states"] * (1 - (1 - level) * calm[:, None, None])
                time = torch.full((len(sample),), level)
                outputs.append(output(model(**{**arguments, "hidden_states": sample, "timestep": time})))
        return torch.stack(outputs), run.report().computed_at

    calm = torch.tensor([0.0, 0.9])
    together, both = draw(join(*rows), calm)
    alone = [draw(row, calm[index : index + 1]) for index, row in enumerate(rows)]
    assert alone[0][1] != alone[1][1]
    assert both == sorted({*alone[0][1], *alone[1][1]})
    for index, (result, _) in enumerate(alone):
        torch.testing.assert_close(together[:, index : index + 1], result, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tiny", [FLUX, WAN], ids=lambda tiny: tiny.name)
def test_the_unconditional_pass_follows(tiny: Any) -> None:
    """One decision a step, by the first forward; the last block's series are apart."""
    ran: list[int] = []
    sizes = {}
    for guidance in (False, True):
        pipe, method = Pipe(tiny.model(), tiny), CGTaylor(threshold=0.06, warmup=3)
        with ditkit.apply(pipe, method) as run:
            pipe(steps=16, guidance=guidance)
        report = run.report()
        sizes[guidance] = report.bytes_cached
        ran.append(report.steps_computed)
    first, second = report.branches["0"], report.branches["1"]
    assert first == second and 4 < first["computed"] < 16
    assert len(report.series[GATE_ERROR]) == 16 - 3 - 1
    # No first-block series for the pass that follows: 2 + 2 tensors, then 2 more.
    assert sizes[True] * 4 == sizes[False] * 6


def test_passes_may_decide_apart() -> None:
    pipe = Pipe(FLUX.model(), FLUX)
    with ditkit.apply(pipe, CGTaylor(threshold=0.06, warmup=3, passes="each")) as run:
        pipe(steps=16, guidance=True)
    assert run.report().bytes_cached == CGTaylor().tensors_held * 2 * 16 * 32 * 4


def test_memory_at_real_depth() -> None:
    """At the depth of FLUX.1-dev at most a tenth of TaylorSeer per module; widths cancel out."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=19, num_single_layers=38, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    sizes = []
    for method in (CGTaylor(warmup=2), TaylorSeer(interval=3, order=1)):
        with ditkit.apply(model, method, count_flops=False) as run:
            denoise(model, FLUX, 3)
        sizes.append(run.report().bytes_cached)
    assert sizes[0] == CGTaylor().tensors_held * 16 * 32 * 4
    assert sizes[0] * 10 <= sizes[1]


@pytest.mark.parametrize(
    ("steps", "options", "words"),
    [
        (6, {"threshold": 0.0}, "threshold=0 computes every step"),
        (5, {}, "nothing was forecast in 5 steps: warmup=5.*Use at least 7 steps"),
        (9, {**ALWAYS, "num_steps": 9}, r"6 of 9 forwards ran the first block only.*generation: 0-1, 8\."),
        (9, ALWAYS, "set num_steps"),
        (9, ALWAYS, r"off by .* to .*, median .*; threshold=1e\+09"),
    ],
)
def test_plain_words(steps: int, options: dict[str, Any], words: str) -> None:
    with ditkit.apply(model := FLUX.model(), CGTaylor(**options)) as run:
        denoise(model, FLUX, steps)
    assert re.search(words, " ".join(run.report().notes))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": -1.0}, "threshold must be a number of at least 0; got -1.0"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"first_order": -1}, "first_order must be a whole number of at least 0"),
        ({"warmup": 0}, "warmup must be a whole number of at least 1; got 0"),
        ({"num_steps": 0}, "num_steps must be"),
        ({"passes": "second"}, "passes must be one of first, each; got 'second'"),
        ({"forecast": "x"}, "forecast must be one of hidden, residual"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CGTaylor(**options)


def test_from_text() -> None:
    assert parse_method("cg-taylor:threshold=0.02,per_sample=true,num_steps=none") == CGTaylor(
        threshold=0.02, per_sample=True
    )
    with pytest.raises(OptionError, match="no option 'treshold'"):
        parse_method("cg-taylor:treshold=1")


def test_a_single_block_is_refused() -> None:
    model = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)
    with pytest.raises(SeamError, match="DiT has 1 block"):
        ditkit.apply(model, CGTaylor())


def test_ceiling() -> None:
    """Ten blocks and a frame of the weight of one: a skipped step costs two of eleven."""
    cost = ModelCost(steps=20, whole=11.0, outside=1.0, block=1.0)
    expected = 20 / (6 + 14 * 2 / 11)
    assert CGTaylor(warmup=5).ceiling(cost) == pytest.approx(expected)
    assert CGTaylor(threshold=0.0).ceiling(cost) == 1.0
