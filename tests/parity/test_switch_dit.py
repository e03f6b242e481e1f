"""Switch-DiT against the authors' code: the network with its masks and gates; the prior loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.models.switch_dit import SwitchDiT, match, matching_cost, prior_divergence, prior_table
from golden import cases, compare, load, part, read, record

SYSTEM = "switch-dit"
Tensors = dict[str, Tensor]


def network_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    options = dict(case["args"])
    if options.get("num_classes") == 1:  # unconditional: no label to drop
        options.setdefault("class_dropout_prob", 0.0)
    model = SwitchDiT(
        **options,
        num_experts=case["num_experts"],
        active_experts=case["k"],
        num_timesteps=case["taskcount"],
    )
    load(SYSTEM, model, part(tensors, "weights"))
    inputs = part(tensors, "inputs")
    inputs.setdefault("y", torch.zeros(len(inputs["x"]), dtype=torch.long))
    names = {f"blocks.{i}": f"block.{i}" for i in range(len(model.blocks))}
    names |= {f"blocks.{i}.router": f"mask.{i}" for i in range(len(model.blocks))}
    with record(model, names) as seen:
        computed = {"sample": model(inputs["x"], inputs["t"], inputs["y"]).sample}
    with record(model, names) as trained, torch.enable_grad():  # another order of work when it trains
        model(inputs["x"], inputs["t"], inputs["y"])
    compare(trained, seen, atol=1e-5)
    gates = model.probabilities(inputs["t"]).split(case["num_experts"], dim=1)
    return {
        **computed,
        **{names[name]: value for name, value in seen.items()},
        **{f"probs.{index}": value for index, value in enumerate(gates)},
        "q_full": model.choices(),
    }


def prior_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    inputs, expected = part(tensors, "inputs"), part(tensors, "outputs")
    choices, depth = inputs["q_full"].float(), case["depth"]
    prior = prior_table(len(choices), depth, case["num_experts"], case["k"])
    cost, assignment = matching_cost(choices, prior), match(choices, prior)
    # Ties: the assignment is compared by its cost, the loss computed with the authors' assignment.
    theirs = expected["assignment"].long()
    probabilities = inputs["probs"].clone().requires_grad_()
    with torch.enable_grad():
        loss = prior_divergence(probabilities, prior[inputs["t"].long()][:, theirs], depth, case["eps"])
        (gradient,) = torch.autograd.grad(loss, probabilities)
    matched = prior[inputs["t"].long()][:, theirs]
    assert sorted(assignment.tolist()) == list(range(len(cost)))
    return {
        "prior_table": prior,
        "cost": cost,
        "assignment": expected["assignment"],
        "assignment_cost": cost[torch.arange(len(cost)), assignment].sum(),
        "target": matched / matched.sum(1, keepdim=True),
        "jsd": loss,
        "grad_probs": gradient,
    }


@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    outputs = network_outputs if "args" in case else prior_outputs
    compare(outputs(case, tensors), part(tensors, "outputs"), atol=1e-5)
