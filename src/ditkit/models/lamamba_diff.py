"""LaMamba-Diff: a U-shaped denoiser whose blocks chain a four-way Mamba scan, window attention and an MLP.

"LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba", arXiv
2408.02615. A block reads the picture along four paths with a selective scan (SS2D), then within windows,
shifted in every second block (Swin), then by token; all three modulated and gated as in DiT. Cost is linear
in the pixels. Parameter names are the authors'. Their paths are for square pictures of even sides; the same
formulas, still without jumps, serve any grid here, windows are padded and masked where they do not fit, and
the learned position map is interpolated at other sizes. Left out: skips by concatenation, whose reshape is
wrong there. The published counts agree with a state of 16 (`xl`), the released configuration has 1
(`xl-state1`). Other sizes were not seen: `e96` to `e256` are that layout at smaller widths.

Dimensions: B batch, C channels, H x W map of a stage of width D, L = H W, K paths, E inner channels, N
state size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  (a saved pipeline looks for it beside the model's class)
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditkit.models.base import ClassConditionalModel, both_sides, chosen
from ditkit.models.layers import LabelEmbedder, TimestepEmbedder, modulate, sincos_table
from ditkit.models.layouts import LAYOUTS, Layout, Settings, State, count, label_rows, shapes_of
from ditkit.models.selective_scan import scan_multiply_adds, selective_scan
from ditkit.models.windows import from_windows, shift_mask, to_windows
from ditkit.registry import Paper, register

# --- paths --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def scan_paths(height: int, width: int, continuous: bool = True) -> Tensor:
    """Four orders of the cells of a row-major grid, int64 on the CPU, (4, H W).

    Continuous: rows from the top, rows from the bottom, columns from the left, columns from the right, every
    second line backwards; lines are read left to right and bottom to top first. Otherwise: row-major,
    column-major, and both reversed.
    """
    cells = torch.arange(height * width, device="cpu").view(height, width)
    if not continuous:
        rows, columns = cells.flatten(), cells.T.flatten()
        return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])

    def zigzag(lines: Tensor) -> Tensor:
        lines = lines.clone()
        lines[1::2] = lines[1::2].flip(1)
        return lines.flatten()

    upwards = cells.T.flip(1)  # (W, H), each column from the bottom
    return torch.stack([zigzag(lines) for lines in (cells, cells.flip(0), upwards, upwards.flip(0))])


def scan(maps: Tensor, paths: Tensor) -> Tensor:
    """Maps (B, E, H, W) read along the paths (K, L): (B, K, E, L), stored as (L, B, K, E) for the scan."""
    batch, length = len(maps), paths.shape[1]
    rows = maps.flatten(2).transpose(1, 2).flatten(0, 1)  # (B L, E)
    sample = torch.arange(batch, device=maps.device)[:, None]
    index = sample * length + paths.T.unsqueeze(1)  # (L, B, K)
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape).permute(1, 2, 3, 0)


def merge(sequences: Tensor, paths: Tensor) -> Tensor:
    """Sequences (B, K, E, L) put back in row-major order and summed over the paths: (B, E, L)."""
    batch, kinds = sequences.shape[:2]
    rows = sequences.permute(3, 0, 1, 2).flatten(0, 2)  # (L B K, E)
    sample = torch.arange(batch, device=rows.device)[:, None]
    places = paths.argsort(dim=1).T.unsqueeze(1)  # (L, 1, K)
    index = (places * batch + sample) * kinds + torch.arange(kinds, device=rows.device)  # (L, B, K)
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape).sum(2).permute(1, 2, 0)


class SS2D(nn.Module):
    """Scan of a map along four paths, gated: (B, H, W, D) -> (B, H, W, D)."""

    def __init__(
        self,
        width: int,
        state: int = 16,
        ratio: float = 2.0,
        dt_rank: int | None = None,
        conv: int = 3,
        conv_bias: bool = False,
        continuous: bool = True,
    ) -> None:
        super().__init__()
        inner, rank = int(ratio * width), dt_rank or math.ceil(width / 16)
        self.rank, self.state, self.continuous = rank, state, continuous
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, conv, padding=conv // 2, groups=inner, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
        self.A_logs = nn.Parameter(torch.empty(4 * inner, state))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.reset_scan()

    @torch.no_grad()
    def reset_scan(self) -> None:
        """Mamba's start: steps from 0.001 to 0.1, states decaying at 1 to N."""
        nn.init.uniform_(
            self.x_proj_weight, -(self.x_proj_weight.shape[2] ** -0.5), self.x_proj_weight.shape[2] ** -0.5
        )
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = math.log(0.001), math.log(0.1)
        step = torch.exp(torch.rand_like(self.dt_projs_bias) * (high - low) + low).clamp(min=1e-4)
        self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        rates = torch.arange(1, self.state + 1, device=self.A_logs.device, dtype=torch.float32)
        self.A_logs.copy_(rates.log().expand_as(self.A_logs))

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[1:3]
        inner, gate = self.in_proj(maps).chunk(2, dim=-1)  # (B, H, W, E)
        inner = F.silu(self.conv2d(inner.movedim(-1, 1)))  # (B, E, H, W)
        paths = scan_paths(height, width, self.continuous).to(maps.device)
        sequences = scan(inner, paths)  # (B, K, E, L)
        along = sequences.permute(1, 3, 0, 2).flatten(1, 2)  # (K, L B, E)
        projected = along @ self.x_proj_weight.mT
        step, *both = projected.split([self.rank, self.state, self.state], dim=2)  # (K, L B, R or N)
        step = (step @ self.dt_projs_weight.mT).transpose(0, 1).flatten(1)  # (L B, 4 E)
        size = (height * width, len(maps))
        b, c = (x.unflatten(1, size).permute(2, 0, 3, 1) for x in both)  # (B, K, N, L)
        outputs, _ = selective_scan(
            sequences.flatten(1, 2),
            step.unflatten(0, size).permute(1, 2, 0),
            -self.A_logs.float().exp(),
            b,
            c,
            self.Ds,
            self.dt_projs_bias.flatten(),
        )  # (B, 4 E, L), float32
        merged = merge(outputs.unflatten(1, (4, -1)), paths).to(maps.dtype)  # (B, E, L)
        merged = self.out_norm(merged.transpose(1, 2)).unflatten(1, (height, width))
        return self.out_proj(merged * F.silu(gate))


