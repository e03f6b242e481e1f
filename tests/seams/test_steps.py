"""The clock finds steps, branches and generations in pipelines and in bare loops."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)

import ditkit
from ditkit.seams.apply import Host
from ditkit.seams.errors import SeamError
from ditkit.seams.steps import Step
from loops import Pipe, denoise
from tiny_models import TINY

FLUX, PIXART, OWN = TINY["FluxTransformer2DModel"], TINY["PixArtTransformer2DModel"], TINY["DiT"]


class Diary:
    """A method that writes down each forward's step and each reset."""

    claims: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.resets = 0

    def attach(self, host: Host) -> None:
        def write() -> tuple[()]:
            # Asked at the start of a forward, and again at its end.
            if host.running and (not self.steps or self.steps[-1] is not host.clock.step):
                self.steps.append(host.clock.step)
            return ()

        host.stats.modes.append(write)
        host.clock.on_reset(self._reset)

    def _reset(self) -> None:
        self.resets += 1

    def column(self, name: str) -> list[Any]:
        return [getattr(step, name) for step in self.steps]


def run(call: Callable[[], object], target: Any) -> Diary:
    diary = Diary()
    with ditkit.apply(target, diary):
        call()
    return diary


def flux_pipeline() -> FluxPipeline:
    tiny = FLUX.model()
    torch.manual_seed(0)
    # FluxPipeline packs 2 x 2 latents: in_channels must be a multiple of 4.
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=tiny,
    )


def flux_call(pipe: Any, steps: int = 4, **kwargs: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 5, 24, generator=generator)
    pooled = torch.randn(2, 16, generator=generator)
    return pipe(
        prompt_embeds=embeds[:1],
        pooled_prompt_embeds=pooled[:1],
        negative_prompt_embeds=embeds[1:],
        negative_pooled_prompt_embeds=pooled[1:],
        height=64,
        width=64,
        num_inference_steps=steps,
        output_type="latent",
        generator=generator,
        **kwargs,
    ).images


def test_flux_pipeline_without_guidance() -> None:
    pipe = flux_pipeline()
    diary = run(lambda: flux_call(pipe, 4), pipe)
    assert diary.column("index") == [0, 1, 2, 3]
    assert diary.column("num_steps") == [4] * 4
    assert diary.column("branch") == ["cond"] * 4
    assert diary.column("sigma") == pytest.approx(pipe.scheduler.sigmas[:4].tolist())
    assert diary.column("timestep") == pytest.approx((pipe.scheduler.timesteps / 1000).tolist())


def test_flux_pipeline_with_true_guidance_and_two_generations() -> None:
    pipe = flux_pipeline()
    diary = run(lambda: (flux_call(pipe, 3, true_cfg_scale=4.0), flux_call(pipe, 2)), pipe)
    assert diary.column("branch") == ["cond", "uncond"] * 3 + ["cond"] * 2
    assert diary.column("index") == [0, 0, 1, 1, 2, 2, 0, 1]
    assert diary.column("generation") == [0] * 6 + [1] * 2
    assert diary.column("num_steps") == [3] * 6 + [2] * 2


