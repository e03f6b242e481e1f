"""Re-ttention against its authors' code: one attention module driven along many steps, its mask, its output
and the kept ratio after every step.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Call, part, through
from torch import Tensor

from ditkit.methods.re_ttention import ReTtention
from ditkit.seams.layout import TokenLayout
from ditkit.seams.steps import Step
from golden import cases, read

TOLERANCE = 1e-5
# The authors' three processors: dense steps at the start and the last step that is full.
SCHEDULES = {"pixart": (5, 15), "hunyuan": (10, None), "cogvideo": (15, None)}
FILES = cases("re-ttention")


def processor_of(case: dict[str, Any]) -> str:
    """Which of the authors' processors made the file, by the words of its case."""
    likely = [field for field in ("processor", "model", "name", "what") if field in case]
    for field in dict.fromkeys([*likely, *case]):
        words = str(case[field]).lower()
        found = [name for name in SCHEDULES if name in words]
        if len(found) == 1:
            return found[0]
    raise AssertionError(f"the case names no processor of {', '.join(SCHEDULES)}: {case}")


def layout_of(case: dict[str, Any], tensors: dict[str, Tensor]) -> TokenLayout:
    if "tokens_per_frame" not in case:
        return TokenLayout((1, 1, tensors["inputs.hidden_states_per_step"].shape[2]))
    text = case.get("text_tokens", 0)
    return TokenLayout((case["frames"], 1, case["tokens_per_frame"]), text, "prefix" if text else "none")


def method_of(case: dict[str, Any], **changes: Any) -> ReTtention:
    warmup, last = SCHEDULES[processor_of(case)]
    options = {"band": "exact", "block": 16, "warmup": warmup, "last_refresh": last, **changes}
    window = case.get("window_size", case.get("window_arg"))
    if window is None:
        return ReTtention(keep=case["sparsity_arg"], **options)
    return ReTtention(window=window, **options)


def module_of(case: dict[str, Any], tensors: dict[str, Tensor]) -> torch.nn.Module:
    """diffusers' attention module with the processor of that model. Where the case leaves open the norms'
    epsilon (these models' blocks have 1e-6, the class 1e-5) the first step, which is dense, tells it."""
    found = [_module(case, tensors, eps) for eps in ([case["eps"]] if "eps" in case else [1e-6, 1e-5])]
    expected = tensors["outputs.hidden_states_per_step"][0]
    with torch.no_grad():
        return min(
            found,
            key=lambda module: float((run(module, tensors, 0)[0] - expected).abs().max()),
        )


def _module(case: dict[str, Any], tensors: dict[str, Tensor], eps: float) -> torch.nn.Module:
    from diffusers.models.attention_processor import (
        Attention,
        AttnProcessor2_0,
        CogVideoXAttnProcessor2_0,
        HunyuanAttnProcessor2_0,
    )

    weights = part(tensors, "weights")
    processors = {
        "pixart": AttnProcessor2_0,
        "hunyuan": HunyuanAttnProcessor2_0,
        "cogvideo": CogVideoXAttnProcessor2_0,
    }
    known = set(inspect.signature(Attention).parameters) - {"processor"}
    options: dict[str, Any] = {
        "query_dim": weights["to_q.weight"].shape[1],
        "heads": case["heads"],
        "dim_head": case["head_dim"],
        "bias": "to_q.bias" in weights,
        "out_bias": "to_out.0.bias" in weights,
        "qk_norm": "layer_norm" if "norm_q.weight" in weights else None,
        "eps": eps,
        **{key: value for key, value in case.items() if key in known},
    }
    attention = Attention(**options, processor=processors[processor_of(case)]()).eval()
    attention.load_state_dict(weights)
    return attention


def run(attention: torch.nn.Module, tensors: dict[str, Tensor], index: int) -> tuple[Tensor, Tensor | None]:
    """The module at one step: image and text."""
    inputs, tables = part(tensors, "inputs"), rotary(tensors)
    rest: dict[str, Any] = {} if tables is None else {"image_rotary_emb": tables}
    if "encoder_hidden_states_per_step" in inputs:
        rest["encoder_hidden_states"] = inputs["encoder_hidden_states_per_step"][index]
    found = attention(inputs["hidden_states_per_step"][index], **rest)
    return found if isinstance(found, tuple) else (found, None)


def rotary(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Tables (L, d), under whatever name."""
    inputs = {name: value for name, value in part(tensors, "inputs").items() if "per_step" not in name}
    tables = [[value for name, value in inputs.items() if word in name] for word in ("cos", "sin")]
    if not any(tables):
        assert not inputs, f"inputs this test does not know: {sorted(inputs)}"
        return None
    (cos,), (sin,) = tables
    return cos, sin


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("path", FILES)
def test_mask(path: Path):
    case, tensors = read(path)
    layout, expected = layout_of(case, tensors), tensors["outputs.mask"].bool()
    method = method_of(case)
    plan = method.static_mask(layout, torch.device("cpu"))
    assert torch.equal(plan.mask[0, 0], expected)
    assert method.density(layout.grid, layout.text_length) == pytest.approx(float(expected.double().mean()))
    widened = method_of(case, band="blocks", block=4).static_mask(layout, torch.device("cpu"))
    assert (widened.mask[0, 0] | ~expected).all()


@pytest.mark.parametrize("executor", ["auto", "dense", "gather"])
@pytest.mark.parametrize("path", FILES)
def test_every_step(path: Path, executor: str):
    case, tensors = read(path)
    layout, attention = layout_of(case, tensors), module_of(case, tensors)
    strategy, call = method_of(case, executor=executor).strategy(), Call()
    outputs = part(tensors, "outputs")
    steps = len(outputs["hidden_states_per_step"])
    with torch.no_grad(), through(strategy, layout, case["heads"], call):
        for index in range(steps):
            call.at = Step(index, steps, 0.0, "0", 0)
            strategy.begin(call.at)
            expected = outputs["ratio_after_step"][index]
            cached = bool((expected >= 0).all())
            if cached and strategy.phase == "dense":
                # The authors' image code takes the ratio at dense steps too, where nothing reads it.
                strategy.phase = "full"
            image, text = run(attention, tensors, index)
            close(image, outputs["hidden_states_per_step"][index])
            if text is not None:
                close(text, outputs["encoder_hidden_states_per_step"][index])
            assert cached == ("ratio" in call.kept)
            if cached:
                ratio = strategy.ratio(call.kept)
                if strategy.phase == "sparse":
                    ratio = ratio + strategy.options.growth  # the authors' grows right after its use
                close(ratio.flatten(0, 1), expected)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
