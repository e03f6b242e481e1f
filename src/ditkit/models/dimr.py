"""DiMR: a cascade of resolutions, a transformer at the lowest, ConvNeXt above, with time only in the norms.

"Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models and Time-Dependent Layer
Normalization", arXiv 2406.09416. Every stage sees the whole noisy latent on its own grid, adds the features
of all blocks of the stage below, and predicts the noise of its resolution; the last prediction is the
model's. A norm's parameters move between two learned values by a sigmoid of the time (TD-LN, equation 6),
so there is no time embedding. What the authors call log-SNR is `8 t / 1000 - 4` with t in 1..1000, which
rises with the noise. As in their code, an even number of blocks is one more, and the first residual of a
ConvNeXt block has no norm. Left out: their axial RoPE, which can't work beside a class token. Not in their
repository, inferred: the 3R configuration; the input's division by its own deviation at 512 px is
`normalize_input`.

Dimensions: B batch, C channels, H x W latent, h x w grid of a stage of width D, N features handed up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  (a saved pipeline looks for it beside the model's class)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ditkit.models.base import ClassConditionalModel, ProcessName, chosen
from ditkit.models.building import SETTINGS, DataShape
from ditkit.models.layers import Attention, LabelDropout
from ditkit.models.layouts import LAYOUTS, Layout, Settings, State, count, shapes_of
from ditkit.registry import Paper, register

NormType = Literal["TDRMSN", "LN", "RMSN", "ADARMSN"]


# --- norms that know the time -------------------------------------------------------------------------


def time_dependent(first: Tensor, last: Tensor, slope: Tensor, offset: Tensor, time: Tensor) -> Tensor:
    """`p1 + sigmoid(tau slope + offset) (p0 - p1)`: all (D,), time (B,) -> (B, D)."""
    between = torch.sigmoid(time[:, None] * slope + offset)
    return last + between * (first - last)


class TimeDependent(nn.Module):
    """A parameter (D,) that moves with the time: (B,) -> (B, D). It starts without moving."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.param0 = nn.Parameter(torch.full((width,), start))
        self.param1 = nn.Parameter(torch.full((width,), start))
        self.nodecay_weight = nn.Parameter(
            torch.zeros(width)
        )  # the authors leave these two out of weight decay
        self.nodecay_bias = nn.Parameter(torch.zeros(width))

    def forward(self, time: Tensor) -> Tensor:
        return time_dependent(self.param0, self.param1, 1 + self.nodecay_weight, self.nodecay_bias, time)


def _beside(values: Tensor, hidden_states: Tensor) -> Tensor:
    """(B, D) to (B, 1, ..., D), to stand beside channels-last features."""
    return values.reshape(len(values), *[1] * (hidden_states.ndim - 2), values.shape[-1])


class TimeLayerNorm(nn.Module):
    """Layer norm with time-dependent weight and bias: (B, ..., D), time (B,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = TimeDependent(width, 1.0), TimeDependent(width, 0.0)

    def forward(self, hidden_states: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-5)
        return _beside(self.weight(time), normed) * normed + _beside(self.bias(time), normed)


class RMSNorm(nn.Module):
    """RMS norm whose scale is fixed (RMSN), time-dependent (TDRMSN) or of the class (ADARMSN).

    The epsilon, 1e-8, is added to the root mean square, not inside the root.
    """

    def __init__(self, width: int, kind: NormType) -> None:
        super().__init__()
        self.kind = kind
        if kind == "TDRMSN":
            self.scale = TimeDependent(width, 1.0)
        elif kind == "RMSN":
            self.scale = nn.Parameter(torch.ones(width))
        else:
            self.linear = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        normed = hidden_states / (hidden_states.square().mean(-1, keepdim=True).sqrt() + 1e-8)
        scale: Any = getattr(self, "scale", None)
        if self.kind == "RMSN":
            return scale * normed
        if self.kind == "TDRMSN":
            return _beside(scale(time), normed) * normed
        if label is None:
            raise ValueError("norm_type='ADARMSN' needs a class token: it works in transformer stages only")
        return _beside(1 + self.linear(label), normed) * normed


def make_norm(width: int, kind: NormType) -> nn.Module:
    return TimeLayerNorm(width) if kind == "LN" else RMSNorm(width, kind)


# --- blocks -------------------------------------------------------------------------------------------


class GatedMlp(nn.Module):
    """`w2(GELU(w0 x) w1 x)`: (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.w0, self.w1 = nn.Linear(width, hidden_width), nn.Linear(width, hidden_width)
        self.w2 = nn.Linear(hidden_width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w0(hidden_states)) * self.w1(hidden_states))


