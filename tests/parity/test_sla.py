"""SLA against the authors' kernels: block map, forward, gradients of q, k, v and of Proj."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditkit.methods.sla import SLA
from ditkit.seams.layout import TokenLayout
from golden import cases, read

FORWARD, BACKWARD = 1e-5, 2e-5
FILES = cases("sla")
KNOWN = {
    "what", "head_dim", "topk", "feature_map", "BLKQ", "BLKK", "batch", "heads", "tokens", "compute_dtype",
    "selected_blocks_per_row", "seed", "system", "name",
}  # fmt: skip


def variant(case: dict[str, Any]) -> str:
    """Which of the authors' branches wrote the file."""
    if "SLA-1" in case["what"]:
        return "v1"
    assert "main branch" in case["what"], f"a branch this test does not know: {case['what']}"
    return "v2"


def setup(
    path: Path, executor: str = "auto"
) -> tuple[dict[str, Any], dict[str, Tensor], Any, nn.Linear, Any]:
    case, tensors = read(path)
    assert set(case) <= KNOWN, f"{path.name}: options this test does not know: {sorted(set(case) - KNOWN)}"
    assert case.get("compute_dtype", "float32") == "float32"
    options = SLA(
        topk=case["topk"],
        variant=variant(case),  # pyright: ignore[reportArgumentType]
        feature_map=case["feature_map"],
        block_q=case["BLKQ"],
        block_kv=case["BLKK"],
        executor=executor,  # pyright: ignore[reportArgumentType]
    )
    length, width = tensors["inputs.q"].shape[-2:]
    proj = nn.Linear(width, width)
    proj.load_state_dict({name: tensors[f"weights.proj_l.{name}"].clone() for name in ("weight", "bias")})
    strategy = options.strategy()
    plan = strategy.plan(TokenLayout((1, 1, length)), tensors["inputs.q"].shape[1], torch.device("cpu"))
    return case, tensors, strategy, proj, plan


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("path", FILES)
def test_block_map(path: Path):
    case, tensors, strategy, _, plan = setup(path)
    expected = tensors["outputs.block_map"].bool()
    critical, marginal = strategy.classify(tensors["inputs.q"], tensors["inputs.k"], plan)
    found = torch.zeros_like(expected).scatter(-1, critical, True)
    assert torch.equal(found, expected)
    if "selected_blocks_per_row" in case:
        assert strategy.options.kept(expected.shape[-1]) == case["selected_blocks_per_row"]
    if marginal is not None:
        assert torch.equal(marginal, ~expected)


@pytest.mark.parametrize("executor", ["dense", "gather"])
@pytest.mark.parametrize("path", FILES)
def test_forward_and_gradients(path: Path, executor: str):
    _, tensors, strategy, proj, plan = setup(path, executor)
    q, k, v = (tensors[f"inputs.{name}"].clone().requires_grad_() for name in "qkv")
    out = strategy.compute(q, k, v, proj, plan)
    torch.testing.assert_close(out, tensors["outputs.attention"], atol=FORWARD, rtol=FORWARD)
    out.backward(tensors["inputs.grad_output"])
    found = {"q": q, "k": k, "v": v, "proj_l_weight": proj.weight, "proj_l_bias": proj.bias}
    for name, tensor in found.items():
        expected = tensors[f"outputs.grad_{name}"]
        torch.testing.assert_close(tensor.grad, expected, atol=BACKWARD, rtol=BACKWARD)
