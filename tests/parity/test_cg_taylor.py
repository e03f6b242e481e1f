"""CG-Taylor against the authors' code: which steps run, the gate's errors, and sampling with guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.methods.cg_taylor import GATE_ERROR, CGTaylor
from ditkit.models.dit import DiT
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.gaussian_sampling import trajectory
from ditkit.seams.stats import Report
from golden import cases, read


def sample(
    case: dict[str, Any], tensors: dict[str, Tensor], *methods: CGTaylor
) -> tuple[Tensor, Report, list[bool]]:
    """All states (steps, B, C, H, W), the report, and whether the blocks after the first ran, by step."""
    model = DiT(**case["ctor"]).eval()
    model.load_state_dict(
        {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    )
    sampler, _, options = case["sampler"].partition(" ")
    process = GaussianDiffusion.create(respacing=str(case["steps"]))
    ran: list[bool] = []
    model.blocks[1].attn.register_forward_hook(lambda *_: ran.__setitem__(-1, True))

    def guided(x: Tensor, t: Tensor) -> Tensor:
        ran.append(False)
        return model.forward_with_cfg(x, t, tensors["inputs.y"], case["cfg_scale"])

    with ditkit.apply(model, *methods) as run:
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
    return result, run.report(), ran


@pytest.mark.parametrize("path", cases("cg-taylor"))
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    method = CGTaylor(
        threshold=case["threshold"],
        first_order=case["first_block_order"],
        last_order=case["last_block_order"],
        warmup=case["mid_cor"] + 1,
        num_steps=case["steps"],
    )
    states, report, ran = sample(case, tensors, method)
    errors = report.series[GATE_ERROR]
    found = {
        "is_full": torch.tensor(ran),
        "gate_error": torch.tensor([errors.get(index, -1.0) for index in range(case["steps"])]),
        "trajectory": states[case["rows"]],
        "final_full_compute": sample(case, tensors)[0][-1],
    }
    expected = {
        name.removeprefix("outputs."): t for name, t in tensors.items() if name.startswith("outputs.")
    }
    assert found["is_full"].tolist() == expected.pop("is_full").bool().tolist()
    assert report.computed_at == [index for index, full in enumerate(ran) if full]
    torch.testing.assert_close(found["gate_error"], expected.pop("gate_error"), atol=1e-5, rtol=0)
    for name, value in expected.items():
        error = float((found[name] - value).abs().max())
        assert error <= 1e-4 * float(value.abs().max()), (name, error)
    rows, tokens, width = len(tensors["inputs.z"]), *_tokens(case["ctor"])
    assert report.bytes_cached == method.tensors_held * rows * tokens * width * 4


def _tokens(config: dict[str, Any]) -> tuple[int, int]:
    """Tokens and width of the model of a case."""
    size = config["input_size"]
    height, width = (size, size) if isinstance(size, int) else size
    patch = config.get("patch_size", 2)
    return (height // patch) * (width // patch), config.get("hidden_size", 1152)


def test_there_are_golden_files() -> None:
    assert cases("cg-taylor")
