"""Layers that several diffusion transformers share.

Sources: Peebles and Xie, arXiv 2212.09748 (adaLN-Zero block, embedders, head); the sine-cosine table is the
two-dimensional one of MAE, arXiv 2111.06377. Parameter names are those of the DiT checkpoints.

Dimensions: B batch, C channels, H and W latent height and width, P patch size, R and S rows and columns of
tokens, T = R S tokens, D width, N heads, E = D/N head width. A conditioning vector is (B, 1, D), or (B, T, D)
where every token has its own.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine step `x (1 + scale) + shift`; all of (B, T or 1, D)."""
    return hidden_states * (1 + scale) + shift


@functools.lru_cache(maxsize=16)
def sincos_table(width: int, rows: int, columns: int, scale: float = 1.0) -> Tensor:
    """Fixed two-dimensional sine-cosine positions, row-major over the grid, float32 on the CPU, (1, R S, D).

    The first D/2 channels encode the column and the last D/2 the row; each half is sines then cosines of
    `position / scale * 10000^(-k / (D/4))`, computed in float64.

    Raises:
        ValueError: if `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width={width} has no two-dimensional sine-cosine table; choose a multiple of 4")
    on_cpu = {"dtype": torch.float64, "device": "cpu"}  # explicit: a caller may be building on "meta"
    row = torch.arange(rows, **on_cpu).repeat_interleave(columns) / scale  # (T,)
    column = torch.arange(columns, **on_cpu).repeat(rows) / scale  # (T,)
    halves = [sincos_line(width // 2, position) for position in (column, row)]  # 2 x (T, D/2)
    return torch.cat(halves, dim=1).float().unsqueeze(0)


def sincos_line(width: int, position: Tensor) -> Tensor:
    """Sines then cosines of `position * 10000^(-k / (D/2))`: (T,) -> (T, D), in the positions' precision."""
    exponent = torch.arange(width // 2, dtype=position.dtype, device=position.device) / (width / 2)
    angles = torch.outer(position, 10000.0**-exponent)  # (T, D/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Token outputs (B, T, P P C), channel fastest, to pictures (B, C, R P, S P)."""
    rows, columns = grid
    patches = tokens.unflatten(1, (rows, columns)).unflatten(3, (patch_size, patch_size, -1))  # (B,R,S,P,P,C)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, R P, S P)


Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each (T, E), by which queries and keys of T tokens are turned."""


@functools.lru_cache(maxsize=16)
def axial_rotary(head_width: int, rows: int, columns: int, theta: float = 10000.0) -> Rotary:
    """Rotary positions of a grid, row-major, float32 on the CPU, two of (R S, E); they count from 0.

    The first half of a head's channels turns with the row, the second with the column; pairs of neighbours
    turn together, the k-th pair of a half by `position * theta^(-2 k / (E/2))`.

    Raises:
        ValueError: if `head_width` is not a multiple of 4.
    """
    if head_width % 4:
        raise ValueError(
            f"a head of {head_width} channels has no axial rotary positions: use a multiple of 4"
        )
    on_cpu = {"dtype": torch.float64, "device": "cpu"}  # explicit: a caller may be building on "meta"
    row = torch.arange(rows, **on_cpu).repeat_interleave(columns)  # (T,)
    column = torch.arange(columns, **on_cpu).repeat(rows)  # (T,)
    rates = theta ** -(torch.arange(0, head_width // 2, 2, **on_cpu) / (head_width // 2))  # (E/4,)
    angles = torch.cat([torch.outer(row, rates), torch.outer(column, rates)], dim=1)  # (T, E/2)
    angles = angles.repeat_interleave(2, dim=1)  # (T, E)
    return angles.cos().float(), angles.sin().float()


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys (B, N, T, E) turned by their positions, in float32."""
    cosines, sines = (table.to(heads.device) for table in rotary)
    even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, N, T, E/2)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)  # (B, N, T, E)
    return (heads.float() * cosines + turned * sines).to(heads.dtype)


class PatchEmbed(nn.Module):
    """One linear map of each P x P patch: (B, C, H, W) -> (B, T, D), row-major."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.proj(pictures).flatten(2).transpose(1, 2)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a latent of that size.

        Raises:
            ValueError: if a side is not a multiple of the patch size.
        """
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"a latent of {height}x{width} can't be cut into patches of side {self.patch_size}; "
                f"pad or crop both sides to a multiple of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the time, then a two-layer perceptron: (B,) -> (B, D)."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    @staticmethod
    def features(timestep: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
        """Cosines then sines of `t * max_period^(-i / (width/2))` in float32; times may be fractional."""
        half = width // 2
        index = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) * index / half)  # (B, half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, timestep: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.mlp(self.features(timestep, self.frequencies).to(dtype))