class TransformerBlock(nn.Module):
    """Attention and gated MLP over tokens (B, T, D)."""

    def __init__(self, stage: Stage, norm: NormType) -> None:
        super().__init__()
        self.norm1, self.norm2 = make_norm(stage.dim, norm), make_norm(stage.dim, norm)
        self.attn = Attention(stage.dim, stage.num_attention_heads, qkv_bias=False)
        self.mlp = GatedMlp(stage.dim, stage.hidden_dim)

    def forward(self, hidden_states: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states, time, label))
        return hidden_states + self.mlp(self.norm2(hidden_states, time, label))


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution and a gated MLP over maps (B, h, w, D)."""

    def __init__(self, stage: Stage, norm: NormType) -> None:
        super().__init__()
        kernel, width = stage.kernel_size, stage.dim
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm2 = make_norm(width, norm)
        self.mlp = GatedMlp(width, stage.hidden_dim)

    def forward(self, hidden_states: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        hidden_states = hidden_states + self.conv(hidden_states.movedim(-1, 1)).movedim(1, -1)
        return hidden_states + self.mlp(self.norm2(hidden_states, time, label))


class FeatureUpsample(nn.Module):
    """All features of the stage below, (B, h, w, N D_low), on this grid: (B, h r, w r, D)."""

    def __init__(self, in_width: int, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.norm_in, self.norm_out = TimeLayerNorm(in_width), TimeLayerNorm(width)
        self.kernel = nn.Linear(in_width, width * ratio * ratio)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        split = self.kernel(self.norm_in(features, time)).unflatten(3, (self.ratio, self.ratio, -1))
        space = split.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, h r, w r, D)
        return self.norm_out(space, time)


# --- stages -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One resolution, under the names of the authors' configurations.

    Args:
        block_type: "TransformerBlock" or "ConvNeXtBlock".
        dim: width D.
        hidden_dim: hidden width of the gated MLP.
        num_blocks: blocks; an even number is one more.
        max_height, max_width: grid that the stage has positions for.
        num_attention_heads: of a transformer.
        kernel_size: of the depthwise convolutions.
        image_input_ratio: by how much the latent is averaged down before the stage.
        input_feature_ratio: side of the patches that the stage then embeds.
        final_kernel_size: of the convolution that predicts the noise.
        dropout_prob: 0, in all shipped configurations; where others would drop was not seen.
    """

    block_type: Literal["TransformerBlock", "ConvNeXtBlock"]
    dim: int
    hidden_dim: int
    num_blocks: int
    max_height: int
    max_width: int
    num_attention_heads: int = 16
    kernel_size: int = 7
    image_input_ratio: int = 1
    input_feature_ratio: int = 1
    final_kernel_size: int = 3
    dropout_prob: float = 0.0

    def __post_init__(self) -> None:
        if self.block_type not in ("TransformerBlock", "ConvNeXtBlock"):
            raise ValueError(f"block_type={self.block_type!r} is neither TransformerBlock nor ConvNeXtBlock")
        if self.dropout_prob:
            raise ValueError(f"dropout_prob={self.dropout_prob}: only 0 is known")

    @property
    def depth(self) -> int:
        return self.num_blocks // 2 * 2 + 1

    @property
    def is_transformer(self) -> bool:
        return self.block_type == "TransformerBlock"