def test_wan_pipeline_runs_two_passes() -> None:
    tiny = TINY["WanTransformer3DModel"]
    pipe = WanPipeline(
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        vae=None,  # type: ignore[arg-type]
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=tiny.model(),  # type: ignore[arg-type]
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(2, 5, 24)
    diary = run(
        lambda: pipe(
            prompt_embeds=embeds[:1],
            negative_prompt_embeds=embeds[1:],
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=3,
            output_type="latent",
        ),
        pipe,
    )
    assert diary.column("branch") == ["cond", "uncond"] * 3
    assert diary.column("index") == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("heun", [False, True])
def test_sd3_pipeline_batches_guidance_and_heun_evaluates_twice(heun: bool) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler() if heun else FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(
        transformer=TINY["SD3Transformer2DModel"].model(),  # type: ignore[arg-type]
        scheduler=scheduler,  # type: ignore[arg-type]
        vae=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder_2=None,  # type: ignore[arg-type]
        tokenizer_2=None,  # type: ignore[arg-type]
        text_encoder_3=None,  # type: ignore[arg-type]
        tokenizer_3=None,  # type: ignore[arg-type]
    )
    pipe.set_progress_bar_config(disable=True)
    embeds, pooled = torch.randn(2, 5, 24), torch.randn(2, 16)

    def call() -> None:
        pipe(
            prompt_embeds=embeds[:1],
            negative_prompt_embeds=embeds[1:],
            pooled_prompt_embeds=pooled[:1],
            negative_pooled_prompt_embeds=pooled[1:],
            height=64,
            width=64,
            num_inference_steps=3,
            output_type="latent",
        )

    diary = run(call, pipe)
    # Heun lists the second evaluation of each step among its timesteps; the last step has none.
    evaluations = 5 if heun else 3
    assert diary.column("index") == list(range(evaluations))
    assert diary.column("num_steps") == [evaluations] * evaluations
    assert set(diary.column("branch")) == {"0"}


@pytest.mark.parametrize("by_begin_index", [False, True])
def test_a_start_inside_the_schedule(by_begin_index: bool) -> None:
    pipe = Pipe(PIXART.model(), PIXART)
    if not by_begin_index:
        pipe.scheduler.set_begin_index = lambda start: None
    diary = run(lambda: pipe(steps=10, start=4), pipe)
    assert diary.column("index") == list(range(6))
    assert diary.column("num_steps") == [6] * 6
    assert diary.column("sigma")[0] == pytest.approx(float(pipe.scheduler.sigmas[4]))


def test_an_aborted_generation_leaves_no_trace() -> None:
    pipe = Pipe(PIXART.model(), PIXART)

    def stop(index: int) -> None:
        if index == 3:
            raise KeyboardInterrupt

    def call() -> None:
        with pytest.raises(KeyboardInterrupt):
            pipe(steps=8, before=stop)
        pipe(steps=4)

    diary = run(call, pipe)
    assert diary.column("index") == [0, 1, 2, 0, 1, 2, 3]
    assert diary.column("generation") == [0] * 3 + [1] * 4
    assert diary.column("num_steps") == [8] * 3 + [4] * 4


def test_two_pipelines_side_by_side() -> None:
    one, two = Pipe(PIXART.model(), PIXART), Pipe(FLUX.model(), FLUX)
    first, second = Diary(), Diary()
    with ditkit.apply(one, first), ditkit.apply(two, second):
        one(steps=4, before=lambda index: two(steps=3) if index == 2 else None)  # type: ignore[func-returns-value]
    assert first.column("index") == [0, 1, 2, 3]
    assert first.column("generation") == [0] * 4
    assert second.column("index") == [0, 1, 2]
    # FLUX gets its timesteps divided: 1.0 is the first of 1000, not the schedule's last, which is 1.0 too.
    assert second.column("num_steps") == [3] * 3


def test_the_scheduler_may_be_exchanged_while_methods_are_applied() -> None:
    pipe = Pipe(PIXART.model(), PIXART)
    diary = Diary()
    with ditkit.apply(pipe, diary):
        pipe(steps=3)
        old, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe(steps=2)
        pipe(steps=2)
        assert type(old) is FlowMatchEulerDiscreteScheduler
    assert diary.column("index") == [0, 1, 2, 0, 1, 0, 1]
    assert diary.column("num_steps") == [3] * 3 + [2] * 4
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


def test_the_watched_scheduler_is_still_itself() -> None:
    pipe = Pipe(PIXART.model(), PIXART)
    scheduler, plain = pipe.scheduler, FlowMatchEulerDiscreteScheduler()
    before = dict(vars(scheduler))
    diary = Diary()
    with ditkit.apply(pipe, diary):
        assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        assert type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        assert inspect.signature(scheduler.set_timesteps) == inspect.signature(plain.set_timesteps)
        assert inspect.signature(scheduler.step) == inspect.signature(plain.step)
        twin = copy.deepcopy(scheduler)
        twin.set_timesteps(4)
        twin.step(torch.zeros(1), twin.timesteps[0], torch.zeros(1))
        assert diary.resets == 0 and scheduler.step_index is None and twin.step_index == 1
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert vars(scheduler) == before


def test_memory_is_released_when_the_last_step_is_taken() -> None:
    pipe = Pipe(PIXART.model(), PIXART)
    diary = Diary()
    with ditkit.apply(pipe, diary):
        pipe(steps=3)
        assert diary.resets == 2  # at the start, and after the third step


def test_bare_loops_and_their_branches() -> None:
    model = FLUX.model()
    diary = run(lambda: (denoise(model, FLUX, 3), denoise(model, FLUX, 2, guidance="sequential")), model)
    assert diary.column("index") == [0, 1, 2, 0, 0, 1, 1]
    assert diary.column("branch") == ["0"] * 3 + ["0", "1"] * 2
    assert diary.column("generation") == [0] * 3 + [1] * 4
    assert set(diary.column("num_steps")) == {None}


def test_bare_abort_before_the_second_step() -> None:
    """Both generations begin at the same timestep: only the sample tells them apart."""
    model = FLUX.model()

    def stop(index: int) -> None:
        if index == 1:
            raise RuntimeError

    def call() -> None:
        with pytest.raises(RuntimeError):
            denoise(model, FLUX, 3, seed=1, before=stop)
        denoise(model, FLUX, 3, seed=2)

    assert run(call, model).column("generation") == [0, 1, 1, 1]


def test_bare_change_of_shape() -> None:
    model = FLUX.model()
    arguments = [
        FLUX.inputs(size=size, noise=noise) for size, noise in ((0, 1.0), (0, 0.9), (1, 0.8), (1, 0.7))
    ]
    diary = run(lambda: [model(**one) for one in arguments], model)
    assert diary.column("generation") == [0, 0, 1, 1]
    assert diary.column("index") == [0, 1, 0, 1]


@pytest.mark.parametrize("times", [[0.9, 0.6, 0.3, 0.9, 0.6], [0.1, 0.4, 0.7, 0.1, 0.4]])
def test_own_model_runs_in_both_directions_of_time(times: list[float]) -> None:
    model = OWN.model()
    diary = run(lambda: [model(**OWN.inputs(noise=time)) for time in times], model)
    assert diary.column("generation") == [0, 0, 0, 1, 1]
    assert diary.column("index") == [0, 1, 2, 0, 1]


def test_a_restart_can_be_told() -> None:
    model = FLUX.model()
    diary = Diary()
    with ditkit.apply(model, diary) as applied:
        model(**FLUX.inputs(noise=0.9))
        applied.restart()
        model(**FLUX.inputs(noise=0.5))
    assert diary.column("index") == [0, 0]


def test_no_step_before_the_first_forward() -> None:
    with ditkit.apply(FLUX.model()) as applied, pytest.raises(SeamError, match="inside a forward"):
        _ = applied.hosts[0].clock.step
