"""RAS against the authors' code: their scheduler fed with given outputs, and a tiny SD3 with guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import ditkit
from ditkit.methods.ras import RAS, Focus
from ditkit.seams.patches import Patches
from golden import cases, read

# What the metadata calls an option -> what it is called here.
OPTIONS = {
    "sample_ratio": "sample_ratio",
    "scheduler_start_step": "start",
    "scheduler_end_step": "end",
    "metric": "metric",
    "high_ratio": "high_ratio",
    "starvation_scale": "starvation_scale",
    "skip_num_step": "skip_num_step",
    "skip_num_step_length": "skip_num_step_length",
}


def method_of(case: dict[str, Any]) -> RAS:
    given = {ours: case[theirs] for theirs, ours in OPTIONS.items() if theirs in case}
    return RAS(
        **given,
        error_reset_steps=tuple(case["error_reset_steps"]),
        starvation="released",
        empty_slice=True,
    )


def scheduler_of(case: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=case["shift"])
    scheduler.set_timesteps(case["steps"])
    return scheduler


def padded(rows: list[Tensor], like: Tensor) -> Tensor:
    """Index sets of several lengths as the rows of one tensor, with -1 behind."""
    table = torch.full_like(like, -1)
    for row, indices in enumerate(rows):
        table[row, : len(indices)] = indices
    return table


def scheduled(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' scheduler: outputs of all tokens go in, those of the inactive ones are replaced."""
    method, scheduler, steps = method_of(case), scheduler_of(case), case["steps"]
    x = tensors["inputs.latents"]
    side = case.get("patch_size", 2)
    patches = Patches((1, x.shape[-2] // side, x.shape[-1] // side), tuple(x.shape))
    focus, tokens = Focus(method), x.shape[-2] * x.shape[-1] // side**2
    kept = torch.zeros_like(x)
    found: dict[str, list[Any]] = {"trajectory": [], "active_tokens_next_step": [], "drop_count": []}
    for index in range(steps):
        velocity = tensors["inputs.model_outputs"][index]
        if method.runs_some(index, steps) and focus.active is not None:
            ran = torch.zeros(1, tokens, dtype=torch.bool).scatter_(1, focus.active, True)
            velocity = torch.where(patches.spread(ran), velocity, kept)
        change = (scheduler.sigmas[index + 1] - scheduler.sigmas[index]) * velocity
        x = x + change
        if method.chooses_for(index + 1, steps) and index + 1 < steps:
            focus.choose(index + 1, steps, change, patches)
            kept = velocity
        shown = method.runs_some(index + 1, steps) and index + 1 < steps and focus.active is not None
        found["trajectory"].append(x)
        found["active_tokens_next_step"].append(focus.active[0] if shown else torch.empty(0))
        drops = torch.zeros(tokens) if focus.drops is None else focus.drops[0]
        found["drop_count"].append(drops - (steps + 1))
    return {
        "sigmas": scheduler.sigmas,
        "timesteps": scheduler.timesteps,
        "trajectory": torch.stack(found["trajectory"]),
        "is_ras_step": torch.tensor([int(method.runs_some(index, steps)) for index in range(steps)]),
        "active_tokens_next_step": padded(
            found["active_tokens_next_step"], tensors["outputs.active_tokens_next_step"]
        ),
        "drop_count": torch.stack(found["drop_count"]),
        "skip_token_num_list": torch.tensor(method.skip_counts(steps, tokens)),
    }


def model_of(case: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    model = getattr(diffusers, case["model"].split()[-1])(**case["ctor"]).eval()
    weights = {
        name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")
    }
    model.load_state_dict(weights)
    return model


class Loop:
    """A pipeline's denoising loop with both guidance branches in one batch, unconditional first; or, as
    other pipelines do, in two forwards."""

    def __init__(self, case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.case, self.tensors = case, tensors
        self.components = {"transformer": model_of(case, tensors), "scheduler": scheduler_of(case)}
        self.scheduler = self.components["scheduler"]

    @torch.no_grad()
    def __call__(self, run: ditkit.Run | None = None, *, passes: int = 1) -> dict[str, Tensor]:
        case, tensors = self.case, self.tensors
        model, scheduler = self.components["transformer"], self.components["scheduler"]
        scheduler.set_timesteps(case["steps"])
        x = tensors["inputs.latents"]
        active: list[Tensor] = []

        def look(module: Any, args: Any) -> None:
            seen = run.hosts[0].tokens.active if run else None
            tokens = tensors["outputs.active_tokens"].shape[1]
            active.append(torch.arange(tokens) if seen is None else seen.indices)

        handle = model.transformer_blocks[0].norm2.register_forward_pre_hook(look)
        states, outputs, sets = [], [], []
        text, pooled = tensors["inputs.encoder_hidden_states"], tensors["inputs.pooled_projections"]
        for time in scheduler.timesteps:
            active.clear()
            predicted = [
                model(
                    hidden_states=x.repeat(len(part), 1, 1, 1),
                    encoder_hidden_states=part,
                    pooled_projections=pool,
                    timestep=time.expand(len(part)),
                    return_dict=False,
                )[0]
                for part, pool in zip(text.chunk(passes), pooled.chunk(passes), strict=True)
            ]
            free, given = torch.cat(predicted).chunk(2)
            guided = free + case["guidance"] * (given - free)
            x = scheduler.step(guided, time, x, return_dict=False)[0]
            states.append(x)
            outputs.append(guided)
            sets.append(active[0])
        handle.remove()
        return {
            "timesteps": scheduler.timesteps,
            "trajectory": torch.stack(states),
            "guided_model_output": torch.stack(outputs),
            "active_tokens": padded(sets, tensors["outputs.active_tokens"]),
        }


def piped(case: dict[str, Any], tensors: dict[str, Tensor], passes: int) -> dict[str, Tensor]:
    loop = Loop(case, tensors)
    dense = loop()["trajectory"][-1]
    with ditkit.apply(loop, method_of(case)) as run:
        found = loop(run, passes=passes)
    # The authors hand zeros to their scheduler where we give the kept velocities.
    for index, active in enumerate(tensors["outputs.active_tokens"]):
        x = tensors["inputs.latents"]
        side = case["ctor"]["patch_size"]
        patches = Patches((1, x.shape[-2] // side, x.shape[-1] // side), tuple(x.shape))
        ran = torch.zeros(1, len(active)).scatter_(1, active[active >= 0][None], 1.0)
        found["guided_model_output"][index] *= patches.spread(ran)
    return {**found, "final_dense": dense}


@pytest.mark.parametrize("path", cases("ras"))
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    if "inputs.model_outputs" in tensors:
        computed, tolerance = [scheduled(case, tensors)], 1e-5
    else:
        computed, tolerance = [piped(case, tensors, passes) for passes in (1, 2)], 1e-4
    expected = {name: value for name, value in tensors.items() if name.startswith("outputs.")}
    assert expected
    for found in computed:
        for name, value in expected.items():
            ours = found[name.removeprefix("outputs.")].to(value.dtype)
            exact = not value.is_floating_point() or name.endswith("drop_count")
            torch.testing.assert_close(
                ours,
                value,
                atol=0 if exact else tolerance,
                rtol=0,
                msg=lambda m, name=name: f"{name}: {m}",
            )


def test_there_are_golden_files() -> None:
    assert cases("ras")
