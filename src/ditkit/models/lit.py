"""LiT: a DiT with linear attention of few heads and one depthwise convolution, started from a trained DiT.

"LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation", arXiv 2501.12976. Every
self-attention becomes `phi(q) (phi(k)^T v) / (phi(q) sum phi(k))` with phi = ReLU + 1e-6, plus a depthwise
5 x 5 convolution of the values; all else is a DiT. Everything but the attention is inherited from a
converged DiT (`inherit`), and the student follows a frozen teacher's noise and variance
(`distillation_losses`). The authors' code was not available: the module follows public descriptions of it.
Inferred, and options here: q and kv have a bias as DiT's (`qkv_bias`); heads of B and L (2 and 4); the
distance is the mean over the elements of the raw output. In the text model the authors attend in float32
(`upcast_attention`). The paper's text-to-image student (PixArt) is not here.

Dimensions: B batch, T = R S tokens of a grid, D width, N heads, E = D/N head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  (a saved pipeline looks for it beside the model's class)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ditkit.models import dit
from ditkit.models.base import chosen
from ditkit.models.dit import DiT, DiTBlock, SiT
from ditkit.models.layouts import LAYOUTS, Layout, Settings, State, dit_needs
from ditkit.registry import Paper, register


def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-6) -> Tensor:
    """Attention with the kernel ReLU + eps in O(T): all (B, N, T, E) -> (B, N, T, E).

    Equal to weights `phi(q_i) . phi(k_j) / sum_j (...)`, up to eps in the denominator; both sums are means
    over the tokens, so that their size does not depend on T.
    """
    query, key = query.relu() + eps, key.relu() + eps
    norm = 1 / (query @ key.mean(dim=2).unsqueeze(-1) + eps)  # (B, N, T, 1)
    scale = key.shape[2] ** -0.5
    memory = (key * scale).transpose(2, 3) @ (value * scale)  # (B, N, E, E)
    return query @ memory * norm


class LinearAttention(nn.Module):
    """Linear attention plus a depthwise convolution of the values, whose E kernels all heads share."""

    def __init__(
        self, width: int, num_heads: int, qkv_bias: bool = True, upcast: bool = False, kernel_size: int = 5
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} can't be split over num_heads={num_heads}")
        self.num_heads, self.upcast = num_heads, upcast
        head = width // num_heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.dwc = nn.Conv2d(head, head, kernel_size, padding=kernel_size // 2, groups=head)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, R S, D) of a grid (R, S) to (B, R S, D)."""
        query = self.q(hidden_states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, N, T, E)
        key, value = self.kv(hidden_states).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.upcast:
            with torch.autocast(hidden_states.device.type, enabled=False):
                attended = linear_attention(query.float(), key.float(), value.float()).to(value.dtype)
        else:
            attended = linear_attention(query, key, value)  # (B, N, T, E)
        maps = value.flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # (B N, E, R, S)
        local = self.dwc(maps).flatten(2).transpose(1, 2).unflatten(0, (-1, self.num_heads))  # (B, N, T, E)
        return self.proj((attended + local).transpose(1, 2).flatten(2))


class LiTBlock(DiTBlock):
    """A DiT block whose attention is linear; called with the grid after the mask."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, qkv_bias: bool = True, upcast: bool = False
    ) -> None:
        super().__init__(width, num_heads, mlp_ratio)
        self.attn = LinearAttention(width, num_heads, qkv_bias, upcast)


class LiT(DiT):
    """The network: a DiT with linear attention.

    Args:
        num_heads: few: the paper's 2 for width 384 and 4 for width 1152.
        qkv_bias: whether q, k and v have a bias (inferred: as DiT).
        upcast_attention: attend in float32.
        (others): see `DiT`.

    Raises:
        ValueError: for sizes that do not divide.
    """

    _no_split_modules = ["LiTBlock"]
    _repeated_blocks = ["LiTBlock"]

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        routing: dict[str, Any] | None = None,
        qkv_bias: bool = True,
        upcast_attention: bool = False,
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

    def make_block(self, width: int, num_heads: int, mlp_ratio: float) -> nn.Module:
        config = self.config
        return LiTBlock(width, num_heads, mlp_ratio, config["qkv_bias"], config["upcast_attention"])

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As a DiT; the depthwise convolutions start as PyTorch's."""
        super().initialize_weights()
        block: Any
        for block in self.blocks:
            block.attn.dwc.reset_parameters()

    def gates(self, tokens: Tensor, timestep: Tensor | None, grid: tuple[int, int] | None) -> tuple[Any, ...]:
        """The mask of a routed model, and the grid."""
        grid = self.grid if grid is None else grid
        if grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens are no {grid[0]}x{grid[1]} grid: give run_blocks its grid=(R, S)"
            )
        return (*(super().gates(tokens, timestep, grid) or (None,)), grid)


