"""DyFLUX: a FLUX transformer in which image tokens choose whether they run through a block's feed-forward.

The text-to-picture variant of "DyDiT++: Dynamic Diffusion Transformers for Efficient Visual Generation", arXiv
2504.06803; `dydit` holds the class-conditional one. A router in each block scores the image tokens by the
embedding of time and pooled text and by the mean of the text tokens. In a double block the others skip the image's
feed-forward; in a single block, whose attention reads every token, they skip the output projection and the MLP, and
so keep what they were. Text always runs. Weights are those of diffusers' class and of the routers, under the
authors' names. Only tokens are chosen, as in the released code; the chosen ones are gathered in inference.

Dimensions: B batch, L image tokens, S text tokens, D width, R hidden channels.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, ModelMixin  # noqa: F401  (a saved pipeline looks for the latter here)
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from ditkit.models.dynamic import Choice, Choosing, on_tokens

CHOOSING = "choosing"
"""The key of `joint_attention_kwargs` by which blocks learn how to choose: FLUX hands it on to all of them."""


class JointTokenRouter(nn.Module):
    """Scores (B, L, 1) of image tokens (B, L, D), given text tokens (B, S, D) and an embedding (B, D)."""

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        self.linear_t = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.router = nn.Linear(width, 1)
        self.start = bias

    def reset(self) -> None:
        """Everything on."""
        for layer in (self.linear_t, self.router):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.linear_t.bias)
        nn.init.constant_(self.router.bias, self.start)

    def forward(self, hidden_states: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        modulation = self.linear_t(nn.functional.silu(embedding)).unsqueeze(1)  # (B, 1, 4 D)
        shift, scale, shift_text, scale_text = modulation.chunk(4, dim=-1)
        hidden_states = self.norm(hidden_states) * (1 + scale) + shift  # (B, L, D)
        text = self.norm(text) * (1 + scale_text) + shift_text  # (B, S, D)
        return self.router(hidden_states + text.mean(1, keepdim=True))
