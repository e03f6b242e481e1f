"""HarmoniCa against the authors' code: the image error proxy, one epoch of training, and sampling by a table.

The authors' step index i counts down from T - 1; row T - 1 - i of our tables is the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.fitting.harmonica import Router, SoftCache, image_error_proxy, learn
from ditkit.methods.harmonica import HarmoniCa, table_of
from ditkit.models.dit import DiT
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.gaussian_sampling import ddim_step, trajectory
from golden import cases, read


def setting(case: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[DiT, GaussianDiffusion]:
    model = DiT(**case["ctor"]).eval().requires_grad_(False)
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    model.load_state_dict({name: t for name, t in weights.items() if not name.startswith("routers.")})
    return model, GaussianDiffusion.create(respacing=f"{case['T']}")


def close(value: Tensor, expected: Tensor, name: str, tolerance: float) -> None:
    """Every row within the tolerance of its own scale: they are of very different size."""
    for index, (row, reference) in enumerate(zip(value, expected, strict=True)):
        error = float((row - reference).abs().max() / reference.abs().max())
        assert error <= tolerance, (name, index, error)


def check_inference(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    model, process = setting(case, tensors)
    table = table_of(tensors["inputs.router_logits"].flip(0), case["threshold"])
    mask = torch.tensor(table).flip(0)
    assert torch.equal(mask.int(), tensors["outputs.compute_mask"])
    method = HarmoniCa(mask=table)
    with ditkit.apply(model, method) as run:
        states = trajectory(process, _guided(model, case, tensors), tensors["inputs.z"], method="ddim")
        close(torch.stack(list(states)), tensors["outputs.trajectory"], "trajectory", 1e-4)
    reused = int((~mask).sum())
    assert run.report().notes[0] == (
        f"HarmoniCa: {reused} of {mask.numel()} module outputs were reused."
        if reused
        else "HarmoniCa: the table computes every module at every step; nothing can be saved."
    )


def check_training(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    model, process = setting(case, tensors)
    steps = case["T"]
    router = Router(torch.stack([tensors[f"weights.routers.{steps - 1 - i}.prob"] for i in range(steps)]))
    optimizer, start = router.optimizer(case["lr"]), tensors["inputs.x_T"]
    network, soft = _guided(model, case, tensors), SoftCache(case["ste_threshold"])
    rows: dict[str, list[Tensor]] = {}

    def note(name: str, value: Any) -> None:
        rows.setdefault(name, []).append(torch.as_tensor(value).clone())

    with ditkit.apply(model, soft) as run:

        def final(scores: Sequence[Tensor]) -> Tensor:
            run.restart()
            soft.mode, soft.scores = "soft", [row.clone() for row in scores]
            return list(trajectory(process, network, start, method="ddim"))[-1]

        weights = image_error_proxy(final, router.logits.sigmoid())
        run.restart()
        x = start
        for index in range(steps):
            t = torch.full((len(x),), steps - 1 - index)
            soft.mode, soft.scores = "soft", [row.sigmoid() for row in router.rows]
            student = network(x, process.model_timestep(t))
            if index:
                soft.mode = "full"
                with torch.no_grad():
                    teacher = network(x, process.model_timestep(t))
                for name, value in learn(
                    router, optimizer, index, teacher - student, weights[index], case["l1"]
                ).items():
                    note(name, value)
                note("router_grad", router.rows[index].grad)
                note("router_logits_after_step", router.rows[index].detach())
                note("teacher", teacher)
                note("student", student.detach())
            x = ddim_step(process, student.detach(), x, t, torch.zeros_like(x))
            note("x_after_each_step", x)
    found = {name: torch.stack(values) for name, values in rows.items()}
    for kind in ("teacher", "student"):
        found[f"{kind}_first"], found[f"{kind}_last"] = found[kind][0], found[kind][-1]
    outputs = {name: value for name, value in tensors.items() if name.startswith("outputs.")}
    expected = {name.removeprefix("outputs."): value for name, value in outputs.items()}
    proxy = torch.tensor(weights[1:]).flip(0)
    # A squared distance of pictures of size 1, the smallest 2e-5: it is known to a last bit of the pictures.
    last_bit = torch.finfo(torch.float32).eps
    torch.testing.assert_close(proxy.sqrt(), expected.pop("lambda").sqrt(), rtol=1e-3, atol=last_bit)
    for name, value in expected.items():
        # lambda enters the losses and the gradients, with its own tolerance.
        close(found[name], value, name, 1e-3 if name in ("loss", "router_grad") else 1e-4)


def _guided(model: DiT, case: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    return lambda x, t: model.forward_with_cfg(x, t, tensors["inputs.y"], case["cfg_scale"])


@pytest.mark.parametrize("path", cases("harmonica"))
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    check_training(case, tensors) if "inputs.x_T" in tensors else check_inference(case, tensors)


def test_there_are_golden_files() -> None:
    assert cases("harmonica")
