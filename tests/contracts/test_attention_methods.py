"""What sparse attention methods must satisfy: whatever runs them, the result is a masked dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import Call
from torch import Tensor

import ditkit
from ditkit.methods.draft_attention import DraftAttention
from ditkit.methods.grat import GRAT
from ditkit.methods.re_ttention import ReTtention
from ditkit.seams.layout import TokenLayout
from ditkit.seams.steps import Step
from tiny_models import TINY, output

TOLERANCE = 1e-5
ALWAYS: dict[str, Any] = {"dense_blocks": 0, "dense_steps": 0.0}
# Settings that leave something out on the grids and tiny models here; `executor` is added.
METHODS: dict[str, Callable[..., Any]] = {
    "grat-cross": lambda **o: GRAT(group="1x2x2", cross="lines", **o),
    "grat-block": lambda **o: GRAT(pattern="block", group="1x2x1", radius=0, **o),
    "draft": lambda **o: DraftAttention(sparsity=0.6, pool="2x2", **ALWAYS, **o),
    "draft-empty-rows": lambda **o: DraftAttention(sparsity=0.95, pool="2x2", **ALWAYS, **o),
    "draft-max": lambda **o: DraftAttention(
        sparsity=0.9, pool="2x2", empty_rows="best", pooling="max", **ALWAYS, **o
    ),
    "re-ttention": lambda **o: ReTtention(keep=0.1, block=2, warmup=0, **o),
    "re-ttention-exact": lambda **o: ReTtention(keep=0.2, band="exact", block=4, warmup=0, clamp=True, **o),
    "re-ttention-grat": lambda **o: ReTtention(
        mask=GRAT(pattern="block", group="1x2x1", radius=0, **o), warmup=0
    ),
    "re-ttention-local-window": lambda **o: ReTtention(mask="local-window:radius=1.5", warmup=0, **o),
}
TEXTS = [("prefix", 9), ("suffix", 9), ("none", 0), ("cross", 4)]
CLASSES = ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel", "WanTransformer3DModel")
# Every place of the text, padded or not, pictures and video; `test_methods.py` runs all classes.
KINDS = (
    *CLASSES,
    *("SD3Transformer2DModel", "CogVideoXTransformer3DModel", "QwenImageTransformer2DModel"),
    *("PixArtTransformer2DModel", "LTXVideoTransformer3DModel", "HunyuanDiT2DModel", "DiT"),
)


def served(method: Any, layout: TokenLayout, qkv: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """A sparse call outside any model; one that keeps something sees a full step of other inputs first."""
    strategy, call = method.strategy(), Call()
    plan = strategy.plan(layout, qkv[0].shape[1], torch.device("cpu"))
    steps = [0, 2] if isinstance(method, ReTtention) else [2]
    for index in steps:
        call.at = Step(index, 20, 0.0, "0", 0)
        if hasattr(strategy, "begin"):
            strategy.begin(call.at)
        inputs = [x + 0.1 * x.flip(-1).detach() if index == 0 else x for x in qkv]
        out = strategy.attend(*inputs, mask, None, call, plan)
    assert call.shares[-1] < 1
    return out


def padded(layout: TokenLayout, kind: str) -> Tensor | None:
    """A mask (2, 1, 1, L) with another number of valid text tokens for each sample."""
    if kind == "none":
        return None
    valid = torch.ones(2, layout.length, dtype=torch.bool)
    valid[0, layout.text_span][7:] = False
    valid[1, layout.text_span][3:] = False
    keys = valid if kind == "bool" else torch.zeros(valid.shape).masked_fill(~valid, -1e4)
    return keys[:, None, None]


@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("grid", [(1, 8, 6), (3, 7, 5)])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", METHODS)
def test_gather_equals_masked_dense(name: str, text, grid, padding):
    torch.manual_seed(0)
    layout = TokenLayout(grid, text[1], text[0])
    qkv = [torch.randn(2, 3, layout.length, 8) for _ in range(3)]
    mask = padded(layout, padding)
    dense, gather = (served(METHODS[name](executor=e), layout, qkv, mask) for e in ("dense", "gather"))
    torch.testing.assert_close(gather, dense, atol=TOLERANCE, rtol=TOLERANCE)
    if mask is not None and mask.dtype == torch.bool and layout.joint_text_length:
        # What padded text holds changes nothing but its own row.
        changed = [x.clone() for x in qkv]
        for x in changed:
            x[1, :, layout.text_span][:, 3:] += 5.0
        again = served(METHODS[name](executor="gather"), layout, changed, mask)
        kept = torch.ones(layout.length, dtype=torch.bool)
        kept[layout.text_span][3:] = False
        torch.testing.assert_close(again[:, :, kept], gather[:, :, kept], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_gather_and_dense_agree(name: str):
    torch.manual_seed(0)
    layout = TokenLayout((1, 8, 7), 5, "suffix")
    start = [torch.randn(1, 2, layout.length, 8) for _ in range(3)]
    weight, grads = torch.randn_like(start[0]), []
    for executor in ("dense", "gather"):
        qkv = [x.clone().requires_grad_() for x in start]
        (served(METHODS[name](executor=executor), layout, qkv) * weight).sum().backward()
        grads.append([x.grad for x in qkv])
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def steps_of(model: Any, name: str, **options: Any) -> list[Tensor]:
    """Outputs of three steps of a generation."""
    with torch.no_grad():
        return [output(model(**TINY[name].inputs(noise=noise, **options))) for noise in (0.9, 0.5, 0.2)]


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("name", ["grat-cross", "draft", "re-ttention"])
def test_executors_agree_on_models(name: str, model: str):
    network, found = TINY[model].model(), []
    for executor in ("dense", "gather"):
        with ditkit.apply(network, METHODS[name](executor=executor), count_flops=False) as run:
            found.append(steps_of(network, model, batch=2))
        assert run.report().density < 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    dense = steps_of(network, model, batch=2)
    assert not torch.allclose(found[0][-1], dense[-1], atol=1e-5)


@pytest.mark.parametrize("model", CLASSES)
@pytest.mark.parametrize("name", ["grat-block", "draft", "re-ttention"])
def test_gradient_checkpointing(name: str, model: str):
    """Blocks that run again in the backward pass are sparse too: equal gradients."""

    def gradients(checkpoint: bool) -> list[Tensor]:
        network = TINY[model].model().train().requires_grad_(True)
        if checkpoint:
            network.enable_gradient_checkpointing()
        with ditkit.apply(network, METHODS[name](executor="gather"), count_flops=False):
            steps_of(network, model, batch=2)
            output(network(**TINY[model].inputs(batch=2, noise=0.1))).square().sum().backward()
        return [p.grad for p in network.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 0
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("executor", ["dense", "gather"])
@pytest.mark.parametrize("name", ["grat-cross", "draft", "re-ttention"])
def test_compiles_without_graph_breaks(name: str, executor: str):
    model = "FluxTransformer2DModel"
    network, method = TINY[model].model(), METHODS[name](executor=executor)
    with ditkit.apply(network, method, count_flops=False):
        expected = steps_of(network, model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with ditkit.apply(compiled, method, count_flops=False):
        found = steps_of(compiled, model)
    # One graph for each way a step runs: full and sparse.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (2 if name == "re-ttention" else 1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)
    torch._dynamo.reset()
