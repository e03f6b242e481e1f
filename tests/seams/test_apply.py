"""Putting methods on and taking them off."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import nn

import ditkit
from ditkit import registry
from ditkit.methods.clear import LocalWindow
from ditkit.methods.taylorseer import TaylorSeer
from ditkit.seams.apply import Host, apply
from ditkit.seams.errors import ConflictError, UnsupportedModelError
from loops import Pipe, denoise
from tiny_models import TINY, output

FLUX, PIXART, WAN = (
    TINY["FluxTransformer2DModel"],
    TINY["PixArtTransformer2DModel"],
    TINY["WanTransformer3DModel"],
)


def traces(model: nn.Module) -> list[str]:
    """What hooking leaves on modules."""
    return [
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute in ("_diffusers_hook", "forward", "_old_forward", "_hf_hook")
        if attribute in vars(module)
    ]


class Failing:
    """Fails after it has hooked the blocks."""

    claims = frozenset({"blocks"})

    def attach(self, host: Host) -> None:
        TaylorSeer().attach(host)
        raise RuntimeError("no")


def test_handle_and_context_manager() -> None:
    model = FLUX.model()
    run = ditkit.apply(model, TaylorSeer(interval=3))
    assert run.active and traces(model)
    run.remove()
    run.remove()
    assert not run.active and traces(model) == []
    with ditkit.apply(model, TaylorSeer()) as run:
        assert run.active
    assert traces(model) == []


def test_applying_twice_is_an_error_that_says_so() -> None:
    model = FLUX.model()
    with ditkit.apply(model, TaylorSeer(interval=3)):
        with pytest.raises(ConflictError, match=r"already carries methods \(TaylorSeer\(interval=3\)\)"):
            ditkit.apply(model, TaylorSeer())
        with pytest.raises(ConflictError, match="transformer already carries"):
            ditkit.apply(Pipe(model, FLUX), TaylorSeer())
    with ditkit.apply(model, TaylorSeer()):
        pass


def test_two_methods_of_one_seam_are_refused_by_name_before_anything_is_hooked() -> None:
    model = FLUX.model()
    with pytest.raises(
        ConflictError, match=r"TaylorSeer\(order=2\) and TaylorSeer\(interval=5\).*blocks seam"
    ):
        ditkit.apply(model, TaylorSeer(order=2), TaylorSeer(interval=5))
    assert traces(model) == []


def test_methods_whose_entries_name_each_other_are_refused_in_either_order(monkeypatch) -> None:
    entry = registry.get("method", "taylorseer")
    changed = dataclasses.replace(entry, conflicts=("local-window",))
    monkeypatch.setitem(registry._entries, ("method", "taylorseer"), changed)
    for methods in ((TaylorSeer(), LocalWindow(radius=3.0)), (LocalWindow(radius=3.0), TaylorSeer())):
        with pytest.raises(
            ConflictError, match=r"TaylorSeer\(\) can't be combined with LocalWindow\(radius=3.0\)"
        ):
            ditkit.apply(FLUX.model(), *methods)


def test_a_method_is_found_by_the_name_of_its_paper() -> None:
    assert registry.parse_method("clear:radius=4") == LocalWindow(radius=4.0)
    assert "clear" not in registry.entries("method")


def test_an_attach_that_fails_halfway_leaves_nothing() -> None:
    pipe = Pipe(FLUX.model(), FLUX)
    with pytest.raises(RuntimeError, match="no"):
        ditkit.apply(pipe, Failing())
    assert traces(pipe.transformer) == []
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    with ditkit.apply(pipe, TaylorSeer()):
        pass


@pytest.mark.parametrize("target", [nn.Linear(2, 2), Pipe(nn.Linear(2, 2), FLUX), "pipe", None])
def test_unsupported_targets(target: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        ditkit.apply(target, TaylorSeer())


def test_a_pipeline_without_transformer_is_refused_with_its_parts() -> None:
    class Unet:
        components = {"unet": nn.Linear(2, 2), "scheduler": None}

    with pytest.raises(UnsupportedModelError, match="no transformer; its parts are unet"):
        ditkit.apply(Unet(), TaylorSeer())


def test_a_class_instead_of_an_instance_is_refused() -> None:
    with pytest.raises(TypeError, match="pass an instance"):
        ditkit.apply(FLUX.model(), TaylorSeer)  # type: ignore[arg-type]


def test_both_transformers_of_wan_2_2() -> None:
    pipe = WanPipeline(
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        vae=None,  # type: ignore[arg-type]
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WAN.model(0),  # type: ignore[arg-type]
        transformer_2=WAN.model(1),  # type: ignore[arg-type]
        boundary_ratio=0.5,
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(2, 5, 24)
    with ditkit.apply(pipe, TaylorSeer(interval=3, warmup=1)) as run:
        pipe(
            prompt_embeds=embeds[:1],
            negative_prompt_embeds=embeds[1:],
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=8,
            output_type="latent",
        )
    report = run.report()
    # Each transformer has its own warm-up: 4 steps each, computed at its first and fourth.
    assert (report.steps, report.steps_computed) == (8, 4)
    assert report.branches == {
        "cond": {"computed": 4, "forecast": 4},
        "uncond": {"computed": 4, "forecast": 4},
    }
    assert traces(pipe.transformer) == traces(pipe.transformer_2) == []


def test_offloading_that_puts_back_forward_does_not_lose_the_methods() -> None:
    """accelerate's model offloading unhooks the transformer after each generation and hooks it again."""
    pipe = Pipe(FLUX.model(), FLUX)
    add_hook_to_module(pipe.transformer, ModelHook())
    with ditkit.apply(pipe, TaylorSeer(interval=3)) as run:
        pipe(steps=7)
        remove_hook_from_module(pipe.transformer)
        add_hook_to_module(pipe.transformer, ModelHook())
        pipe(steps=7)
        assert (run.report().steps, run.report().steps_computed) == (14, 8)
    remove_hook_from_module(pipe.transformer)
    assert traces(pipe.transformer) in ([], [".forward"])
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward


