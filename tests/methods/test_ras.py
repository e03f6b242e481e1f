"""RAS: which steps run which tokens, on whole models, and what its report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

import ditkit
from ditkit.methods.ras import RAS, _Branch
from ditkit.methods.taylorseer import TaylorSeer
from ditkit.registry import OptionError, parse_method
from ditkit.seams.anatomy import describe
from ditkit.seams.errors import ConflictError
from ditkit.seams.patches import Patches
from loops import Pipe, denoise
from tiny_models import TINY, Tiny

FLUX, SD3, WAN, OWN = (
    TINY[name] for name in ("FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel", "DiT")
)


def drawn(tiny: Tiny, method: RAS, **options: Any) -> Tensor:
    pipe = Pipe(tiny.model(), tiny)
    with ditkit.apply(pipe, method, count_flops=False):
        return pipe(**options)


# Which steps.


def test_resets_of_the_paper() -> None:
    assert RAS().resets(30) == {12, 22}  # the authors' default
    assert RAS().resets(14) == {7, 11}  # the best pair in the ablation of resets
    assert RAS().resets(10) == {7}
    assert RAS().resets(7) == frozenset()
    assert RAS().resets(None) == {12, 22}


def test_resets_beyond_the_last_step_are_ignored() -> None:
    method = RAS(error_reset_steps=(12, 22))
    assert method.resets(20) == {12}
    assert drawn(OWN, RAS(start=1, error_reset_steps=(2, 40)), steps=4).isfinite().all()


def test_steps_and_counts_at_published_settings() -> None:
    """SD3's script: 28 steps, 64 x 64 tokens, half of them, resets 12 and 20: 4 + 2 steps are dense."""
    method = RAS(error_reset_steps="12+20")
    counts = method.computed_tokens(28, 64, 64)
    assert [index for index, count in enumerate(counts) if count == 4096] == [0, 1, 2, 3, 12, 20]
    assert set(counts) == {2048, 4096}
    assert method.flops(28, 64, 64, 333) == pytest.approx((6 + 22 * (2048 + 333) / (4096 + 333)) / 28)
    # Lumina's script: in steps of 256 tokens every four steps, more and more are skipped.
    skips = RAS(skip_num_step=256, skip_num_step_length=4, error_reset_steps=(12, 22)).skip_counts(30, 4096)
    assert skips[:13] == [0, 0, 0, 0, *[2048 - 3 * 256] * 4, *[2048 - 2 * 256] * 4, 0]
    assert skips[-2:] == [2048 + 3 * 256] * 2


def test_two_cut_parts_may_skip_one_token_less() -> None:
    assert RAS(high_ratio=0.3, error_reset_steps=()).computed_tokens(6, 8, 8)[-1] == 64 - 22 - 9


def test_the_last_step_of_a_range_takes_the_tokens_of_the_one_before() -> None:
    method = RAS(start=2, end=5, error_reset_steps=())
    assert [method.runs_some(index, 8) for index in range(8)] == [False] * 2 + [True] * 4 + [False] * 2
    assert [method.chooses_for(index, 8) for index in range(8)] == [False] * 2 + [True] * 3 + [False] * 3


def test_counts_are_those_of_a_run() -> None:
    for options in (
        {"start": 1},
        {"start": 3, "sample_ratio": 0.25, "high_ratio": 0.4},
        {"start": 2, "end": 6, "error_reset_steps": (4,)},
        {"start": 2, "skip_num_step": 2, "skip_num_step_length": 3, "skip_multiple": 2},
    ):
        method, pipe, seen = RAS(**options), Pipe(FLUX.model(), FLUX), []
        pipe.transformer.transformer_blocks[0].ff.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].shape[1])
        )
        with ditkit.apply(pipe, method) as run:
            pipe(steps=12)
        assert seen == method.computed_tokens(12, 4, 4)
        assert run.report().tokens == pytest.approx(sum(seen) / (12 * 16))


# Which tokens.


def test_the_mended_sign_gives_everyone_a_turn_and_the_released_one_does_not() -> None:
    torch.manual_seed(0)
    skipped = {}
    for name in ("corrected", "released"):
        for high in (1.0, 0.3, 0.0):
            method = RAS(starvation=name, starvation_scale=1.0, high_ratio=high)  # type: ignore[arg-type]
            metric, drops = torch.rand(1, 64), torch.zeros(1, 64)
            for _ in range(20):
                _, out = method.choose(metric, drops, 32)
                drops.scatter_add_(1, out, torch.ones_like(out, dtype=drops.dtype))
            skipped[name, high] = int((drops == 20).sum())
    assert skipped["corrected", 1.0] == skipped["corrected", 0.3] == skipped["corrected", 0.0] == 0
    assert skipped["released", 1.0] == 32


