"""DyFLUX: a FLUX transformer in which image tokens choose whether they run through a block's feed-forward.

The text-to-picture variant of "DyDiT++: Dynamic Diffusion Transformers for Efficient Visual Generation",
arXiv 2504.06803; `dydit` holds the class-conditional one. A router in each block scores the image tokens by
the embedding of time and pooled text and by the mean of the text tokens. In a double block the others skip
the image's feed-forward; in a single block, whose attention reads every token, they skip the output
projection and the MLP, and so keep what they were. Text always runs. Weights are those of diffusers' class
and of the routers, under the authors' names. Only tokens are chosen, as in the released code; inference
gathers them.

Dimensions: B batch, L image tokens, S text tokens, D width, R hidden channels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    ModelMixin,  # noqa: F401  (a saved pipeline looks for it beside the model's class)
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from ditkit.models.dynamic import Choice, Choosing, on_tokens

CHOOSING = "choosing"
"""The key of `joint_attention_kwargs` by which blocks learn how to choose: FLUX hands those on to all."""


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


class _Chooses(nn.Module):
    """What both kinds of blocks do alike."""

    token_selection: JointTokenRouter
    temperature: float

    def _take(self, options: dict[str, Any] | None) -> tuple[Choosing, dict[str, Any]]:
        """How to choose, and the options that are the attention's."""
        rest = dict(options or {})
        return rest.pop(CHOOSING, None) or Choosing(), rest

    def _tokens(self, choosing: Choosing, image: Tensor, text: Tensor, embedding: Tensor) -> Tensor | None:
        """The chosen tokens (B, L, 1); None: all."""
        if choosing.complete:
            return None
        scores = self.token_selection(image, text, embedding)
        return choosing.choose(self, "tokens", scores, self.temperature)

    def _run(self, choosing: Choosing, tokens: Tensor | None, states: Tensor, run: Any) -> Tensor:
        """`run` of the chosen tokens of (B, T, ...), 0 for the others, masked or gathered."""
        if tokens is not None and (self.training or choosing.masked):
            return run(states) * tokens
        return on_tokens(tokens, states, run)


class DyFluxTransformerBlock(FluxTransformerBlock, _Chooses):
    """A double-stream block whose image feed-forward runs on chosen tokens."""

    def __init__(self, dim: int, heads: int, head_dim: int, temperature: float, token_bias: float) -> None:
        super().__init__(dim, heads, head_dim)
        self.temperature = temperature
        self.token_selection = JointTokenRouter(dim, token_bias)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image (B, L, D) and text tokens (B, S, D), embedding (B, D) -> text and image tokens."""
        choosing, options = self._take(joint_attention_kwargs)
        image, text = hidden_states, encoder_hidden_states
        normed, gate, *image_mlp = self.norm1(image, emb=temb)
        normed_text, gate_text, *text_mlp = self.norm1_context(text, emb=temb)
        attended, attended_text, *more = self.attn(
            hidden_states=normed,
            encoder_hidden_states=normed_text,
            image_rotary_emb=image_rotary_emb,
            **options,
        )
        image = image + gate.unsqueeze(1) * attended
        text = text + gate_text.unsqueeze(1) * attended_text
        # The authors' numbers do not tell which tensors of this block the router reads; here it is those
        # that the feed-forwards read, before their norms, as in a DiT.
        tokens = self._tokens(choosing, image, text, temb)
        if tokens is not None:
            choosing.made[self] = self._cost(image.shape, text.shape[1], tokens)
        fed = self._run(choosing, tokens, _modulated(self.norm2(image), *image_mlp[:2]), self.ff)
        image = image + image_mlp[2].unsqueeze(1) * fed
        for added in more:  # of an IP-adapter
            image = image + added
        text = text + text_mlp[2].unsqueeze(1) * self.ff_context(
            _modulated(self.norm2_context(text), *text_mlp[:2])
        )
        if text.dtype == torch.float16:
            text = text.clip(-65504, 65504)
        return text, image

    def _cost(self, image: torch.Size, words: int, tokens: Tensor) -> Choice:
        batch, length, width = image
        total = length + words
        last: Any = self.ff.net[2]
        feed_forward = 2 * width * last.in_features  # for each token
        always = 4 * total * width**2 + 2 * total**2 * width + words * feed_forward
        return Choice(always, 0, length * feed_forward, batch, tokens=tokens)


class DyFluxSingleTransformerBlock(FluxSingleTransformerBlock, _Chooses):
    """A single-stream block that changes the text and chosen image tokens."""

    def __init__(self, dim: int, heads: int, head_dim: int, temperature: float, token_bias: float) -> None:
        super().__init__(dim, heads, head_dim)
        self.temperature = temperature
        self.token_selection = JointTokenRouter(dim, token_bias)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image (B, L, D) and text tokens (B, S, D), embedding (B, D) -> text and image tokens."""
        choosing, options = self._take(joint_attention_kwargs)
        words = encoder_hidden_states.shape[1]
        tokens = self._tokens(choosing, hidden_states, encoder_hidden_states, temb)
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, S + L, D)
        running = None
        if tokens is not None:
            choosing.made[self] = self._cost(hidden_states.shape, words, tokens)
            always = tokens.new_ones(len(tokens), words, 1)
            running = torch.cat([always, tokens], dim=1)  # (B, S + L, 1)
        normed, gate = self.norm(both, emb=temb)
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **options)
        states = torch.cat([attended, normed], dim=-1)  # (B, S + L, 2 D)
        both = both + gate.unsqueeze(1) * self._run(choosing, running, states, self._feed)
        if both.dtype == torch.float16:
            both = both.clip(-65504, 65504)
        return both[:, :words], both[:, words:]

    def _feed(self, states: Tensor) -> Tensor:
        """What attention gave and what the MLP reads, (B, T, 2 D), to the block's update (B, T, D)."""
        attended, normed = states.chunk(2, dim=-1)
        hidden = self.act_mlp(self.proj_mlp(normed))  # (B, T, R)
        return self.proj_out(torch.cat([attended, hidden], dim=-1))

    def _cost(self, image: torch.Size, words: int, tokens: Tensor) -> Choice:
        batch, length, width = image
        total = length + words
        rest = width**2 + 2 * width * self.mlp_hidden_dim  # for each token
        always = 3 * total * width**2 + 2 * total**2 * width + words * rest
        return Choice(always, 0, length * rest, batch, tokens=tokens)