# --- windows ------------------------------------------------------------------------------------------


class WindowAttention(nn.Module):
    """Attention within windows with a learned bias for each offset: (B, P, n, D) -> (B, P, n, D)."""

    def __init__(self, width: int, num_heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} can't be split over num_heads={num_heads}")
        self.num_heads, self.window = num_heads, window
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def bias(self, rows: int, columns: int) -> Tensor:
        """Biases of the pairs of a window at most as large as the configured one, (N, n, n)."""
        device = self.relative_position_bias_table.device
        row = torch.arange(rows, device=device).repeat_interleave(columns)
        column = torch.arange(columns, device=device).repeat(rows)
        down = row[:, None] - row + self.window[0] - 1  # (n, n), from 0
        right = column[:, None] - column + self.window[1] - 1
        index = down * (2 * self.window[1] - 1) + right
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def forward(self, windows: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Windows of `size` rows and columns; the mask (P, n, n) is added to the scores."""
        count = windows.shape[1]
        qkv = self.qkv(windows).unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        query, key, value = qkv.flatten(2, 3).unbind(0)  # (B, P N, n, d): one mask serves the batch
        scores = self.bias(*size).unsqueeze(0)  # (1, N, n, n)
        scores = scores + mask.unsqueeze(1).to(scores.dtype) if mask is not None else scores
        scores = scores.expand(count, -1, -1, -1).flatten(0, 1).unsqueeze(0).to(query.dtype)  # (1, P N, n, n)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=scores)
        return self.proj(attended.unflatten(1, (count, -1)).transpose(2, 3).flatten(3))


def _window_mask(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], padded: Any
) -> Tensor | None:
    """-100 between tokens that were no neighbours, or one of which is padding, (P, n, n); None: all may."""
    grid = (size[0] + padded[0], size[1] + padded[1])
    mask = shift_mask((1, *grid), (1, *window), (0, *shift)) if any(shift) else None
    if any(padded):
        real = torch.zeros(grid, device="cpu")
        real[: size[0], : size[1]] = 1
        real = to_windows(real.roll([-s for s in shift], (0, 1))[None, None, ..., None], (1, *window))[
            0, :, :, 0
        ]
        strangers = -(real[:, :, None] != real[:, None, :]).float()
        mask = strangers if mask is None else torch.minimum(mask, strangers)
    return None if mask is None else mask * 100


class LaMambaBlock(nn.Module):
    """Scan, window attention and MLP, each modulated and gated: maps (B, H, W, D), condition (B, D_c)."""

    def __init__(
        self,
        width: int,
        condition: int | None,
        num_heads: int,
        window: tuple[int, int],
        shifted: bool,
        mlp_ratio: float,
        ssm: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm, self.op = nn.LayerNorm(width), SS2D(width, **ssm)
        self.norm_swin, self.attn = nn.LayerNorm(width), WindowAttention(width, num_heads, window)
        self.norm2, self.mlp = nn.LayerNorm(width), _ErfMlp(width, int(width * mlp_ratio))
        self.condition_projection = nn.Identity() if condition is None else nn.Linear(condition, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 9 * width))

    def forward(self, maps: Tensor, condition: Tensor) -> Tensor:
        vectors = self.adaLN_modulation(self.condition_projection(condition))[:, None, None].chunk(9, dim=-1)
        shift_scan, scale_scan, gate_scan, shift_win, scale_win, gate_win, shift_mlp, scale_mlp, gate_mlp = (
            vectors
        )
        maps = maps + gate_scan * self.op(modulate(self.norm(maps), shift_scan, scale_scan))
        maps = maps + gate_win * self._attend(modulate(self.norm_swin(maps), shift_win, scale_win))
        return maps + gate_mlp * self.mlp(modulate(self.norm2(maps), shift_mlp, scale_mlp))

    def _attend(self, maps: Tensor) -> Tensor:
        """Attention of maps (B, H, W, D) within windows, shifted along the sides that hold more than one."""
        size = (maps.shape[1], maps.shape[2])
        sides = tuple(zip(self.window, size, strict=True))
        window = (min(sides[0]), min(sides[1]))
        shift = tuple(w // 2 if self.shifted and side > w else 0 for w, side in sides)
        padded = [-side % w for side, w in zip(size, window, strict=True)]
        maps = F.pad(maps, (0, 0, 0, padded[1], 0, padded[0])) if any(padded) else maps
        mask = _window_mask(size, window, shift, padded)  # type: ignore[arg-type]
        rolled = maps.roll([-s for s in shift], (1, 2)) if any(shift) else maps
        windows = to_windows(rolled.unsqueeze(1), (1, *window))
        attended = self.attn(windows, window, None if mask is None else mask.to(maps.device))
        rolled = from_windows(attended, (1, *window), (1, maps.shape[1], maps.shape[2])).squeeze(1)
        back = rolled.roll(list(shift), (1, 2)) if any(shift) else rolled
        return back[:, : size[0], : size[1]]


class _ErfMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


# --- the network --------------------------------------------------------------------------------------


class _PatchMerging(nn.Module):
    """2 x 2 cells to one, row by row within a column: (B, H, W, D) -> (B, H/2, W/2, D_out)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, out, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        phases = [maps[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(phases, dim=-1)))


class _PatchExpanding(nn.Module):
    """One cell to P x P: (B, H, W, D) -> (B, H P, W P, D_out)."""

    def __init__(self, width: int, out: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.expand, self.norm = nn.Linear(width, side * side * out, bias=False), nn.LayerNorm(out)

    def forward(self, maps: Tensor) -> Tensor:
        split = self.expand(maps).unflatten(3, (self.side, self.side, -1))  # (B, H, W, P, P, D_out)
        return self.norm(split.transpose(2, 3).flatten(3, 4).flatten(1, 2))


class _Stage(nn.Module):
    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class _Stem(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, latent: Tensor) -> Tensor:
        return self.norm(self.proj(latent).movedim(1, -1))


class LaMambaDiff(ClassConditionalModel):
    """The network.

    Args:
        input_size: height and width of the latent, or one number for both; other sizes run too.
        patch_size: side of a patch; sides must be multiples of four patches.
        in_channels: latent channels C.
        hidden_size: width of the first stage; the others have 2, 4 and 4 times that.
        depth: blocks of the four encoder stages.
        middle_depth: blocks between encoder and decoder.
        num_heads: of window attention in the four stages, or one number.
        window_size: side of a window; a smaller stage is one window.
        ssm_state: N.
        ssm_ratio: inner channels of a scan over the width.
        ssm_dt_rank: rank of the steps; None: width / 16.
        ssm_conv: side of the depthwise convolution before the scan, odd.
        ssm_conv_bias: whether it has a bias.
        continuous_scan: paths without jumps, or the four raster orders.
        mlp_ratio: hidden width of the MLP over the width.
        extra_decoder_blocks: whether a decoder stage has one block more than its mirror.
        class_dropout_prob: how often training drops a label; above 0 there is a null class for guidance.
        num_classes: classes, the null class not counted.
        learn_sigma: whether 2 C channels are predicted, the second half for a learned variance.

    Raises:
        ValueError: for sizes that do not divide.
    """

    authors_guidance = "all"
    _no_split_modules = ["LaMambaBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "pos_embed", "t_embedder", "y_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 1,
        in_channels: int = 4,
        hidden_size: int = 320,
        depth: Sequence[int] = (2, 2, 2, 2),
        middle_depth: int = 2,
        num_heads: int | Sequence[int] = 16,
        window_size: int = 8,
        ssm_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | None = None,
        ssm_conv: int = 3,
        ssm_conv_bias: bool = False,
        continuous_scan: bool = True,
        mlp_ratio: float = 4.0,
        extra_decoder_blocks: bool = True,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        heads = [num_heads] * 4 if isinstance(num_heads, int) else list(num_heads)
        if len(depth) != 4 or len(heads) != 4:
            raise ValueError(
                f"depth={tuple(depth)}, num_heads={heads}: expected four numbers, one for each stage"
            )
        if ssm_conv % 2 == 0:
            raise ValueError(f"ssm_conv={ssm_conv}: the convolution keeps the size only if its side is odd")
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.latent_size, self.side_multiple = both_sides(input_size), 4 * patch_size
        if any(side % self.side_multiple for side in self.latent_size):
            raise ValueError(f"input_size={input_size}: both sides must be multiples of {self.side_multiple}")
        self.gradient_checkpointing = False
        widths = [hidden_size * factor for factor in (1, 2, 4, 4)]
        sides = [[side // patch_size // factor for side in self.latent_size] for factor in (1, 2, 4, 4)]
        last = widths[-1]
        ssm = {
            "state": ssm_state,
            "ratio": ssm_ratio,
            "dt_rank": ssm_dt_rank,
            "conv": ssm_conv,
            "conv_bias": ssm_conv_bias,
            "continuous": continuous_scan,
        }

        def stage(index: int, blocks: int, project: bool) -> _Stage:
            width = widths[index]
            window = (min(window_size, sides[index][0]), min(window_size, sides[index][1]))
            condition = last if project or width != last else None
            return _Stage(
                LaMambaBlock(width, condition, heads[index], window, block % 2 == 1, mlp_ratio, ssm)
                for block in range(blocks)
            )

        self.patch_embed = _Stem(patch_size, in_channels, hidden_size)
        self.pos_embed = nn.Parameter(torch.empty(1, *sides[0], hidden_size))
        self.t_embedder = TimestepEmbedder(last)
        self.y_embedder = LabelEmbedder(num_classes, last, class_dropout_prob)
        self.layers = nn.ModuleList([stage(index, depth[index], project=False) for index in range(4)])
        for index in (0, 1):
            self.layers[index].downsample = _PatchMerging(widths[index], widths[index + 1])
        self.mid_layer = stage(3, middle_depth, project=False)
        extra = int(extra_decoder_blocks)
        mirrored = [depth[3] + extra if depth[3] else 0, *(depth[i] + extra for i in (2, 1, 0))]
        self.layers_up = nn.ModuleList([stage(3 - i, mirrored[i], project=True) for i in range(4)])
        for index in (2, 3):
            self.layers_up[index].upsample = _PatchExpanding(widths[4 - index], widths[3 - index], 2)
        self.final_up = _PatchExpanding(hidden_size, hidden_size, patch_size)
        self.final_condition_projection = nn.Linear(last, hidden_size)
        self.final_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.final_linear = nn.Linear(hidden_size, self.out_channels)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The authors' start: Xavier, every gate at zero; scans as Mamba's; the last map is not zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                start = nn.init.zeros_ if "adaLN" in name else nn.init.xavier_uniform_
                start(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        stem: Any = self.patch_embed.proj
        nn.init.xavier_uniform_(stem.weight.flatten(1))
        nn.init.zeros_(stem.bias)
        tables: Any = (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2])
        for table in tables:
            nn.init.normal_(table.weight, std=0.02)
        height, width = self.pos_embed.shape[1:3]
        self.pos_embed.copy_(sincos_table(self.pos_embed.shape[-1], height, width).view_as(self.pos_embed))

    def positions(self, height: int, width: int) -> Tensor:
        """The position map at a size, (1, H, W, D): the learned one, interpolated where the size differs."""
        if (height, width) == tuple(self.pos_embed.shape[1:3]):
            return self.pos_embed
        return F.interpolate(self.pos_embed.movedim(-1, 1), (height, width), mode="bilinear").movedim(1, -1)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The network's prediction.

        Args:
            hidden_states: noised latent, (B, C, H, W), sides multiples of four patches.
            timestep: times, (B,) or a scalar, possibly fractional, 0..999.
            class_labels: integer labels, (B,); the null class is `num_classes`, and None is null for all.
            force_drop_ids: 1 where the label is to be dropped, (B,); None drops at random in training.
            return_dict: whether to return an object with `.sample`, or a tuple.

        Returns:
            The prediction, (B, C_out, H, W).

        Raises:
            ValueError: for inputs of the wrong shape.
        """
        if timestep.ndim == 0:
            timestep = timestep.expand(len(hidden_states))
        self.check(hidden_states, timestep, class_labels)
        labels = self.labels(class_labels, len(hidden_states))
        condition = self.t_embedder(timestep, dtype=hidden_states.dtype) + self.y_embedder(
            labels, force_drop_ids
        )
        maps = self.patch_embed(hidden_states)  # (B, H, W, D)
        maps = maps + self.positions(*maps.shape[1:3])
        skips = []
        stage: Any
        for stage in self.layers:
            maps = self._blocks(stage, maps, condition)
            skips.append(maps)
            maps = stage.downsample(maps) if hasattr(stage, "downsample") else maps
        maps = maps + self._blocks(self.mid_layer, maps, condition)  # (B, H/4, W/4, 4 D)
        for stage in self.layers_up:
            maps = stage.upsample(maps) if hasattr(stage, "upsample") else maps
            maps = self._blocks(stage, maps + skips.pop(), condition)
        maps = self.final_up(maps)
        vectors = self.final_adaLN_modulation(self.final_condition_projection(condition))[:, None, None]
        shift, scale = vectors.chunk(2, dim=-1)
        normed = F.layer_norm(maps, maps.shape[-1:], eps=1e-6)
        sample = self.final_linear(modulate(normed, shift, scale)).movedim(-1, 1)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def hidden_multiply_adds(self) -> int:
        """Of the scans at the size the model was built for, which no counter of matrix products sees."""
        total = 0
        height, width = (side // self.config["patch_size"] for side in self.latent_size)
        down = [*zip(self.layers, (1, 2, 4, 4), strict=True), (self.mid_layer, 4)]
        for stage, factor in [*down, *zip(self.layers_up, (4, 4, 2, 1), strict=True)]:
            length = (height // factor) * (width // factor)
            for block in stage.blocks:
                total += scan_multiply_adds(1, length, len(block.op.Ds), block.op.state)
        return total

    def _blocks(self, stage: Any, maps: Tensor, condition: Tensor) -> Tensor:
        for block in stage.blocks:
            maps = self.run(block, maps, condition)
        return maps


VARIANTS: dict[str, dict[str, Any]] = {
    "xl": {"hidden_size": 320, "num_heads": 16, "ssm_state": 16},
    "xl-state1": {"hidden_size": 320, "num_heads": 16, "ssm_state": 1},
    **{f"e{width}": {"hidden_size": width, "num_heads": 8, "ssm_state": 1} for width in (96, 128, 192, 256)},
}


@register(
    "model",
    "lamamba-diff",
    summary="U-shape of Mamba scans and window attention; lamamba-diff-xl, xl-state1, e{96,128,192,256}",
    paper=Paper(
        "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba",
        "2408.02615",
        2024,
    ),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def lamamba_diff(variant: str | None = None, **config: Any) -> LaMambaDiff:
    """A fresh LaMamba-Diff of a named variant ("xl"; None: the defaults), with changes to its config."""
    return LaMambaDiff(**{**chosen(VARIANTS, variant), **config})


def _infer(state: State, options: Mapping[str, Any]) -> Settings:
    shapes = shapes_of(state)
    stem, positions = shapes.get("patch_embed.proj.weight", ()), shapes.get("pos_embed", ())
    if len(stem) != 4 or len(positions) != 4:
        return {}
    block = "layers.0.blocks.0."
    inner = shapes.get(f"{block}op.out_norm.weight", (2 * stem[0],))[0]
    depth = tuple(count(state, f"layers.{index}.blocks") for index in range(4))
    offsets, heads = shapes.get(f"{block}attn.relative_position_bias_table", (225, 16))
    settings: Settings = {
        "hidden_size": stem[0],
        "in_channels": stem[1],
        "patch_size": stem[2],
        "input_size": (positions[1] * stem[2], positions[2] * stem[2]),
        "depth": depth,
        "middle_depth": count(state, "mid_layer.blocks"),
        "num_heads": heads,
        "window_size": (math.isqrt(offsets) + 1) // 2,
        "ssm_state": shapes.get(f"{block}op.A_logs", (0, 16))[1],
        "ssm_ratio": inner / stem[0],
        "ssm_conv": shapes.get(f"{block}op.conv2d.weight", (3,))[-1],
        "ssm_conv_bias": f"{block}op.conv2d.bias" in shapes,
        "mlp_ratio": shapes.get(f"{block}mlp.fc1.bias", (4 * stem[0],))[0] / stem[0],
        "extra_decoder_blocks": count(state, "layers_up.3.blocks") > depth[0],
        "learn_sigma": shapes.get("final_linear.bias", (0,))[0] == 2 * stem[1],
    }
    return settings | label_rows(shapes.get("y_embedder.embedding_table.weight", (0,))[0], options)


def _needs(settings: Settings) -> Iterable[tuple[str, str]]:
    yield "hidden_size", "there is no patch_embed.proj.weight or pos_embed of four dimensions"
    yield "num_classes", "there is no y_embedder.embedding_table.weight"


def _rename(state: State) -> dict[str, Tensor]:
    """Window indices and masks are computed."""
    return {
        name: value
        for name, value in state.items()
        if not name.endswith(("relative_position_index", "attn_mask"))
    }


LAYOUTS["lamamba-diff"] = Layout(infer=_infer, needs=_needs, variants=VARIANTS, rename=_rename)