def inherit(teacher: DiT, attention: Iterable[str] = (), **config: Any) -> LiT:
    """A LiT that starts from a trained DiT: all its weights but those of the attention, which start afresh.

    Args:
        teacher: a DiT, best fully converged.
        attention: which of "q", "k", "v", "proj" to take over as well (the paper's ablation; none is best).
        **config: changes, e.g. `num_heads`; by default the teacher's configuration with the paper's heads.

    Raises:
        TypeError: a teacher that is no DiT.
        ValueError: a part of the attention that does not exist, or a change of the inherited sizes.
    """
    if type(teacher) is SiT or not isinstance(teacher, DiT) or type(teacher) is LiT:
        raise TypeError(f"a LiT inherits from a DiT; got a {type(teacher).__name__}")
    parts = tuple(attention)
    if wrong := set(parts) - {"q", "k", "v", "proj"}:
        raise ValueError(f"attention={sorted(wrong)}: the parts are 'q', 'k', 'v', 'proj'")
    settings = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    width = settings["hidden_size"]
    settings["num_heads"] = _HEADS.get(width, 2)
    student = LiT(**{**settings, **config})
    inherited = {name: value for name, value in teacher.state_dict().items() if ".attn." not in name}
    block: Any
    for index, block in enumerate(teacher.blocks if parts else ()):
        name = f"blocks.{index}.attn"
        for kind in ("weight", "bias"):
            query, key, value = getattr(block.attn.qkv, kind).detach().chunk(3)
            fresh = student.state_dict().get(f"{name}.kv.{kind}")
            if fresh is None:
                continue
            old_key, old_value = fresh.chunk(2)
            both = (key if "k" in parts else old_key, value if "v" in parts else old_value)
            inherited[f"{name}.kv.{kind}"] = torch.cat(both)
            if "q" in parts:
                inherited[f"{name}.q.{kind}"] = query
        if "proj" in parts:
            inherited |= {f"{name}.proj.{k}": v for k, v in block.attn.proj.state_dict().items()}
    try:
        student.load_state_dict(inherited, strict=False)
    except RuntimeError as error:
        raise ValueError(f"config={config} changes sizes that are inherited: {error}") from error
    moved: Any = student  # diffusers' `to` has no signature that a type checker understands
    return moved.to(teacher.device, teacher.dtype).train(teacher.training)


def distillation_losses(
    student: Tensor, teacher: Tensor, channels: int, noise_weight: float = 0.5, variance_weight: float = 0.05
) -> dict[str, Tensor]:
    """How far a student's prediction is from its teacher's; add "loss" to the student's own.

    Args:
        student: its prediction, (B, C_out, H, W).
        teacher: likewise, for the same state, time and labels, dropped ones included.
        channels: C, how many channels are the noise; what follows is the raw variance.
        noise_weight: lambda_1; 1.0 for text-to-image.
        variance_weight: lambda_2; no term without variance channels.

    Returns:
        "distilled_noise", "distilled_variance" (with a variance) and the weighted "loss", each (B,).
    """
    teacher = teacher.detach()

    def distance(part: slice) -> Tensor:
        return F.mse_loss(student[:, part], teacher[:, part], reduction="none").flatten(1).mean(1)

    losses = {"distilled_noise": distance(slice(channels))}
    losses["loss"] = noise_weight * losses["distilled_noise"]
    if student.shape[1] > channels:
        losses["distilled_variance"] = distance(slice(channels, None))
        losses["loss"] = losses["loss"] + variance_weight * losses["distilled_variance"]
    return losses


_HEADS = {384: 2, 768: 2, 1024: 4, 1152: 4}
VARIANTS: dict[str, dict[str, int]] = {
    name: {**sizes, "num_heads": _HEADS[sizes["hidden_size"]]} for name, sizes in dit.VARIANTS.items()
}


@register(
    "model",
    "lit",
    summary="DiT with linear attention of few heads and a depthwise convolution; lit-{s,b,l,xl}/{2,4,8}",
    paper=Paper(
        "LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation", "2501.12976", 2025
    ),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def lit(variant: str | None = None, **config: Any) -> LiT:
    """A fresh LiT of a named variant ("xl/2"; None: the defaults), with changes to its config."""
    return LiT(**{**chosen(VARIANTS, variant), **config})


def _infer(state: State, options: Mapping[str, Any]) -> Settings:
    settings = dit.infer(state, options)
    settings.pop("num_heads", None)
    kernels = state.get("blocks.0.attn.dwc.weight")
    if kernels is not None and "hidden_size" in settings and len(kernels):
        settings["num_heads"] = settings["hidden_size"] // len(kernels)
    return settings | {"qkv_bias": "blocks.0.attn.q.bias" in state}


LAYOUTS["lit"] = Layout(infer=_infer, needs=dit_needs, variants=VARIANTS, inherits={"dit": inherit})
