"""Re-ttention: its masks and counts, what is kept and when, when it is exact, and what bad options get."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from calls import Call
from torch import Tensor

import ditkit
from ditkit import registry
from ditkit.methods.grat import GRAT
from ditkit.methods.re_ttention import ReTtention
from ditkit.seams.layout import TokenLayout
from ditkit.seams.steps import Step
from loops import Pipe
from tiny_models import TINY

CPU = torch.device("cpu")
LAYOUTS = [
    TokenLayout((1, 6, 8)),
    TokenLayout((3, 4, 5), 6, "prefix"),
    TokenLayout((2, 5, 5), 3, "suffix"),
]


def drive(
    method: ReTtention, layout: TokenLayout, inputs: list[list[Tensor]], name: str | None = None
) -> tuple[list[Tensor], Call]:
    """A generation on one layer: q, k, v of each step -> its outputs."""
    strategy, call = method.strategy(name), Call()
    plan = strategy.plan(layout, inputs[0][0].shape[1], CPU)
    outs = []
    for index, (q, k, v) in enumerate(inputs):
        call.at = Step(index, len(inputs), 0.0, "0", 0)
        strategy.begin(call.at)
        outs.append(strategy.attend(q, k, v, None, None, call, plan))
    return outs, call


def drifting(layout: TokenLayout, steps: int, drift: float = 0.1) -> list[list[Tensor]]:
    torch.manual_seed(0)
    now = [torch.randn(2, 2, layout.length, 8) for _ in range(3)]
    found = []
    for _ in range(steps):
        found.append(now)
        now = [x + drift * torch.randn_like(x) for x in now]
    return found


def test_published_masks():
    picture, video = (1, 64, 64), (13, 30, 45)
    method = ReTtention(band="exact")
    assert method.half_width(picture) == 64  # w = 128, a band of 129
    assert f"{method.density(picture):.6f}" == "0.031246"
    assert method.half_width(video) == 21  # w = 42, 43 places of each frame
    assert f"{method.density(video, 226, queries='image'):.6f}" == "0.031598"
    assert f"{method.density(video, 226):.6f}" == "0.056066"
    assert math.prod(video) + 226 == 17_776
    # Widened to blocks it reads more, and says so.
    assert ReTtention().density(picture) == (3 * 32 - 2) / 32**2
    assert ReTtention().density(picture, rounded=False) == method.density(picture)


@pytest.mark.parametrize("mask", ["auto", "band", "frame-band"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_and_counts_are_the_definition(layout: TokenLayout, mask: str):
    method = ReTtention(keep=0.3, mask=mask, band="exact", block=4)
    _, height, width = layout.grid
    frame = math.prod(layout.grid) if mask == "band" else height * width
    half = int(frame * 0.3) // 2
    expected = torch.ones(layout.length, layout.length, dtype=torch.bool)
    place = torch.arange(layout.image_length) % frame
    expected[layout.image_span, layout.image_span] = (place[:, None] - place).abs() <= half
    plan = method.static_mask(layout, CPU)
    assert torch.equal(plan.mask[0, 0], expected)
    share = expected.double().mean().item()
    text = layout.joint_text_length
    assert plan.share == pytest.approx(share) == method.density(layout.grid, text)
    assert method.flops(layout.grid, text, 2, 8) == 64 * int(expected.sum())
    for block in (3, 4):
        widened = ReTtention(keep=0.3, mask=mask, block=block)
        blocks = widened.static_mask(layout, CPU)
        assert (blocks.mask[0, 0] | ~expected).all()
        assert blocks.share == pytest.approx(widened.density(layout.grid, text))
        assert blocks.share == pytest.approx(blocks.mask.double().mean().item())


def test_published_schedules():
    full_or_dense = {"PixArtTransformer2DModel": (20, 12), "HunyuanDiT2DModel": (50, 32)}
    full_or_dense["CogVideoXTransformer3DModel"] = (50, 28)
    for name, (steps, sparse) in full_or_dense.items():
        method = ReTtention()
        warmup = method.warmup_of(name, steps)
        phases = method.phases(steps, warmup)
        assert phases.count("sparse") == sparse
        assert phases[:warmup] == ["dense"] * warmup
        assert [i for i, phase in enumerate(phases) if phase == "full"] == list(range(warmup, steps, 5))
    assert ReTtention().warmup_of("FluxTransformer2DModel", 28) == 7
    assert ReTtention().phases(28)[7:11] == ["full", "sparse", "sparse", "full"]
    stopped = ReTtention(last_refresh=15, warmup=5).phases(24)
    assert stopped[15:] == ["full", *["sparse"] * 8]
    assert set(ReTtention(refresh=1).phases(9)) == {"dense"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("band", ["blocks", "exact"])
def test_unchanged_input_is_exact_right_after_a_full_step(layout: TokenLayout, band: str):
    inputs = drifting(layout, 1) * 4
    outs, call = drive(ReTtention(keep=0.2, band=band, block=4, warmup=0, refresh=10), layout, inputs)
    dense = F.scaled_dot_product_attention(*inputs[0])
    assert torch.equal(outs[0], dense) or torch.allclose(outs[0], dense, atol=1e-6)
    torch.testing.assert_close(outs[1], dense, atol=1e-6, rtol=0)
    assert not torch.allclose(outs[2], dense, atol=1e-4)  # rho has grown
    assert call.shares[0] == 1 and call.shares[1] < 1
    still, _ = drive(ReTtention(keep=0.2, block=4, warmup=0, refresh=10, growth=0.0), layout, inputs)
    torch.testing.assert_close(still[3], dense, atol=1e-6, rtol=0)


def test_what_is_kept():
    layout = LAYOUTS[1]
    inputs = drifting(layout, 2)
    method = ReTtention(keep=0.3, band="exact", block=4, warmup=0)
    outs, call = drive(method, layout, inputs)
    q, k, v = inputs[0]
    mask = method.static_mask(layout, CPU).mask
    weights = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(call.kept["ratio"], (weights * mask).sum(-1, keepdim=True))
    torch.testing.assert_close(call.kept["residual"], (weights * ~mask) @ v, atol=1e-6, rtol=1e-5)
    text = call.kept["ratio"][:, :, layout.text_span]
    torch.testing.assert_close(text, torch.ones_like(text))
    assert set(call.kept) == {"ratio", "residual", "at"}
    assert outs[1].dtype == q.dtype


def test_everything_in_the_mask_is_full_attention_without_growth():
    layout = LAYOUTS[1]
    inputs = drifting(layout, 8)
    for options in ({"keep": 1.0}, {"mask": GRAT(group=(9, 9, 9))}):
        outs, call = drive(ReTtention(growth=0.0, warmup=2, refresh=3, **options), layout, inputs)
        for out, qkv in zip(outs, inputs, strict=True):
            torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(call.kept["ratio"], torch.ones_like(call.kept["ratio"]))


def test_order_of_errors_along_a_trajectory():
    """Ratio and residual below the residual alone, that below plain sparse, at the steps after a full one."""
    layout = TokenLayout((1, 12, 16))
    inputs = drifting(layout, 12, drift=0.05)
    base = {"keep": 0.1, "band": "exact", "warmup": 0, "refresh": 4, "growth": 0.0}
    forms = {"d": {}, "c": {"ratio": False}, "a": {"ratio": False, "residual": False}}
    errors = {}
    for name, options in forms.items():
        outs, _ = drive(ReTtention(**base, **options), layout, inputs)
        dense = [F.scaled_dot_product_attention(*qkv) for qkv in inputs]
        errors[name] = [float((o - d).norm() / d.norm()) for o, d in zip(outs, dense, strict=True)]
    for step in (1, 5, 9):
        assert errors["d"][step] < errors["c"][step] < errors["a"][step]
        assert errors["d"][step] < errors["d"][step + 2]  # it grows with the distance


def test_clamp_keeps_the_ratio_at_one():
    layout = LAYOUTS[1]
    inputs = drifting(layout, 6)
    for clamp in (False, True):
        strategy, call = ReTtention(keep=0.9, warmup=0, refresh=9, growth=0.5, clamp=clamp).strategy(), Call()
        plan = strategy.plan(layout, 2, CPU)
        for index, (q, k, v) in enumerate(inputs):
            call.at = Step(index, 6, 0.0, "0", 0)
            strategy.begin(call.at)
            strategy.attend(q, k, v, None, None, call, plan)
        assert (float(strategy.ratio(call.kept).max()) > 1) != clamp


def test_ratio_goes_by_the_step_not_by_the_calls():
    """A step at which another method skips the call counts too."""
    layout = LAYOUTS[0]
    inputs = drifting(layout, 5)
    strategy, call = ReTtention(keep=0.3, warmup=0, refresh=9).strategy(), Call()
    plan = strategy.plan(layout, 2, CPU)
    for index in (0, 1, 4):
        call.at = Step(index, 9, 0.0, "0", 0)
        strategy.begin(call.at)
        strategy.attend(*inputs[index], None, None, call, plan)
    torch.testing.assert_close(
        strategy.ratio(call.kept) - call.kept["ratio"], torch.full((2, 2, 48, 1), 0.12)
    )
    # A layer that was skipped at the full step takes a full one itself.
    other = Call()
    other.at = call.at
    out = strategy.attend(*inputs[4], None, None, other, plan)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*inputs[4]), atol=1e-6, rtol=1e-5)
    assert "ratio" in other.kept


def test_on_a_model():
    tiny = TINY["PixArtTransformer2DModel"]
    with ditkit.apply(Pipe(tiny.model(), tiny), ReTtention(block=2), count_flops=False) as run:
        run.hosts[0].pipeline(steps=20)
        report = run.report()
        assert "dense, 3 full, 12 sparse" in report.notes[-1]
        heads, tokens, channels, layers = 2, 16, 16, 3
        assert report.bytes_cached == layers * (heads * tokens * 4 * (1 + channels) + 4)
        run.hosts[0].pipeline(steps=4)
        assert "5 + 4" not in str(run.report())
    with ditkit.apply(Pipe(tiny.model(), tiny), ReTtention(block=2), count_flops=False) as run:
        run.hosts[0].pipeline(steps=4)
    assert "none of 4 forwards was sparse" in run.report().notes[-1]


def test_from_the_command_line():
    found = registry.parse_method("re-ttention:keep=0.0625,mask=grat,growth=0.02,warmup=3,clamp=true")
    assert found == ReTtention(keep=0.0625, mask="grat", growth=0.02, warmup=3, clamp=True)
    with pytest.raises(registry.OptionError, match="no static mask"):
        registry.parse_method("re-ttention:mask=draft-attention")


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"window": 0},
        {"mask": "draft-attention"},
        {"band": "loose"},
        {"block": 0},
        {"warmup": -1},
        {"refresh": 0},
        {"last_refresh": -1},
        {"growth": math.nan},
        {"executor": "magic"},
    ],
)
def test_bad_option_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ReTtention(**options)
