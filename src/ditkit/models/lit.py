"""LiT: a DiT with linear attention of few heads and one depthwise convolution, started from a trained DiT.

"LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation", arXiv 2501.12976. Every
self-attention becomes `phi(q) (phi(k)^T v) / (phi(q) sum phi(k))` with phi = ReLU + 1e-6, plus a depthwise
5 x 5 convolution of the values; all else is a DiT. Everything but the attention is inherited from a
converged DiT (`inherit`), and the student follows a frozen teacher's noise and variance
(`distillation_losses`). The authors' code was not available: the module follows public descriptions of it.
Inferred, and options here: q and kv have a bias as DiT's (`qkv_bias`); heads of B and L (2 and 4); the
distance is the mean over the elements of the raw output. In the text model the authors attend in float32
(`upcast_attention`). `lit_pixart` holds that model.

Dimensions: B batch, T = R S tokens of a grid, D width, N heads, E = D/N head width.
"""

from __future__ import annotations

import contextlib
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


def _full_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """No autocast, on devices that have it: on "meta", where models are counted, there is none."""
    if not torch.amp.autocast_mode.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


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
            with _full_precision(hidden_states.device.type):
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


def take_over(
    attention: LinearAttention, parts: Iterable[str], trained: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Copy parts of a trained attention.

    Args:
        attention: that starts.
        parts: of "q", "k", "v", "proj".
        trained: "weight" and perhaps "bias" of each part.

    Raises:
        ValueError: a part that does not exist.
    """
    if wrong := set(parts) - {"q", "k", "v", "proj"}:
        raise ValueError(f"attention={sorted(wrong)}: the parts are 'q', 'k', 'v', 'proj'")
    for part in parts:
        layer: Any = attention.kv if part in ("k", "v") else getattr(attention, part)
        for kind, value in trained[part].items():
            fresh = getattr(layer, kind)
            if fresh is not None:
                half = fresh.chunk(2)[part == "v"] if part in ("k", "v") else fresh
                half.copy_(value)


@torch.no_grad()
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
    settings = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    settings["num_heads"] = heads_for(settings["hidden_size"])
    student = LiT(**{**settings, **config})
    fill(student, teacher, ".attn.", config)
    parts = tuple(attention)
    old: Any
    new: Any
    for old, new in zip(teacher.blocks, student.blocks, strict=True):
        both = {kind: value.chunk(3) for kind, value in old.attn.qkv.state_dict().items()}
        trained = {name: {kind: both[kind][i] for kind in both} for i, name in enumerate("qkv")}
        take_over(new.attn, parts, {**trained, "proj": old.attn.proj.state_dict()})
    return student


def heads_for(width: int) -> int:
    """The paper's heads for a width; 2 for one that it does not have."""
    return _HEADS.get(width, 2)


def fill(student: Any, teacher: Any, without: str, config: Mapping[str, Any]) -> None:
    """Copy a teacher's weights but those whose names hold `without`; take on its device, type and mode.

    Raises:
        ValueError: naming `config`, the changes to the student, when weights do not fit.
    """
    inherited = {name: value for name, value in teacher.state_dict().items() if without not in name}
    try:
        left = student.load_state_dict(inherited, strict=False)
    except RuntimeError as error:
        raise ValueError(f"config={config} changes sizes that are inherited: {error}") from error
    if left.unexpected_keys or any(without not in name for name in left.missing_keys):
        raise ValueError(f"config={config} changes the blocks that are inherited")
    if teacher.dtype != student.dtype:
        student.to(teacher.dtype)
    student.to(teacher.device).train(teacher.training)


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