class LabelDropout(nn.Module):
    """Labels dropped at random in training; with `dropout > 0` there is a null class for "no label".

    Attributes:
        class_names: in the order of their labels, where they are not those of the model's pipeline: an
            adapter brings classes of its own.
    """

    class_names: list[str] | None = None

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout

    @property
    def num_rows(self) -> int:
        """Rows that a table of classes needs, the null class included."""
        return self.num_classes + (self.dropout > 0)

    @property
    def null_label(self) -> int:
        """The label that means "none".

        Raises:
            ValueError: if the model was built without one.
        """
        if self.dropout <= 0:
            raise ValueError(
                "this model has no null class (class_dropout_prob=0): give it a label for every sample, "
                "or train one with class_dropout_prob > 0 for guidance"
            )
        return self.num_classes

    def drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Labels (B,) with the null class where `force_drop_ids` is 1, or at random in training."""
        if force_drop_ids is not None:
            return torch.where(force_drop_ids == 1, self.null_label, labels)
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            return torch.where(dropped, self.null_label, labels)
        return labels


class LabelEmbedder(LabelDropout):
    """Class embeddings, (B,) -> (B, D); the null class is the table's last row."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__(num_classes, dropout)
        self.embedding_table = nn.Embedding(self.num_rows, width)

    def forward(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        return self.embedding_table(self.drop(labels, force_drop_ids))


def relabelled(embedder: LabelDropout, class_names: Sequence[str]) -> LabelDropout:
    """A copy for other classes, whose every row is the null class's (where there is none, the mean row).

    Raises:
        ValueError: the embeddings are not in the embedder, but elsewhere in the model.
    """
    fresh = copy.deepcopy(embedder)
    fresh.class_names, fresh.num_classes = list(class_names), len(class_names)
    tables = [(name, part) for name, part in fresh.named_modules() if isinstance(part, nn.Embedding)]
    if not tables:
        raise ValueError(f"{type(embedder).__name__} has no table of classes that could be replaced")
    for name, table in tables:
        weight = table.weight.detach()
        row = (
            weight[embedder.null_label :] if embedder.dropout > 0 else weight.mean(0, keepdim=True)
        )  # (1, D)
        fresh.set_submodule(name, nn.Embedding.from_pretrained(row.repeat(fresh.num_rows, 1), freeze=False))
    return fresh


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} can't be split over num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> Tensor:
        """The mask (B or 1, 1, T or 1, T) says which keys count, or is added to the scores."""
        qkv = self.qkv(hidden_states).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, N, E)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, T, E)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        # Called through the module's attribute: that is where attention methods step in.
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (B, N, T, E)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys and values of the same or another sequence."""

    def __init__(self, width: int, num_heads: int, bias: bool = True) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} can't be split over num_heads={num_heads}")
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, hidden_states: Tensor, other: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Queries (B, T, D) read `other` (B, S, D), by default themselves -> (B, T, D).

        The mask (B, 1, T or 1, S) is added to the scores.
        """
        other = hidden_states if other is None else other
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.to_q(hidden_states), self.to_k(other), self.to_v(other))
        )  # (B, N, T, E), (B, N, S, E)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (B, N, T, E)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps around a tanh-approximated GELU: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class GatedMlp(nn.Module):
    """SwiGLU: `W3 (silu(a) b)`, a and b the halves of one projection: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden_width)
        self.w3 = nn.Linear(hidden_width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, value = self.w12(hidden_states).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class RoutableBlock(nn.Module):
    """A residual block that may read a masked stream: `block(m x) + (1 - m) x`.

    A subclass defines `transform(hidden_states, conditioning, *more)`, the block itself. The mask is part of
    the block, so that what replaces a block's output replaces all of it.
    """

    def transform(self, hidden_states: Tensor, conditioning: Tensor, *more: Any) -> Tensor:
        raise NotImplementedError

    def forward(
        self, hidden_states: Tensor, conditioning: Tensor, mask: Tensor | None = None, *more: Any
    ) -> Tensor:
        """Tokens (B, T, D), conditioning (B, T or 1, D) and mask (B, T or 1, D) or None -> (B, T, D)."""
        if mask is None:
            return self.transform(hidden_states, conditioning, *more)
        return self.transform(hidden_states * mask, conditioning, *more) + (1 - mask) * hidden_states


class FinalLayer(nn.Module):
    """The head: adaptive layer norm, or another `norm`, and a linear map: (B, T, D) -> (B, T, P P C_out)."""

    def __init__(self, width: int, patch_size: int, out_channels: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) if norm is None else norm
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, hidden_states: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=-1)  # each (B, T or 1, D)
        return self.linear(modulate(self.norm_final(hidden_states), shift, scale))