def test_a_wrapper_put_on_later_survives_removal() -> None:
    model, inputs, calls = FLUX.model(), FLUX.inputs(), []

    class Counting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    with torch.no_grad():
        dense = output(model(**inputs))
        run = ditkit.apply(model, TaylorSeer(interval=3))
        add_hook_to_module(model, Counting())
        add_hook_to_module(model.transformer_blocks[0].attn, Counting())
        run.remove()
        assert torch.equal(output(model(**inputs)), dense) and len(calls) == 2
        assert run.report().steps == 0
    assert [trace for trace in traces(model) if "_diffusers_hook" in trace] == []


def test_hooks_that_were_there_before_stay() -> None:
    from diffusers import FirstBlockCacheConfig

    model = FLUX.model()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    before = traces(model)
    with ditkit.apply(model):
        pass
    assert traces(model) == before
    model.disable_cache()


def test_diffusers_tells_its_context_also_after_an_earlier_call_without_methods() -> None:
    """diffusers lists hooked children at the first context and keeps that list."""
    model = FLUX.model()
    with torch.no_grad(), model.cache_context("cond"):
        model(**FLUX.inputs())
    with ditkit.apply(model, TaylorSeer(interval=2)) as run, torch.no_grad():
        for index in range(6):
            for branch in ("cond", "uncond"):
                with model.cache_context(branch):
                    model(**FLUX.inputs(noise=1 - index / 6))
    assert run.report().branches == {
        "cond": {"computed": 4, "forecast": 2},
        "uncond": {"computed": 4, "forecast": 2},
    }


def test_the_list_of_hooked_children_is_renewed() -> None:
    model = FLUX.model()
    with model.cache_context("cond"):
        pass
    registry = model._diffusers_hook
    assert registry._get_child_registries() == []
    with ditkit.apply(model, TaylorSeer()):
        assert len(registry._get_child_registries()) > 8
    assert registry._get_child_registries() == []


def test_saving_while_applied(tmp_path: Path) -> None:
    pipe = Pipe(FLUX.model(), FLUX)
    with ditkit.apply(pipe, TaylorSeer(interval=2)):
        pipe(steps=6)
        pipe.transformer.save_pretrained(tmp_path / "transformer")
        pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = type(pipe.transformer).from_pretrained(tmp_path / "transformer")
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert type(FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")) is type(
        pipe.scheduler
    )


def test_report_reads_well() -> None:
    model = FLUX.model()
    with ditkit.apply(model, TaylorSeer(interval=3)) as run:
        denoise(model, FLUX, 9)
    report = run.report()
    text = str(report)
    assert "5 computed + 4 forecast = 9" in text and "TaylorSeer(interval=3)" in text
    assert report.flops_saved is not None and 0 < report.flops_saved < 4 / 9
    assert report.as_dict()["flops_saved"] == report.flops_saved
    from rich.console import Console

    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert "forecast" in console.export_text()


def test_a_compiled_wrapper_is_looked_through() -> None:
    model = FLUX.model()
    compiled = torch.compile(model, backend="eager")
    with ditkit.apply(compiled, TaylorSeer()) as run:
        assert run.hosts[0].model is model
    assert traces(model) == []


def test_nothing_is_kept_alive_after_removal() -> None:
    import weakref

    model = FLUX.model()
    run = apply(model, TaylorSeer(interval=2))
    denoise(model, FLUX, 5)
    run.remove()
    watcher = weakref.ref(model)
    del model
    run.hosts.clear()
    gc.collect()
    assert watcher() is None


def test_an_exception_in_a_block_starts_a_new_generation() -> None:
    model = FLUX.model()
    with ditkit.apply(model, TaylorSeer(interval=3)) as run:
        handle = model.single_transformer_blocks[1].register_forward_pre_hook(_raise)
        with contextlib.suppress(ZeroDivisionError):
            denoise(model, FLUX, 4)
        handle.remove()
        assert run.hosts[0].running is False
        denoise(model, FLUX, 4)
        assert run.report().generations == 2


def _raise(module: nn.Module, args: Any) -> None:
    raise ZeroDivisionError
