"""DyDiT: how many heads, hidden channels and tokens a DiT runs depends on the timestep and on the picture.

"Dynamic Diffusion Transformer", arXiv 2410.03456, and "DyDiT++: Dynamic Diffusion Transformers for Efficient
Visual Generation", arXiv 2504.06803. In each block the timestep's embedding, without the class, chooses heads
and groups of the MLP's channels, as many as heads, the first always on (TDW); tokens behind the attention
choose whether they run through the MLP (SDT). A trained DiT is fine-tuned to a budget of multiply-adds (the
objective `dydit`). The authors' code masks only; here inference computes what is chosen and nothing else, and
the cost is a formula instead of a table. Samples of a batch with other timesteps run in groups of equal
width. The authors' flow-matching variant is not released: `DySiT` gives the routers the embedding of SiT's
time (inferred). `dydit_flux` holds the text-to-picture variant.

Dimensions: B batch, T tokens, D width, H heads, N blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    ModelMixin,  # noqa: F401  (a saved pipeline looks for it beside the model's class)
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ditkit.models import dit, dydit_flux
from ditkit.models.base import chosen
from ditkit.models.dit import DiT, DiTBlock, SiT
from ditkit.models.dynamic import (
    Choice,
    Choosing,
    DynamicAttention,
    DynamicMlp,
    TokenRouter,
    WidthRouter,
)
from ditkit.models.layers import modulate
from ditkit.models.layouts import LAYOUTS, Layout, Settings, State, dit_needs
from ditkit.registry import Paper, register


def multiply_adds(tokens: int, width: int, hidden_width: int) -> tuple[int, int]:
    """Of a block's attention, T 4 D^2 + 2 T^2 D, and of its MLP, 2 T D R, for one sample."""
    return tokens * 4 * width**2 + 2 * tokens**2 * width, 2 * tokens * width * hidden_width


def budget_loss(ratio: Tensor, target: float) -> Tensor:
    """How far the mean share of the multiply-adds of a batch, a scalar, is from a target, squared."""
    return (ratio - target).square()