def _modulated(states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """States (B, T, D) scaled and shifted by (B, D)."""
    return states * (1 + scale[:, None]) + shift[:, None]


class DyFluxTransformer2DModel(FluxTransformer2DModel):
    """The network: diffusers' FLUX transformer whose blocks choose image tokens.

    Args:
        temperature: of the choices drawn in training.
        token_bias: what the routers start with: all on.
        (others): see `FluxTransformer2DModel`.

    Attributes:
        choosing: how the next forwards choose; None: anew each time. See `dynamic.choosing`.
    """

    _no_split_modules = ["DyFluxTransformerBlock", "DyFluxSingleTransformerBlock"]
    _repeated_blocks = ["DyFluxTransformerBlock", "DyFluxSingleTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        temperature: float = 5.0,
        token_bias: float = 5.0,
    ) -> None:
        super().__init__(
            patch_size,
            in_channels,
            out_channels,
            0,
            0,
            attention_head_dim,
            num_attention_heads,
            joint_attention_dim,
            pooled_projection_dim,
            guidance_embeds,
            axes_dims_rope,
        )
        self.register_to_config(num_layers=num_layers, num_single_layers=num_single_layers)
        sizes = (self.inner_dim, num_attention_heads, attention_head_dim, temperature, token_bias)
        self.transformer_blocks = nn.ModuleList([DyFluxTransformerBlock(*sizes) for _ in range(num_layers)])
        self.single_transformer_blocks = nn.ModuleList(
            [DyFluxSingleTransformerBlock(*sizes) for _ in range(num_single_layers)]
        )
        for module in self.modules():
            if isinstance(module, JointTokenRouter):
                module.reset()
        self.choosing: Choosing | None = None

    @functools.wraps(FluxTransformer2DModel.forward)  # its signature is what pipelines and hooks look at
    def forward(self, *args: Any, joint_attention_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        how = Choosing() if self.choosing is None else self.choosing
        options = {**(joint_attention_kwargs or {}), CHOOSING: how}
        return super().forward(*args, joint_attention_kwargs=options, **kwargs)


def inherit(static: FluxTransformer2DModel, **config: Any) -> DyFluxTransformer2DModel:
    """A dynamic FLUX transformer that starts as a static one, everything switched on: the same output."""
    settings = {name: value for name, value in static.config.items() if not name.startswith("_")}
    model = DyFluxTransformer2DModel(**{**settings, **config})
    left = model.load_state_dict(static.state_dict(), strict=False)
    if left.unexpected_keys or any(".token_selection." not in name for name in left.missing_keys):
        raise ValueError(f"config={config} changes the blocks that are inherited")
    moved: Any = model  # diffusers' `to` has no signature that a type checker understands
    if static.dtype != model.dtype:
        moved.to(static.dtype)
    return moved.to(static.device).train(static.training)
