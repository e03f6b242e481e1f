"""Every method of the registry on every class of the facts: it runs, or refuses by name before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ditkit
from ditkit.registry import entries
from ditkit.seams.errors import SeamError
from ditkit.seams.facts import FACTS
from tiny_models import output
from zoo import ZOO

# Settings at which a method acts within four steps on a few tokens; its defaults where nothing is given.
SHORT: dict[str, dict[str, Any]] = {
    "taylorseer": {"interval": 2, "warmup": 1},
    "cg-taylor": {"threshold": 0.1, "warmup": 1},
    "local-window": {"radius": 1},
    "grat": {"group": (1, 2, 1)},
    "draft-attention": {"sparsity": 0.5, "pool": (2, 2), "dense_blocks": 1, "dense_steps": 0.2},
    "re-ttention": {"keep": 0.25, "block": 2, "warmup": 1, "refresh": 3},
}
NOISE = (0.9, 0.7, 0.5, 0.3)


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_every_method_runs_or_refuses(name: str) -> None:
    tiny = ZOO[name]
    model = tiny.model()
    inputs = tiny.inputs(batch=1)
    expected = output(model(**inputs))
    for method, entry in entries("method").items():
        started: list[int] = []
        first = FACTS[name].blocks(model)[0][2]
        handle = next(iter(first.children())).register_forward_pre_hook(lambda *_, to=started: to.append(1))
        try:
            with ditkit.apply(model, entry.target(**SHORT.get(method, {})), count_flops=False):
                for noise in NOISE:
                    arguments = {**inputs, tiny.timestep: tiny.time(1, noise)}
                    found = output(model(**arguments))
                    assert found.shape == expected.shape, method
                    assert bool(found.isfinite().all()), method
        except SeamError as refusal:
            assert str(refusal), method
            assert not started, f"{method} refused in the middle of a forward: {refusal}"
        finally:
            handle.remove()
        assert torch.equal(output(model(**inputs)), expected), method
    assert not any(hasattr(module, "_diffusers_hook") for module in model.modules())