class DyDiTBlock(DiTBlock):
    """A DiT block with routers.

    Args:
        width, num_heads, mlp_ratio: as of `DiTBlock`.
        temperature: of the choices drawn in training.
        width_bias: what the routers of heads and groups start with.
        token_bias: what the router of tokens starts with; None: all tokens run, without a router.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        temperature: float,
        width_bias: float | None,
        token_bias: float | None,
    ) -> None:
        super().__init__(width, num_heads, mlp_ratio)
        self.temperature = temperature
        self.attn = DynamicAttention(width, num_heads)
        self.mlp = DynamicMlp(width, int(width * mlp_ratio), num_heads)
        self.attn_rate = None if width_bias is None else WidthRouter(width, num_heads, width_bias)
        self.mlp_rate = None if width_bias is None else WidthRouter(width, num_heads, width_bias)
        self.token_selection = None if token_bias is None else TokenRouter(width, token_bias)

    def transform(self, hidden_states: Tensor, conditioning: Tensor, *more: Any) -> Tensor:
        """Tokens (B, T, D), conditioning (B, T or 1, D) and `more`: the time's embedding (B, D) and how to
        choose -> tokens (B, T, D)."""
        time, choosing = more
        if choosing.complete:
            return super().transform(hidden_states, conditioning)
        masked = self.training or choosing.masked
        heads = self.parts("heads", self.attn_rate, time, choosing)  # (B, H)
        groups = self.parts("groups", self.mlp_rate, time, choosing)  # (B, H)
        modulation = self.adaLN_modulation(conditioning).chunk(6, dim=-1)  # 6 x (B, T or 1, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        attended = self.attn(
            modulate(self.norm1(hidden_states), shift_attn, scale_attn), heads=heads, masked=masked
        )
        hidden_states = hidden_states + gate_attn * attended
        tokens = None
        if self.token_selection is not None:
            scores = self.token_selection(hidden_states)
            tokens = choosing.choose(self, "tokens", scores, self.temperature)  # (B, T, 1)
        costs = multiply_adds(hidden_states.shape[1], hidden_states.shape[2], self.mlp.fc1.out_features)
        choosing.made[self] = Choice(0, *costs, len(hidden_states), heads, groups, tokens)
        transformed = self.mlp(
            modulate(self.norm2(hidden_states), shift_mlp, scale_mlp), groups, tokens, masked
        )
        return hidden_states + gate_mlp * transformed

    def parts(self, name: str, router: WidthRouter | None, time: Tensor, choosing: Choosing) -> Tensor | None:
        """The choice (B, H) of a router, the first always on; None without one."""
        if router is None:
            return None
        drawn = choosing.choose(self, name, router(time), self.temperature)  # (B, H - 1)
        return torch.cat([torch.ones_like(drawn[:, :1]), drawn], dim=1)


class DyDiT(DiT):
    """The network: a DiT whose blocks choose.

    Args:
        temperature: of the choices drawn in training.
        width_bias: what the routers of heads and groups start with: all on; None: no such routers.
        token_bias: the same of the routers of tokens.
        routing: see `DiT`; the chosen channels of DTR and the chosen heads are independent of each other.
        (others): see `DiT`; `num_heads` is at least 2.

    Attributes:
        choosing: how the next forwards choose; None: anew each time. See `dynamic.choosing`.
    """

    _no_split_modules = ["DyDiTBlock"]
    _repeated_blocks = ["DyDiTBlock"]

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        routing: dict[str, Any] | None = None,
        temperature: float = 5.0,
        width_bias: float | None = 15.0,
        token_bias: float | None = 35.0,
    ) -> None:
        super().__init__(
            input_size,
            patch_size,
            in_channels,
            hidden_size,
            depth,
            num_heads,
            mlp_ratio,
            class_dropout_prob,
            num_classes,
            learn_sigma,
            routing,
        )
        self.choosing: Choosing | None = None

    def make_block(self, width: int, num_heads: int, mlp_ratio: float) -> DyDiTBlock:
        routers = (self.config[name] for name in ("temperature", "width_bias", "token_bias"))
        return DyDiTBlock(width, num_heads, mlp_ratio, *routers)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As a DiT; the routers switch everything on."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, WidthRouter | TokenRouter):
                module.reset()

    def gates(self, tokens: Tensor, timestep: Tensor | None, grid: tuple[int, int] | None) -> tuple[Any, ...]:
        """What the blocks get beyond tokens and conditioning: DTR's mask (B, 1, D) or None, the time's
        embedding (B, D), how to choose."""
        if timestep is None:
            raise ValueError("the blocks choose by the timestep: give run_blocks its timestep=(B,)")
        mask = super().gates(tokens, timestep, grid) or (None,)
        time = self.t_embedder(timestep, dtype=tokens.dtype)
        return (*mask, time, Choosing() if self.choosing is None else self.choosing)


class DySiT(DyDiT, SiT):
    """The same for interpolants: velocities, times in [0, 1]."""


def inherit(static: DiT, **config: Any) -> DyDiT:
    """A dynamic model that starts as a static one, everything switched on: the same output.

    Args:
        static: a trained DiT or SiT.
        **config: changes to the configuration, such as `token_bias`.

    Raises:
        ValueError: sizes that the static model does not have.
    """
    kind = DySiT if isinstance(static, SiT) else DyDiT
    settings = {name: value for name, value in static.config.items() if not name.startswith("_")}
    model = kind(**{**settings, **config})
    try:
        left = model.load_state_dict(static.state_dict(), strict=False)
    except RuntimeError as error:
        raise ValueError(f"config={config} changes sizes that are inherited: {error}") from error
    routers = ("attn_rate", "mlp_rate", "token_selection")
    if left.unexpected_keys or any(not name.split(".")[2].startswith(routers) for name in left.missing_keys):
        raise ValueError(f"config={config} changes the blocks that are inherited")
    moved: Any = model  # diffusers' `to` has no signature that a type checker understands
    if static.dtype != model.dtype:
        moved.to(static.dtype)
    return moved.to(static.device).train(static.training)


def dynamic(model: Any, **config: Any) -> Any:
    """The dynamic form of a trained network, everything switched on.

    Args:
        model: a DiT, a SiT or a `FluxTransformer2DModel`; one that is dynamic already is left as it is.
        **config: of the routers.

    Raises:
        ValueError: another network; or settings for one that is dynamic already.
    """
    if hasattr(model, "choosing"):
        if config:
            raise ValueError(f"{sorted(config)}: this {type(model).__name__} has its routers already")
        return model
    if isinstance(model, FluxTransformer2DModel):
        return dydit_flux.inherit(model, **config)
    if type(model) in (DiT, SiT):
        return inherit(model, **config)
    raise ValueError(f"a {type(model).__name__} has no dynamic form; a DiT, a SiT and a FLUX have one")


# --- in the registry ----------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, int]] = {
    f"{prefix}{name}": sizes for prefix in ("", "sit-") for name, sizes in dit.VARIANTS.items()
}


@register(
    "model",
    "dydit",
    summary="DiT or SiT that runs chosen heads, channels and tokens; dydit-{s,b,l,xl}/{2,4,8}, dydit-sit-...",
    paper=Paper("Dynamic Diffusion Transformer", "2410.03456", 2024),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def dydit(variant: str | None = None, **config: Any) -> DyDiT:
    """A fresh dynamic DiT ("xl/2") or SiT ("sit-xl/2", "sit": the defaults), with changes to its config."""
    kind = DySiT if variant is not None and variant.startswith("sit") else DyDiT
    return kind(**{**chosen(VARIANTS, None if variant == "sit" else variant), **config})


def _infer(state: State, options: Mapping[str, Any]) -> Settings:
    settings = dit.infer(state, options)
    if (
        settings.get("num_heads") is None
        and (router := state.get("blocks.0.attn_rate.router.bias")) is not None
    ):
        settings["num_heads"] = len(router) + 1
    if not any(".attn_rate." in name for name in state):
        settings["width_bias"] = None
    if not any(".token_selection." in name for name in state):
        settings["token_bias"] = None
    return settings


LAYOUTS["dydit"] = Layout(
    infer=_infer, needs=dit_needs, variants=VARIANTS, inherits={"dit": inherit, "sit": inherit}
)
