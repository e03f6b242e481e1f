"""The counters against shapes worked out by hand and against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import tiny_pipelines
from ditkit.analysis.meter import count
from ditkit.analysis.sampling import Sampling, sample

TOKENS, WIDTH, HEADS = 64, 256, 4


class Attend(nn.Module):
    """Two linear layers and attention over their output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.layer(self.layer(x)).view(1, HEADS, -1, WIDTH // HEADS)
        return scaled_dot_product_attention(heads, heads, heads)


LINEAR = 2 * 2 * TOKENS * WIDTH * WIDTH
ATTENTION = 4 * HEADS * TOKENS * TOKENS * (WIDTH // HEADS)
ONE = TOKENS * WIDTH * 4  # bytes of one activation


@pytest.mark.parametrize("grad", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_flops_by_hand(grad) -> None:
    model = Attend()
    with grad(), count(model) as spent:
        for _ in range(3):
            model(torch.randn(TOKENS, WIDTH))
    assert spent.flops_by_forward == [LINEAR + ATTENTION] * 3
    assert spent.flops == 3 * (LINEAR + ATTENTION)


def test_flops_outside_the_model_do_not_count() -> None:
    model = Attend()
    with torch.no_grad(), count(model) as spent:
        torch.randn(64, 64) @ torch.randn(64, 64)
    assert spent.flops == 0
    assert spent.bytes_peak == 0


def test_bytes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
    x = torch.randn(TOKENS, WIDTH)
    with torch.no_grad(), count(model) as spent:
        model(x)
        assert spent.bytes_live == 0
        kept = model(x)
        assert spent.bytes_live == ONE
        model(x)
    assert spent.bytes_peak == 3 * ONE  # what is kept, the first layer's output, the second's
    assert kept.shape == x.shape


def test_views_and_changes_in_place_are_no_new_bytes() -> None:
    model = nn.Identity()
    with count(model) as spent:
        x = torch.zeros(10, 10)
        y = x.view(100)[3:].add_(1)
        assert spent.bytes_live == 400
    assert y.shape == (97,)


def test_a_failing_forward_leaves_no_hook() -> None:
    model = Attend()
    with pytest.raises(RuntimeError), count(model):
        model(torch.randn(3, 5))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    with torch.no_grad(), count(model) as spent:
        model(torch.randn(TOKENS, WIDTH))
    assert spent.flops == LINEAR + ATTENTION


def test_agrees_with_pytorch_on_a_real_transformer() -> None:
    """Everything but attention, which PyTorch's counter does not know on the CPU."""
    pipe = tiny_pipelines.flux()
    with count(pipe.transformer) as spent:
        drawn = sample(pipe, ["red apple"], Sampling(steps=2))
    with FlopCounterMode(display=False) as theirs:
        sample(pipe, ["red apple"], Sampling(steps=2))
    by_module = theirs.get_flop_counts()["FluxTransformer2DModel"]
    tokens = drawn.latents.shape[1] + 8
    blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    attention = 2 * blocks * 4 * tokens * tokens * pipe.transformer.inner_dim
    assert len(spent.flops_by_forward) == 2
    assert spent.flops == sum(by_module.values()) + attention
