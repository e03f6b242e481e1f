"""The attention that training on a CPU takes in bf16: the same as torch's, and only there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.training.short_attention import short_attention

CPU = torch.device("cpu")


def operands(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def operators(tokens: int, dtype: torch.dtype, device: torch.device = CPU, **options: object) -> set[str]:
    """Names of the operators that a forward runs."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profile, short_attention(device):
        F.scaled_dot_product_attention(*operands(tokens, dtype), **options)  # type: ignore[arg-type]
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_torch(scale: float | None, masked: bool) -> None:
    mask = torch.zeros(2, 1, 1, 24).masked_fill(torch.arange(24) > 20, -1e4) if masked else None
    exact = operands(24, torch.float32)
    F.scaled_dot_product_attention(*exact, attn_mask=mask, scale=scale).square().sum().backward()
    ours = operands(24, torch.float32)
    with short_attention(CPU), torch.autocast("cpu", torch.bfloat16):
        attended = F.scaled_dot_product_attention(*ours, attn_mask=mask, scale=scale)
        assert attended.dtype == torch.bfloat16
        attended.float().square().sum().backward()
    for found, right in zip(ours, exact, strict=True):
        assert found.grad is not None and right.grad is not None
        error = (found.grad - right.grad).norm() / right.grad.norm()
        assert error < 0.02, error  # a bf16 number has 8 bits


def test_only_short_sequences_in_bf16_on_a_cpu_are_computed_step_by_step() -> None:
    fused = "aten::scaled_dot_product_attention"
    assert fused not in operators(64, torch.bfloat16)
    assert fused not in operators(256, torch.bfloat16)
    assert fused in operators(257, torch.bfloat16)
    assert fused in operators(64, torch.float32)
    assert fused in operators(64, torch.bfloat16, torch.device("meta"))
    assert fused in operators(64, torch.bfloat16, is_causal=True)
    with torch.no_grad():
        assert fused in operators(64, torch.bfloat16)


def test_torchs_function_is_back_afterwards_and_what_replaced_it_stays() -> None:
    original = F.scaled_dot_product_attention
    with pytest.raises(KeyError), short_attention(CPU):
        assert F.scaled_dot_product_attention is not original
        raise KeyError
    assert F.scaled_dot_product_attention is original

    def replaced(*_: object) -> None: ...

    try:
        F.scaled_dot_product_attention = replaced  # type: ignore[assignment]
        with short_attention(CPU):
            assert F.scaled_dot_product_attention is replaced
    finally:
        F.scaled_dot_product_attention = original