class StageNetwork(nn.Module):
    """One resolution: latent and the features of the stage below to a prediction and its own features."""

    def __init__(
        self, stage: Stage, channels: int, norm: NormType, label_rows: int, below: Stage | None
    ) -> None:
        super().__init__()
        self.stage = stage
        width, ratio = stage.dim, stage.input_feature_ratio
        self.input_conv = nn.Conv2d(channels, width, ratio, stride=ratio)
        self.positions = nn.Embedding(stage.max_height * stage.max_width, width)
        if below is not None:
            if stage.max_height % below.max_height:
                raise ValueError(
                    f"a stage of {stage.max_height} rows can't stand above one of {below.max_height}"
                )
            features = below.dim * (below.depth + 1)
            self.upsample = FeatureUpsample(features, width, stage.max_height // below.max_height)
        self.class_embeds = nn.Embedding(label_rows, width) if stage.is_transformer and label_rows else None
        block = TransformerBlock if stage.is_transformer else ConvNeXtBlock
        self.blocks = nn.ModuleList([block(stage, norm) for _ in range(stage.depth)])
        self.skip_denses = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(stage.depth // 2)])
        self.output_norm = TimeLayerNorm(width)
        kernel = stage.final_kernel_size
        self.output_conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2)

    def forward(
        self, latent: Tensor, time: Tensor, labels: Tensor | None, below: Tensor | None, run: Any
    ) -> tuple[Tensor, Tensor]:
        """Latent (B, C, H, W), time (B,), labels (B,), features below (B, h', w', N' D') to the prediction
        (B, C, h, w) and all features, (B, h, w, N D)."""
        stage = self.stage
        if stage.image_input_ratio > 1:
            size = [side // stage.image_input_ratio for side in latent.shape[2:]]
            latent = F.interpolate(latent, size, mode="area")
        hidden = self.input_conv(latent).movedim(1, -1)  # (B, h, w, D)
        height, width = hidden.shape[1:3]
        if height > stage.max_height or width > stage.max_width:
            raise ValueError(
                f"a grid of {height}x{width} in a stage with positions for "
                f"{stage.max_height}x{stage.max_width}: draw less, or build the model larger"
            )
        table = self.positions.weight.unflatten(0, (stage.max_height, stage.max_width))
        hidden = hidden + table[:height, :width]
        if below is not None:
            hidden = hidden + self.upsample(below, time)
        label = None
        if stage.is_transformer:
            hidden = hidden.flatten(1, 2)  # (B, h w, D)
            if self.class_embeds is not None and labels is not None:
                label = self.class_embeds(labels)  # (B, D)
                hidden = torch.cat([label[:, None], hidden], dim=1)
        features, skips = [hidden], []
        half = stage.depth // 2
        for index, block in enumerate(self.blocks):
            if index > half:
                hidden = self.skip_denses[index - half - 1](torch.cat([hidden, skips.pop()], dim=-1))
            hidden = run(block, hidden, time, label)
            features.append(hidden)
            if index < half:
                skips.append(hidden)
        if stage.is_transformer:
            start = 0 if label is None else 1
            features = [feature[:, start:].unflatten(1, (height, width)) for feature in features]
        maps = self.output_norm(features[-1], time).movedim(-1, 1)
        return self.output_conv(maps), torch.cat(features, dim=-1)


@dataclass
class DiMROutput(BaseOutput):
    """The prediction (B, C, H, W), and those of all stages, lowest resolution first."""

    sample: Tensor
    stages: list[Tensor]


class DiMR(ClassConditionalModel):
    """The network.

    Args:
        stages: of each resolution, lowest first; keys as in `Stage`.
        in_channels: latent channels C.
        num_classes: classes, the null class not counted; None: unconditional.
        class_dropout_prob: how often training drops a label; above 0 there is a null class for guidance.
        norm_type: in the blocks; "TDRMSN", "LN" (time-dependent layer norm), "RMSN" (no time) or "ADARMSN"
            (of the class; transformer stages only). Norms around stages are always time-dependent.
        loss_coeffs: weight of each stage's loss; None: 1/4 for each halving of the grid.
        block_grad_to_lowres: whether a stage's loss stops at its own features.
        normalize_input: divide each latent by its own deviation (the authors' option for 512 px).
        num_timesteps: T; times run from 0 to T - 1 and reach the norms as tau = 2 (t + 1) / T - 1.

    Raises:
        ValueError: for stages that do not fit.
    """

    authors_guidance = "all"
    objectives = {"multi-scale": {}}
    _no_split_modules = ["TransformerBlock", "ConvNeXtBlock"]

    @register_to_config
    def __init__(
        self,
        stages: Sequence[Mapping[str, Any]] = (),
        in_channels: int = 4,
        num_classes: int | None = 1000,
        class_dropout_prob: float = 0.1,
        norm_type: NormType = "TDRMSN",
        loss_coeffs: Sequence[float] | None = None,
        block_grad_to_lowres: bool = False,
        normalize_input: bool = False,
        num_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        if norm_type not in ("TDRMSN", "LN", "RMSN", "ADARMSN"):
            raise ValueError(f"norm_type={norm_type!r} is unknown; there are TDRMSN, LN, RMSN, ADARMSN")
        described = [Stage(**stage) for stage in stages]
        if not described:
            raise ValueError("stages is empty: a DiMR needs a stage for each resolution, or a named variant")
        self.in_channels = self.out_channels = in_channels
        last = described[-1]
        scale = last.image_input_ratio * last.input_feature_ratio
        self.latent_size = (last.max_height * scale, last.max_width * scale)
        self.side_multiple = math.lcm(*(s.image_input_ratio * s.input_feature_ratio for s in described))
        self.gradient_checkpointing = False
        self.y_embedder = LabelDropout(num_classes or 0, class_dropout_prob)
        rows = self.y_embedder.num_rows if num_classes is not None else 0
        self.stage_networks = nn.ModuleList(
            StageNetwork(stage, in_channels, norm_type, rows, described[index - 1] if index else None)
            for index, stage in enumerate(described)
        )
        halvings = [math.log2(last.max_height / stage.max_height) for stage in described]
        self.loss_weights = list(loss_coeffs) if loss_coeffs is not None else [0.25**n for n in halvings]
        if len(self.loss_weights) != len(described):
            raise ValueError(
                f"loss_coeffs={self.loss_weights}: expected one for each of {len(described)} stages"
            )
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The authors' start: normal of 0.02 for linear maps and tables; convolutions as PyTorch's."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-2.0, b=2.0)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def unfit_for(self, process: ProcessName) -> str | None:
        """Flow: its norms read whole timesteps, and its loss is that of noise at each resolution."""
        if process == "flow":
            return f"its norms read timesteps 0 to {self.config['num_timesteps'] - 1} and it predicts noise"
        return super().unfit_for(process)

    def predictions(
        self, hidden_states: Tensor, time: Tensor, class_labels: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Prediction (B, C, h, w) and features (B, h, w, N D) of every stage.

        Args:
            hidden_states: noised latent, (B, C, H, W).
            time: tau, (B,): -1 without noise to 1, a quarter of what the authors call log-SNR.
            class_labels: (B,), dropped ones replaced.
        """
        if self.config["normalize_input"]:
            hidden_states = hidden_states / hidden_states.std(dim=(1, 2, 3), keepdim=True)
        results, below = [], None
        for network in self.stage_networks:
            prediction, features = network(hidden_states, time, class_labels, below, self.run)
            results.append((prediction, features))
            below = features.detach() if self.config["block_grad_to_lowres"] else features
        return results

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> DiMROutput | tuple[Tensor]:
        """The network's prediction of the noise.

        Args:
            hidden_states: noised latent, (B, C, H, W), at most as large as the stages have positions for.
            timestep: times, (B,) or a scalar, possibly fractional, 0..T-1.
            class_labels: integer labels, (B,); the null class is `num_classes`, and None is null for all.
            force_drop_ids: 1 where the label is to be dropped, (B,); None drops at random in training.
            return_dict: whether to return an object with `.sample` and `.stages`, or a tuple of the sample.

        Raises:
            ValueError: for inputs of the wrong shape or too large.
        """
        if timestep.ndim == 0:
            timestep = timestep.expand(len(hidden_states))
        self.check(hidden_states, timestep, class_labels)
        labels = None
        if self.config["num_classes"] is not None:
            labels = self.y_embedder.drop(self.labels(class_labels, len(hidden_states)), force_drop_ids)
        time = (2 * (timestep.float() + 1) / self.config["num_timesteps"] - 1).to(hidden_states.dtype)
        stages = [prediction for prediction, _ in self.predictions(hidden_states, time, labels)]
        return DiMROutput(sample=stages[-1], stages=stages) if return_dict else (stages[-1],)


# --- the loss, guidance -------------------------------------------------------------------------------


def multi_scale_noise(noise: Tensor, factor: int, scale_correction: bool = True) -> Tensor:
    """Noise at a lower resolution, (B, C, H, W) to (B, C, h, w): a box filter that keeps the variance 1.

    Args:
        noise: standard normal.
        factor: k, by which the resolution falls. Odd sides, for which (H - 1) must be a multiple of k, take a
            box of k + 1 around every k-th pixel.
        scale_correction: divide by the box's side instead of its area.

    Raises:
        ValueError: a size that does not fit.
    """
    odd = noise.shape[-1] % 2 == 1 and factor > 1
    if any((side - odd) % factor for side in noise.shape[2:]):
        raise ValueError(f"noise of {tuple(noise.shape[2:])} can't be brought down by {factor}")
    box, padding = (factor + 1, (factor + 1) // 2) if odd else (factor, 0)
    total = F.avg_pool2d(noise, box, stride=factor, padding=padding, divisor_override=1)
    return total / (box if scale_correction else box * box)


def multi_scale_loss(
    predictions: Sequence[Tensor], noise: Tensor, coefficients: Sequence[float], scale_correction: bool = True
) -> Tensor:
    """Weighted sum over stages of the squared error against the noise at each stage's resolution, (B,).

    Args:
        predictions: of the stages, (B, C, h, w) each.
        noise: that was added, (B, C, H, W).
        coefficients: weight of each stage (`DiMR.loss_weights`).
        scale_correction: see `multi_scale_noise`.
    """
    losses = []
    for prediction, coefficient in zip(predictions, coefficients, strict=True):
        width, full = prediction.shape[-1], noise.shape[-1]
        factor = full // width if full % 2 == 0 else (full - 1) // max(width - 1, 1)
        target = multi_scale_noise(noise, factor, scale_correction)
        losses.append(coefficient * (prediction - target).square().flatten(1).mean(1))
    return torch.stack(losses).sum(0)


def rising_guidance(
    timestep: Tensor, guidance_scale: float, power: float, num_timesteps: int = 1000
) -> Tensor:
    """The authors' second form of guidance: 1 at pure noise, rising to the scale as the noise falls, (B,)."""
    progress = (1 - timestep / num_timesteps) ** power
    return 1 + (guidance_scale - 1) * (1 - torch.cos(math.pi * progress)) / 2


# --- in the registry ----------------------------------------------------------------------------------


def _transformer(dim: int, num_blocks: int, side: int, ratio: int) -> dict[str, Any]:
    return {
        "block_type": "TransformerBlock",
        "dim": dim,
        "hidden_dim": 2 * dim,
        "num_attention_heads": 16,
        "num_blocks": num_blocks,
        "max_height": side,
        "max_width": side,
        "input_feature_ratio": ratio,
    }


def _convnext(dim: int, num_blocks: int, side: int, ratio: int = 1) -> dict[str, Any]:
    return {
        "block_type": "ConvNeXtBlock",
        "dim": dim,
        "hidden_dim": 2 * dim,
        "kernel_size": 7,
        "num_blocks": num_blocks,
        "max_height": side,
        "max_width": side,
        "input_feature_ratio": ratio,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "xl/2r": {"stages": (_transformer(960, 39, 16, 2), _convnext(480, 20, 32))},
    "g/2r": {"stages": (_transformer(1152, 57, 16, 2), _convnext(576, 29, 32))},
    "xl/3r": {
        "stages": (_transformer(960, 39, 16, 4), _convnext(480, 20, 32, 2), _convnext(240, 20, 64)),
        "normalize_input": True,
    },
}


@register(
    "model",
    "dimr",
    summary="multi-resolution cascade with time-dependent norms; dimr-xl/2r, g/2r (256 px), xl/3r (512 px)",
    paper=Paper(
        "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models and Time-Dependent "
        "Layer Normalization",
        "2406.09416",
        2024,
    ),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def dimr(variant: str | None = None, **config: Any) -> DiMR:
    """A fresh DiMR of a named variant ("xl/2r", also None), with changes to its config."""
    given = {} if variant is None and "stages" in config else chosen(VARIANTS, variant or "xl/2r")
    return DiMR(**{**given, **config})


def _for_data(shape: DataShape, variant: str | None) -> dict[str, Any]:
    """Its size is that of its stages, and it learns no variance."""
    return {"in_channels": shape.channels, "num_classes": shape.classes}


SETTINGS["dimr"] = _for_data

_NAMES = (
    (r"^stages\.", "stage_networks."),
    (r"\.input_layer\.1\.", ".input_conv."),
    (r"\.input_layer\.3\.position_embeddings\.", ".positions."),
    (r"\.block1\.1\.", ".conv."),
    (r"\.block1\.norm\.", ".norm1."),
    (r"\.block1\.query_key_value\.", ".attn.qkv."),
    (r"\.block1\.dense\.", ".attn.proj."),
    (r"\.block2\.norm\.", ".norm2."),
    (r"\.block2\.", ".mlp."),
    (r"\.upsample\.0\.", ".upsample.norm_in."),
    (r"\.upsample\.1\.kernel\.", ".upsample.kernel."),
    (r"\.upsample\.2\.", ".upsample.norm_out."),
    (r"\.output_layer\.0\.", ".output_norm."),
    (r"\.output_layer\.2\.", ".output_conv."),
)


def our_name(name: str) -> str:
    """Our name of one of the authors' parameters."""
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    return name


def _rename(state: State) -> dict[str, Tensor]:
    return {our_name(name): value for name, value in state.items()}


def _infer(state: State, options: Mapping[str, Any]) -> Settings:
    shapes = shapes_of(state)
    heads = {stage["dim"]: stage["num_attention_heads"] for stage in _first_stages()}
    stages, labels = [], None
    for index in range(count(state, "stages")):
        prefix = f"stages.{index}"
        patches = shapes.get(f"{prefix}.input_layer.1.weight", ())
        table = shapes.get(f"{prefix}.input_layer.3.position_embeddings.weight", (0,))
        kernel = shapes.get(f"{prefix}.blocks.0.block1.1.weight")
        side = math.isqrt(table[0])
        if len(patches) != 4 or side * side != table[0]:
            return {}
        stage = {
            "block_type": "ConvNeXtBlock" if kernel else "TransformerBlock",
            "dim": patches[0],
            "hidden_dim": shapes.get(f"{prefix}.blocks.0.block2.w0.bias", (0,))[0],
            "num_blocks": count(state, f"{prefix}.blocks"),
            "max_height": side,
            "max_width": side,
            "input_feature_ratio": patches[2],
            "final_kernel_size": shapes.get(f"{prefix}.output_layer.2.weight", (0, 0, 3))[2],
        }
        stage |= {"kernel_size": kernel[2]} if kernel else {}
        if not kernel and patches[0] in heads:
            stage["num_attention_heads"] = heads[patches[0]]
        stages.append(stage)
        labels = shapes.get(f"{prefix}.class_embeds.weight", (labels,))[0]
    if not stages:
        return {}
    full = stages[-1]["max_height"] * stages[-1]["input_feature_ratio"]
    for stage in stages:
        stage["image_input_ratio"] = full // (stage["max_height"] * stage["input_feature_ratio"])
    norm = "stages.0.blocks.0.block2.norm."
    kinds = {"scale.param0": "TDRMSN", "weight.param0": "LN", "scale": "RMSN", "linear.weight": "ADARMSN"}
    return {
        "stages": stages,
        "in_channels": shapes["stages.0.input_layer.1.weight"][1],
        "num_classes": None if labels is None else labels - 1,
        "norm_type": next((kind for name, kind in kinds.items() if norm + name in shapes), "TDRMSN"),
    }


def _first_stages() -> list[dict[str, Any]]:
    return [variant["stages"][0] for variant in VARIANTS.values()]


def _needs(settings: Settings) -> Iterable[tuple[str, str]]:
    yield (
        "stages",
        "its stages.N.input_layer or square position tables are missing: give config={'stages': [...]}",
    )
    for stage in settings["stages"]:
        if stage["block_type"] == "TransformerBlock" and "num_attention_heads" not in stage:
            yield (
                "num_attention_heads",
                f"a width of {stage['dim']} is no named size's: give config={{'stages': ...}} with them",
            )


LAYOUTS["dimr"] = Layout(infer=_infer, needs=_needs, variants=VARIANTS, rename=_rename, null_class=False)
