"""SLA: the parts against plain formulas, every option, learned weights on a model, published counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditkit
from ditkit import artifact
from ditkit.methods.sla import SLA
from ditkit.seams.errors import SeamError
from ditkit.seams.layout import TokenLayout
from tiny_models import TINY, output

WAN = TINY["WanTransformer3DModel"]


def formula(
    q: Tensor, k: Tensor, v: Tensor, proj: nn.Linear, options: SLA, layout: TokenLayout, seen: Tensor
) -> Tensor:
    """The paper's equations, token by token, in raster order; `seen` (L,) tells which keys are valid."""
    L, span = layout.length, layout.image_span
    image = list(range(L))[span]
    text = [i for i in range(L) if i not in image]
    maps = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
            "relu": lambda x: x.clamp(min=0)}  # fmt: skip
    phi = maps[options.feature_map]
    rows = [image[i : i + options.block_q] for i in range(0, len(image), options.block_q)]
    columns = [image[i : i + options.block_kv] for i in range(0, len(image), options.block_kv)]
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        qh, kh, vh = (x[0, head] for x in (q, k, v))
        for row in [*rows, text]:
            if not row:
                continue
            near, far = list(range(L)), []
            if row is not text:
                scores = torch.stack([qh[row].mean(0) @ kh[column].mean(0) for column in columns])
                order = scores.argsort(descending=True).tolist()
                top = max(1, int(options.topk * len(columns)))
                low = int(options.negligible * len(columns))
                near = sorted(text + [i for b in order[:top] for i in columns[b]])
                far = [i for b in order[top : len(order) - low] for i in columns[b]]
            if options.variant == "v2":
                far = list(range(L))
            near, far = ([i for i in part if seen[i]] for part in (near, far))
            weight = (qh[row] @ kh[near].T / math.sqrt(q.shape[-1])).softmax(-1)
            linear = torch.zeros(len(row), q.shape[-1], dtype=q.dtype)
            if far:
                weights = phi(qh[row]) @ phi(kh[far]).T
                below = weights.sum(-1, keepdim=True) + (1e-5 if options.variant == "v2" else 0)
                linear = weights @ vh[far] / below
            out[0, head, row] = weight @ vh[near] + linear @ proj.weight.T + proj.bias
    return out


EIGHT = {"block_q": 8, "block_kv": 8}
CASES: dict[str, tuple[dict[str, Any], TokenLayout]] = {
    "ragged": ({"topk": 0.3, **EIGHT}, TokenLayout((1, 1, 45))),
    "long query blocks": ({"topk": 0.3, **EIGHT, "block_q": 16, "variant": "v1"}, TokenLayout((1, 5, 9))),
    "elu": ({"topk": 0.2, **EIGHT, "feature_map": "elu"}, TokenLayout((1, 8, 8))),
    "relu": ({**EIGHT, "feature_map": "relu", "variant": "v1"}, TokenLayout((1, 8, 8))),
    "negligible": ({"topk": 0.3, **EIGHT, "k_low": 0.4, "variant": "paper"}, TokenLayout((1, 9, 9))),
    "rounds to none": ({"topk": 0.05, **EIGHT, "variant": "v1"}, TokenLayout((1, 8, 8))),
    "prefix": ({"topk": 0.3, **EIGHT, "variant": "v1"}, TokenLayout((2, 4, 5), 7, "prefix")),
    "suffix": ({"topk": 0.3, **EIGHT}, TokenLayout((1, 6, 6), 5, "suffix")),
}


def setup(options: SLA, layout: TokenLayout) -> tuple[Any, Any, nn.Linear, list[Tensor]]:
    torch.manual_seed(0)
    proj = nn.Linear(12, 12)
    strategy = options.strategy({"attn": proj})
    inputs = [torch.randn(1, 2, layout.length, 12) for _ in range(3)]
    return strategy, strategy.plan(layout, 2, torch.device("cpu")), proj, inputs