@pytest.mark.parametrize("starvation", ["corrected", "released"])
@pytest.mark.parametrize("high", [0.0, 0.04, 0.3, 1.0])
def test_every_token_runs_or_does_not(starvation: Any, high: float) -> None:
    method = RAS(starvation=starvation, high_ratio=high)
    metric = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    active, skipped = method.choose(metric, torch.zeros(3, 50), 25)
    assert torch.equal(torch.cat([active, skipped], 1).sort(1).values, torch.arange(50).expand(3, -1))
    ranks = metric.gather(1, active)
    assert torch.equal(ranks, ranks.sort(1).values)
    if high == 0:
        assert torch.equal(skipped, metric.sort(1).indices[:, :25])


def test_the_authors_slice_is_an_option() -> None:
    active, skipped = RAS(starvation="released", high_ratio=0.0, empty_slice=True).choose(
        torch.rand(1, 8), torch.zeros(1, 8), 4
    )
    assert (active.shape, skipped.shape) == ((1, 0), (1, 8))
    assert drawn(OWN, RAS(starvation="released", high_ratio=0.0, empty_slice=True, start=2)).isfinite().all()


def test_the_guided_velocity_chooses_where_a_scheduler_shows_it() -> None:
    """With guidance in two passes both run the same tokens; alone each would choose its own."""
    pipe, sets = Pipe(FLUX.model(), FLUX), []
    with ditkit.apply(pipe, RAS(start=2, error_reset_steps=())) as run:
        host = run.hosts[0]
        pipe.transformer.transformer_blocks[0].ff.register_forward_pre_hook(
            lambda *_: sets.append(host.tokens.active and host.tokens.active.indices.tolist())
        )
        pipe(steps=6, guidance=True)
        scheduled = sets[4:]
        sets.clear()
        denoise(pipe.transformer, FLUX, 6, guidance="sequential")
        alone = sets[4:]
    assert all(one == other for one, other in zip(scheduled[::2], scheduled[1::2], strict=True))
    assert any(one != other for one, other in zip(alone[::2], alone[1::2], strict=True))
    assert "no scheduler showed the guided velocity" in str(run.report())


def test_samples_of_a_batch_have_their_own_tokens() -> None:
    """Also under a scheduler; each is what it would be alone."""
    for tiny in (FLUX, SD3, WAN):
        method = RAS(start=2, error_reset_steps=())
        pipe, batch = Pipe(tiny.model(), tiny), tiny.inputs(3)
        with ditkit.apply(pipe, method, count_flops=False):
            together = looped(pipe, batch)
            for row in range(3):
                one = {
                    name: value[row : row + 1] if isinstance(value, Tensor) and value.shape[0] == 3 else value
                    for name, value in batch.items()
                }
                torch.testing.assert_close(looped(pipe, one), together[row : row + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def looped(pipe: Pipe, arguments: dict[str, Any], steps: int = 6) -> Tensor:
    pipe.scheduler.set_timesteps(steps)
    sample = arguments["hidden_states"]
    for time in pipe.scheduler.timesteps:
        level = (time / 1000 * pipe.tiny.scale).expand(sample.shape[0])
        change = pipe.transformer(
            **{**arguments, "hidden_states": sample, pipe.tiny.timestep: level}, return_dict=False
        )[0]
        sample = pipe.scheduler.step(change, time, sample, return_dict=False)[0]
    return sample


# What it costs and gives.


@pytest.mark.parametrize("tiny", [FLUX, WAN, OWN], ids=lambda tiny: tiny.name)
def test_token_wise_flops_scale_with_the_tokens_that_run(tiny: Tiny) -> None:
    """Every linear layer over tokens, and what a forward costs in all: a part for each token that runs, so
    attention too, which asks all keys."""
    model = tiny.model()
    text = 5 if describe(model).text == "prefix" else 0
    linear: list[int] = []

    def count(module: Any, args: Any, out: Tensor) -> None:
        if args[0].ndim == 3 and args[0].shape[1] > 1:  # modulation is (B, C) or (B, 1, C)
            linear[-1] += 2 * out.numel() * module.in_features

    for _, _, block in describe(model).blocks(model):
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and name not in ("attn2.to_k", "attn2.to_v"):
                module.register_forward_hook(count)
    whole: list[int] = []
    for ratio in (0.5, 0.25):
        with ditkit.apply(model, RAS(sample_ratio=ratio, start=1, error_reset_steps=())) as run:
            denoise(model, tiny, 2, before=lambda index: linear.append(0))
        dense, some = linear[-2:]
        tokens = int(16 * ratio)
        assert some * (16 + text) == dense * (tokens + text)
        whole += [found.flops for found in run.hosts[0].stats.kinds.values()]
    assert whole[0] == whole[2]
    assert whole[0] - whole[1] == 2 * (whole[1] - whole[3])


def test_what_is_kept_goes_when_no_step_needs_it() -> None:
    pipe, kept = Pipe(FLUX.model(), FLUX), []
    with ditkit.apply(pipe, RAS(start=2, end=5, error_reset_steps=())) as run:
        host = run.hosts[0]
        pipe(steps=8, before=lambda index: kept.append(host.attention.kept.nbytes()))
        # 4 layers, keys and values, 32 wide, of 16 tokens and 5 of text.
        assert kept == [0, 0, *[4 * 2 * 21 * 32 * 4] * 4, 0, 0]
    assert run.report().bytes_cached >= max(kept)


def test_any_scheduler_works() -> None:
    for tiny in (FLUX, WAN):
        unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        dense = Pipe(tiny.model(), tiny, unipc)
        method = RAS(start=2)
        expected = dense(steps=8)
        with ditkit.apply(dense, method) as run:
            found = dense(steps=8)
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.2
        assert run.report().tokens < 0.75


def test_forecasts_continue_each_tokens_own_line() -> None:
    patches, branch = Patches((1, 2, 2), (1, 3, 4, 4)), _Branch()
    slope = torch.randn(1, 3, 4, 4)
    everywhere, some = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, False, True, False]])
    branch.learn(1.0, slope * 1.0, everywhere, patches)
    assert torch.equal(branch.forecast(0.5, 1.0, patches), slope)  # one value: it stays
    branch.learn(0.8, slope * 0.8, everywhere, patches)
    branch.learn(0.7, slope * 0.7, some, patches)
    torch.testing.assert_close(branch.forecast(0.6, 1.0, patches), slope * 0.6)
    # The line of the others ends a gap of 0.2 below 0.8, that of the first ones a gap of 0.1 below 0.7.
    ends = patches.spread(torch.tensor([[0.6, 0.6, 0.6, 0.6]])) * slope
    torch.testing.assert_close(branch.forecast(0.1, 1.0, patches), ends)


