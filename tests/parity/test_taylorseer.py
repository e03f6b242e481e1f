"""TaylorSeer against the authors' code: schedule, factors, forecasts, and sampling with guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.methods.taylorseer import TaylorSeer
from ditkit.models.dit import DiT
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.gaussian_sampling import trajectory
from ditkit.seams.extrapolate import Trajectory
from golden import cases, read

SCHEDULES = {"DiT": "dit", "FLUX": "flux", "HunyuanVideo": "hunyuan", "Wan": "wan"}


def schedule_of(case: dict[str, Any]) -> str:
    """The schedule of the variant that a file names, e.g. "FLUX (step index counts up from 0)"."""
    variant = case["variant"].replace("2.1", "").split()[0].strip("(),:")
    return SCHEDULES[variant]


def forecast(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features of every step in visiting order, computed or forecast, and the factors after it."""
    method = TaylorSeer(
        interval=case["interval"],
        order=case["max_order"],
        schedule=schedule_of(case),  # type: ignore[arg-type]
        warmup=case["first_enhance"],
    )
    steps, series = case["T"], tensors["inputs.features_by_step"]
    counts_down = method.schedule == "dit"
    features = Trajectory(method.order)
    full = set(method.full_steps(steps))
    rows: dict[str, list[Any]] = {"is_full": [], "features": [], "num_factors": [], "factors": []}
    for visit in range(steps):
        index = steps - 1 - visit if counts_down else visit
        if visit in full:
            features.add(index, series[index], method.highest_order(visit))
        factors = [*features.factors]
        rows["is_full"].append(int(visit in full))
        rows["features"].append(series[index] if visit in full else features.at(index))
        rows["num_factors"].append(len(factors))
        absent = [torch.zeros_like(series[0])] * (method.order + 1 - len(factors))
        rows["factors"].append(torch.stack([*factors, *absent]))
    return {
        "is_full": torch.tensor(rows["is_full"]),
        "num_factors": torch.tensor(rows["num_factors"]),
        "features": torch.stack(rows["features"]),
        "factors": torch.stack(rows["factors"]),
    }


def sample(case: dict[str, Any], tensors: dict[str, Tensor], method: TaylorSeer | None) -> Tensor:
    """All states (steps, B, C, H, W) of the sampling loop of the case, with a method applied or without."""
    model = DiT(**case["ctor"]).eval()
    weights = {
        name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")
    }
    model.load_state_dict(weights)
    sampler, _, options = case["sampler"].partition(" ")
    process = GaussianDiffusion.create(respacing=str(case["steps"]))

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return model.forward_with_cfg(x, t, tensors["inputs.y"], case["cfg_scale"])

    with ditkit.apply(model, *([method] if method else [])) as run:
        states = trajectory(
            process,
            guided,
            tensors["inputs.z"],
            method=sampler,  # type: ignore[arg-type]
            eta=float(options.removeprefix("eta=")) if options else 0.0,
            clip=case["clip_denoised"],
            noises=tensors.get("inputs.step_noises"),
        )
        result = torch.stack(list(states))
    report = run.report()
    expected = len(method.full_steps(case["steps"])) if method else case["steps"]
    assert (report.steps_computed, report.steps) == (expected, case["steps"])
    return result


def check_sampling(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    method = TaylorSeer(interval=case["interval"], order=case["max_order"], schedule="dit")
    reuse = TaylorSeer(interval=case["interval"], order=0, schedule="dit")
    computed = {
        "trajectory_taylorseer": lambda: sample(case, tensors, method)[case["rows_taylorseer"]],
        "trajectory_full": lambda: sample(case, tensors, None)[case["rows_full"]],
        "final_reuse_only": lambda: sample(case, tensors, reuse)[-1],
    }
    for name, expected in tensors.items():
        if name.startswith("outputs."):
            scale = float(expected.abs().max())
            value = computed[name.removeprefix("outputs.")]()
            assert float((value - expected).abs().max()) <= 1e-4 * scale, name


@pytest.mark.parametrize("path", cases("taylorseer"))
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    if "features_by_step" not in " ".join(tensors):
        check_sampling(case, tensors)
        return
    computed = forecast(case, tensors)
    for name, value in computed.items():
        torch.testing.assert_close(
            value,
            tensors[f"outputs.{name}"].to(value.dtype),
            atol=1e-5,
            rtol=0,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_there_are_golden_files() -> None:
    assert cases("taylorseer")