@pytest.mark.parametrize("executor", ["dense", "gather"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_are_the_formulas(name: str, masked: bool, executor: Any) -> None:
    given, layout = CASES[name]
    options = SLA(**given, executor=executor)
    strategy, plan, proj, inputs = setup(options, layout)
    seen = torch.ones(layout.length, dtype=torch.bool)
    if masked and layout.joint_text_length:
        seen[layout.text_span.stop - 2 : layout.text_span.stop] = False
    mask = seen[None, None, None] if masked else None
    upstream = torch.randn(inputs[0].shape)

    def both(forward: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        proj.zero_grad()
        out = forward(*leaves)
        out.backward(upstream)
        return [out, *(x.grad for x in (*leaves, proj.weight, proj.bias))]

    found = both(lambda q, k, v: strategy.compute(q, k, v, proj, plan, mask))
    expected = both(lambda q, k, v: formula(q, k, v, proj, options, layout, seen))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_relu_of_nothing_is_no_nan() -> None:
    layout = TokenLayout((1, 4, 4))
    options = SLA(topk=0.5, block_q=4, block_kv=4, variant="v1", feature_map="relu")
    strategy, plan, proj, (q, k, v) = setup(options, layout)
    q = (-q.abs()).requires_grad_()
    out = strategy.compute(q, k, v, proj, plan)
    out.sum().backward()
    assert bool(out.isfinite().all()) and bool(q.grad.isfinite().all())


def test_without_projection_it_is_masked_softmax_and_with_all_blocks_full_attention() -> None:
    layout = TokenLayout((1, 6, 6))
    for variant in ("v1", "v2"):
        options = SLA(topk=1.0, block_q=8, block_kv=8, variant=variant)
        strategy, plan, proj, (q, k, v) = setup(options, layout)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        nn.init.zeros_(proj.weight)
        nn.init.zeros_(proj.bias)
        torch.testing.assert_close(strategy.compute(q, k, v, proj, plan), dense)
        nn.init.eye_(proj.weight)
        linear = strategy.compute(q, k, v, proj, plan) - dense
        weights = q.softmax(-1) @ k.softmax(-1).transpose(-1, -2)
        expected = weights @ v / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(
            linear, expected if variant == "v2" else torch.zeros_like(dense), atol=2e-5, rtol=1e-4
        )


def test_boxes_in_place_of_runs() -> None:
    """On reordered tokens boxes are runs."""
    layout = TokenLayout((2, 4, 8))
    boxes = SLA(topk=0.25, block_q=8, block_kv=8, tile="2x2x2", variant="v1")
    strategy, plan, proj, (q, k, v) = setup(boxes, layout)
    order = plan.tiling.order.flatten()
    runs, run_plan, _, _ = setup(SLA(topk=0.25, block_q=8, block_kv=8, variant="v1"), TokenLayout((1, 1, 64)))
    expected = runs.compute(q[:, :, order], k[:, :, order], v[:, :, order], proj, run_plan)
    found = strategy.compute(q, k, v, proj, plan)
    torch.testing.assert_close(found[:, :, order], expected)


def test_heads_in_groups_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TokenLayout((1, 8, 8))
    strategy, plan, proj, (q, k, v) = setup(SLA(topk=0.25, block_q=8, block_kv=8, variant="v1"), layout)
    together = strategy.compute(q, k, v, proj, plan)
    monkeypatch.setattr("ditkit.methods.sla._HELD_BYTES", 1)
    torch.testing.assert_close(strategy.compute(q, k, v, proj, plan), together)


# Published counts.


def test_flops_of_the_paper() -> None:
    """Wan 2.1 1.3B at 480p, 32,760 tokens: the paper's totals are eight times those of one layer."""
    grid = (21, 30, 52)
    full = 4 * math.prod(grid) ** 2 * 1536
    layers = 52.75e12 / full
    assert layers == pytest.approx(8, rel=1e-3)
    for topk, tera in ((0.05, 2.74), (0.1, 5.38), (0.2, 10.65)):
        assert round(layers * SLA(topk=topk).flops(grid) / 1e12, 2) == pytest.approx(tera, abs=0.005)
    linear = SLA(topk=0.05).flops(grid) - 0.05 * full
    assert linear / full == pytest.approx(128 / (2 * math.prod(grid)))
    assert SLA.parameters(30, 128) == 495_360


def test_density_is_the_share_of_pairs_read() -> None:
    for layout in (TokenLayout((1, 8, 8)), TokenLayout((2, 4, 8), 6, "prefix")):
        options = SLA(topk=0.4, block_q=8, block_kv=8)
        strategy, plan, _, (q, k, _) = setup(options, layout)
        critical, _ = strategy.classify(q, k, plan)
        text = layout.joint_text_length
        pairs = (
            critical.shape[-1] * 8 * layout.image_length + layout.image_length * text + text * layout.length
        )
        assert options.density(layout.grid, text) == pytest.approx(pairs / layout.length**2)


# On a model.


def test_gradients_reach_the_model_and_proj() -> None:
    model = WAN.model().requires_grad_(True)
    with ditkit.apply(model, SLA(topk=0.25, block_q=2, block_kv=2)):
        names = [name for name, _ in model.named_parameters() if "proj_l" in name]
        assert len(names) == 6 and names[0] == "blocks.0.attn1.proj_l.weight"
        output(model(**WAN.inputs())).square().mean().backward()
        parameters = dict(model.named_parameters())
        assert all(float(parameters[name].grad.abs().sum()) > 0 for name in names)
        assert float(parameters["blocks.0.attn1.to_q.weight"].grad.abs().sum()) > 0
    assert not any("proj_l" in name for name, _ in model.named_parameters())


def test_weights_are_used_and_taken_off_again(tmp_path: Path) -> None:
    model = WAN.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = output(model(**WAN.inputs()))
    tensors = {
        "blocks.1.attn1.proj_l.weight": torch.randn(12, 12),
        "blocks.0.attn1.to_q.bias": torch.randn(24),
    }
    options = {"topk": 0.5, "block_q": 4, "block_kv": 4, "variant": "v1"}
    folder = artifact.save(tmp_path / "sla", "sla", options, artifact.model_facts(model), tensors)
    with ditkit.apply(model, SLA(weights=str(folder))) as run:
        learned = output(model(**WAN.inputs()))
        assert "2 of 4 key blocks critical" in str(run.report())
        saved = model.state_dict()
        assert torch.equal(saved["blocks.1.attn1.proj_l.weight"], tensors["blocks.1.attn1.proj_l.weight"])
    with ditkit.apply(model, SLA(**options)):
        assert not torch.allclose(output(model(**WAN.inputs())), learned)
    assert {name: True for name in before} == {
        name: torch.equal(value, before[name]) for name, value in model.state_dict().items()
    }
    assert torch.equal(output(model(**WAN.inputs())), dense)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = artifact.save(
        tmp_path / "a", "sla", {}, artifact.model_facts(WAN.model()), {"x": torch.zeros(1)}
    )
    with pytest.raises(SeamError, match=r"WanTransformer3DModel.*FluxTransformer2DModel"):
        ditkit.apply(TINY["FluxTransformer2DModel"].model(), SLA(weights=str(folder)))
    model = WAN.model()
    with pytest.raises(SeamError, match="no parameter 'x'"):
        ditkit.apply(model, SLA(weights=str(folder)))
    assert not any("proj_l" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"topk": 0.0}, "topk"),
        ({"topk": 0.95, "variant": "paper"}, "k_low"),
        ({"variant": "v3"}, "variant"),
        ({"feature_map": "hedgehog"}, "feature_map"),
        ({"block_q": 96}, "block_q"),
        ({"tile": "8x9"}, "tile"),
        ({"tile": "8"}, "8x16"),
    ],
)
def test_wrong_options(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        SLA(**options)