def test_caches_are_refused() -> None:
    last = TaylorSeer(granularity="last-block")
    for cache in (TaylorSeer(), last, parse_method("cg-taylor"), parse_method("predict-correct")):
        for methods in ((RAS(), cache), (cache, RAS())):
            with pytest.raises(ConflictError, match="RAS"):
                ditkit.apply(Pipe(FLUX.model(), FLUX), *methods)


def test_without_kept_keys_no_strategy_can_work() -> None:
    with pytest.raises(ConflictError, match="key_value_cache"):
        ditkit.apply(FLUX.model(), RAS(key_value_cache=False), parse_method("local-window:radius=1"))
    assert not torch.equal(drawn(FLUX, RAS(start=2, key_value_cache=False)), drawn(FLUX, RAS(start=2)))


# Options.


def test_options_from_text() -> None:
    assert parse_method("ras:error_reset_steps=12+20,high_ratio=0.3,end=none") == RAS(
        error_reset_steps="12+20", high_ratio=0.3
    )
    assert parse_method("ras:error_reset_steps=12+20").resets(28) == {12, 20}
    assert parse_method("ras:error_reset_steps=").resets(28) == frozenset()
    with pytest.raises(OptionError, match="sample_ratio must be above 0"):
        parse_method("ras:sample_ratio=0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_ratio": 1.5}, "sample_ratio must be above 0 and at most 1; got 1.5"),
        ({"high_ratio": -0.1}, "high_ratio must be 0 to 1; got -0.1"),
        ({"start": 0}, "start must be a whole number of at least 1; got 0"),
        ({"error_reset_steps": (3, -1)}, "error_reset_steps must be step indices"),
        ({"error_reset_steps": "a"}, "error_reset_steps must be step indices"),
        ({"metric": "max"}, "metric must be one of std, l2norm, random; got 'max'"),
        ({"reach": -1.0}, "reach must be at least 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RAS(**options)


def test_dynamic_counts_beyond_the_tokens_are_refused() -> None:
    method = RAS(skip_num_step=64, skip_num_step_length=1, skip_multiple=1)
    with pytest.raises(ValueError, match=r"skip_num_step=64 makes step \d+ of 10 skip -?\d+ of 16 tokens"):
        method.skip_counts(10, 16)


def test_the_report_says_why_it_could_not_help() -> None:
    pipe = Pipe(OWN.model(), OWN)
    with ditkit.apply(pipe, RAS()) as run:
        assert "was not called" in str(run.report())
        pipe(steps=4)
        assert "all tokens ran in each of 4 steps" in str(run.report())
    with ditkit.apply(pipe, RAS(error_reset_steps=(5, 30))) as run:
        pipe(steps=8)
    assert "error_reset_steps 30 lie beyond the last step" in str(run.report())
    assert run.report().tokens == pytest.approx((5 + 3 * 0.5) / 8)
