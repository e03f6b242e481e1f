"""DiCo: a U-shaped denoiser of convolutions only, with compact channel attention.

"DiCo: Revitalizing ConvNets for Scalable and Efficient Diffusion Modeling", arXiv 2505.11196. A block is a
1 x 1 and a depthwise 3 x 3 convolution, a sigmoid gate for each channel (compact channel attention, CCA)
and a feed-forward of 1 x 1 convolutions, modulated and gated as in DiT. Three levels of widths D, 2D, 4D;
the last decoder level stays at 2D. No attention, patches or positions: any latent with sides of 4 n runs.
Parameter names are the authors'. Text conditioning (the paper's two forms, not in the authors' code) is an
option; what the paper does not say of it (placement, the text's perceptron) and we chose is in `TextMixer`.

Dimensions: B batch, C channels, H and W height and width of a level, D its width, T text tokens of width E.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  (a saved pipeline looks for it beside the model's class)
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditkit.models.base import ClassConditionalModel, both_sides, chosen
from ditkit.models.layers import CrossAttention, LabelDropout, TimestepEmbedder
from ditkit.models.layouts import LAYOUTS, Layout, Settings, State, count, label_rows, shapes_of
from ditkit.models.text import TEXT_SETTINGS
from ditkit.registry import Paper, register

TextForm = Literal["cross-attention", "depthwise"]


def channel_norm(maps: Tensor) -> Tensor:
    """Layer norm over the channels of each pixel, no affine part: (B, D, H, W)."""
    last = maps.movedim(1, -1)
    return F.layer_norm(last, last.shape[-1:], eps=1e-6).movedim(-1, 1)


class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution as the product of matrices that it is: channels stay last in memory."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return F.linear(maps.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


def text_depthwise(maps: Tensor, text: Tensor, kernel_size: int = 9) -> Tensor:
    """Depthwise convolution whose kernels are the text (Algorithm 1).

    Args:
        maps: (B, D, H, W).
        text: (B, T, D), T at most K^2; its last token is repeated to K^2, which are the kernel's rows.
        kernel_size: K, odd.

    Returns:
        (B, D, H, W).

    Raises:
        ValueError: more tokens than the kernel has places.
    """
    batch, width = maps.shape[:2]
    places = kernel_size * kernel_size
    if not 0 < text.shape[1] <= places:
        raise ValueError(
            f"{text.shape[1]} text tokens do not fit a kernel of {places}: cut them, or pad to 1"
        )
    text = torch.cat([text, text[:, -1:].expand(-1, places - text.shape[1], -1)], dim=1)  # (B, K K, D)
    kernels = text.transpose(1, 2).reshape(batch * width, 1, kernel_size, kernel_size)
    together = maps.reshape(1, batch * width, *maps.shape[2:])
    mixed = F.conv2d(together, kernels, padding=kernel_size // 2, groups=batch * width)
    return mixed.reshape(maps.shape)


class TextMixer(nn.Module):
    """Text into a block's maps, (B, D, H, W) and (B, T, E) -> (B, D, H, W).

    The paper gives Algorithm 1 and names cross-attention; inferred are: after the convolutions' residual, on
    the residual stream, added with a scale for each channel that starts at zero; the text's perceptron of two
    layers with GELU and hidden width D.
    """

    def __init__(self, width: int, text_width: int, form: TextForm, num_heads: int = 8) -> None:
        super().__init__()
        self.form = form
        self.mlp = nn.Sequential(nn.Linear(text_width, width), nn.GELU(), nn.Linear(width, width))
        self.scale = nn.Parameter(torch.zeros(width, 1, 1))
        if form == "cross-attention":
            self.attention = CrossAttention(width, num_heads)

    def forward(self, maps: Tensor, text: Tensor) -> Tensor:
        text = self.mlp(text)  # (B, T, D)
        if self.form == "depthwise":
            return maps + self.scale * text_depthwise(maps, text)
        mixed = self.attention(maps.flatten(2).transpose(1, 2), text)  # (B, H W, D)
        return maps + self.scale * mixed.transpose(1, 2).reshape(maps.shape)


class DiCoBlock(nn.Module):
    """Convolutions with channel attention, then a feed-forward, each modulated and gated: (B, D, H, W)."""

    def __init__(
        self, width: int, mlp_ratio: float, channel_attention: bool, text_width: int | None, text: TextForm
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.conv1 = PointwiseConv(width, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.ca = (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), PointwiseConv(width, width), nn.Sigmoid())
            if channel_attention
            else None
        )
        self.conv3 = PointwiseConv(width, width)
        self.conv4 = PointwiseConv(width, hidden)
        self.conv5 = PointwiseConv(hidden, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.text = TextMixer(width, text_width, text) if text_width is not None else None

    def forward(self, maps: Tensor, conditioning: Tensor, text: Tensor | None = None) -> Tensor:
        """Maps (B, D, H, W), conditioning (B, D), text (B, T, E) -> (B, D, H, W)."""
        modulation = self.adaLN_modulation(conditioning)[..., None, None].chunk(6, dim=1)  # 6 x (B, D, 1, 1)
        shift_conv, scale_conv, gate_conv, shift_mlp, scale_mlp, gate_mlp = modulation
        mixed = self.conv1(channel_norm(maps) * (1 + scale_conv) + shift_conv)
        mixed = F.gelu(self.conv2(mixed))
        if self.ca is not None:
            mixed = mixed * self.ca(mixed)
        maps = maps + gate_conv * self.conv3(mixed)
        if self.text is not None and text is not None:
            maps = self.text(maps, text)
        hidden = F.gelu(self.conv4(channel_norm(maps) * (1 + scale_mlp) + shift_mlp))
        return maps + gate_mlp * self.conv5(hidden)


class _Resample(nn.Module):
    """A 3 x 3 convolution, then pixels to channels (down) or channels to pixels (up), by 2."""

    def __init__(self, width: int, out: int, shuffle: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, out, 3, padding=1, bias=False), shuffle)

    def forward(self, maps: Tensor) -> Tensor:
        return self.body(maps)


class _Stem(nn.Module):
    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.proj(maps)


class _LabelPyramid(LabelDropout):
    """A table for each width, under one decision to drop: (B,) -> [(B, D), (B, 2D), (B, 4D)]."""

    def __init__(self, num_classes: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__(num_classes, dropout)
        for index, width in enumerate(widths):
            self.add_module(f"embedding_table_{index}", nn.Embedding(self.num_rows, width))

    def forward(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> list[Tensor]:
        labels = self.drop(labels, force_drop_ids)
        return [table(labels) for table in self.children()]


class _ConvHead(nn.Module):
    """Modulated channel norm and a 3 x 3 convolution: (B, D, H, W) -> (B, C_out, H, W)."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.out_proj = nn.Conv2d(width, out_channels, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, maps: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditioning)[..., None, None].chunk(2, dim=1)
        return self.out_proj(channel_norm(maps) * (1 + scale) + shift)


class DiCo(ClassConditionalModel):
    """The network.

    Args:
        in_channels: latent channels C.
        hidden_size: width D of the first level, even.
        depth: blocks of the two encoder levels, the middle and the two decoder levels.
        mlp_ratio: hidden width of the feed-forward over the width.
        class_dropout_prob: how often training drops a label; above 0 there is a null class for guidance.
        num_classes: classes, the null class not counted; 0 for a model that is conditioned on text only.
        learn_sigma: whether 2 C channels are predicted, the second half for a learned variance.
        input_size: of the latent, what pipelines draw by default; any sides of 4 n run.
        channel_attention: False leaves CCA out (the paper's ablation).
        text_width: width E of text states; None: no text.
        text: which of the paper's two forms mixes the text in; see `TextMixer`.

    Raises:
        ValueError: for sizes that do not divide.
    """

    _no_split_modules = ["DiCoBlock"]
    _repeated_blocks = ["DiCoBlock"]
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder", "y_embedder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        hidden_size: int = 416,
        depth: Sequence[int] = (9, 9, 10, 9, 9),
        mlp_ratio: float = 2.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        input_size: int | tuple[int, int] = 32,
        channel_attention: bool = True,
        text_width: int | None = None,
        text: TextForm = "depthwise",
    ) -> None:
        super().__init__()
        if hidden_size % 2:
            raise ValueError(f"hidden_size={hidden_size} is odd; the levels halve it")
        if len(depth) != 5:
            raise ValueError(f"depth={tuple(depth)}: expected five numbers, of encoder, middle and decoder")
        if text not in ("cross-attention", "depthwise"):
            raise ValueError(f"text={text!r} is neither 'cross-attention' nor 'depthwise'")
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.latent_size, self.side_multiple = both_sides(input_size), 4
        self.gradient_checkpointing = False
        width = hidden_size
        widths = (width, 2 * width, 4 * width)

        def level(width: int, blocks: int) -> nn.ModuleList:
            made = (DiCoBlock(width, mlp_ratio, channel_attention, text_width, text) for _ in range(blocks))
            return nn.ModuleList(made)

        self.x_embedder = _Stem(in_channels, width)
        self.t_embedder_1, self.t_embedder_2, self.t_embedder_3 = map(TimestepEmbedder, widths)
        self.y_embedder = _LabelPyramid(num_classes, widths, class_dropout_prob)
        self.encoder_level_1 = level(width, depth[0])
        self.down1_2 = _Resample(width, width // 2, nn.PixelUnshuffle(2))
        self.encoder_level_2 = level(2 * width, depth[1])
        self.down2_3 = _Resample(2 * width, width, nn.PixelUnshuffle(2))
        self.latent = level(4 * width, depth[2])
        self.up3_2 = _Resample(4 * width, 8 * width, nn.PixelShuffle(2))
        self.reduce_chan_level2 = PointwiseConv(4 * width, 2 * width)
        self.decoder_level_2 = level(2 * width, depth[3])
        self.up2_1 = _Resample(2 * width, 4 * width, nn.PixelShuffle(2))
        self.reduce_chan_level1 = PointwiseConv(2 * width, 2 * width)
        self.decoder_level_1 = level(2 * width, depth[4])
        self.final_layer = _ConvHead(2 * width, self.out_channels)
        self.initialize_weights()
        nn.utils.convert_conv2d_weight_memory_format(self, torch.channels_last)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As diffusers does it; the weights lie in memory as those of a fresh model.

        A convolution on maps with channels last lays out its weights anew in every call, unless they lie so.
        """
        loaded = super().from_pretrained(*arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info`
        nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
        return loaded

    @property
    def text_channels(self) -> int | None:
        return self.config["text_width"]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The authors' start: Xavier, with every gate, every text scale and the head at zero."""
        for name, parameter in self.named_parameters():
            zero = (
                "bias" in name,
                "adaLN_modulation" in name,
                "out_proj" in name,
                name.endswith("text.scale"),
            )
            if any(zero):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder_", "y_embedder.")):
                nn.init.normal_(parameter, std=0.02)
            else:  # only the stem is taken as one linear map
                nn.init.xavier_uniform_(parameter.flatten(1) if name.startswith("x_embedder") else parameter)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The network's prediction.

        Args:
            hidden_states: noised latent, (B, C, H, W), sides of 4 n.
            timestep: times, (B,) or a scalar, possibly fractional, 0..999.
            class_labels: integer labels, (B,); the null class is `num_classes`, and None is null for all.
            force_drop_ids: 1 where the label is to be dropped, (B,); None drops at random in training.
            encoder_hidden_states: text states, (B, T, E), of a model with text.
            return_dict: whether to return an object with `.sample`, or a tuple.

        Returns:
            The prediction, (B, C_out, H, W).

        Raises:
            ValueError: for inputs of the wrong shape; text without a place for it, or the reverse.
        """
        if timestep.ndim == 0:
            timestep = timestep.expand(len(hidden_states))
        self.check(hidden_states, timestep, class_labels)
        text = encoder_hidden_states
        if (text is None) != (self.config["text_width"] is None):
            raise ValueError(
                f"encoder_hidden_states {'is missing' if text is None else 'was given'}, but the model has "
                f"text_width={self.config['text_width']}"
            )
        dtype = hidden_states.dtype
        labels = self.y_embedder(self.labels(class_labels, len(hidden_states)), force_drop_ids)
        embedders = (self.t_embedder_1, self.t_embedder_2, self.t_embedder_3)
        narrow, middle, wide = (
            embedder(timestep, dtype=dtype) + label for embedder, label in zip(embedders, labels, strict=True)
        )  # (B, D), (B, 2D), (B, 4D)

        def level(blocks: Iterable[nn.Module], maps: Tensor, conditioning: Tensor) -> Tensor:
            for block in blocks:
                maps = self.run(block, maps, conditioning, text)
            return maps

        # Channels last in memory, which every layer here keeps: norms and 1 x 1 convolutions need it so.
        hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
        first = level(self.encoder_level_1, self.x_embedder(hidden_states), narrow)  # (B, D, H, W)
        second = level(self.encoder_level_2, self.down1_2(first), middle)  # (B, 2D, H/2, W/2)
        maps = level(self.latent, self.down2_3(second), wide)  # (B, 4D, H/4, W/4)
        maps = self.reduce_chan_level2(torch.cat([self.up3_2(maps), second], dim=1))  # (B, 2D, H/2, W/2)
        maps = level(self.decoder_level_2, maps, middle)
        maps = self.reduce_chan_level1(torch.cat([self.up2_1(maps), first], dim=1))  # (B, 2D, H, W)
        maps = level(self.decoder_level_1, maps, middle)  # at 2D, and its conditioning, to the end
        sample = self.final_layer(maps, middle)  # (B, C_out, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


VARIANTS: dict[str, dict[str, Any]] = {
    "s": {"hidden_size": 128, "depth": (5, 4, 4, 4, 4), "mlp_ratio": 2},
    "b": {"hidden_size": 256, "depth": (5, 4, 4, 4, 4), "mlp_ratio": 2},
    "l": {"hidden_size": 352, "depth": (9, 8, 9, 8, 9), "mlp_ratio": 2},
    "xl": {"hidden_size": 416, "depth": (9, 9, 10, 9, 9), "mlp_ratio": 2},
    "h": {"hidden_size": 416, "depth": (14, 12, 10, 12, 14), "mlp_ratio": 4},
}


@register(
    "model",
    "dico",
    summary="U-shaped denoiser of convolutions with compact channel attention; dico-{s,b,l,xl,h}",
    paper=Paper(
        "DiCo: Revitalizing ConvNets for Scalable and Efficient Diffusion Modeling", "2505.11196", 2025
    ),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def dico(variant: str | None = None, **config: Any) -> DiCo:
    """A fresh DiCo of a named variant ("xl"; None: the defaults), with changes to its config."""
    return DiCo(**{**chosen(VARIANTS, variant), **config})


def _infer(state: State, options: Mapping[str, Any]) -> Settings:
    settings: Settings = {}
    shapes = shapes_of(state)
    stem = shapes.get("x_embedder.proj.weight", ())
    if len(stem) == 4 and all(stem):
        settings |= {"hidden_size": stem[0], "in_channels": stem[1]}
        settings["learn_sigma"] = shapes.get("final_layer.out_proj.bias", (0,))[0] == 2 * stem[1]
        settings["mlp_ratio"] = shapes.get("latent.0.conv4.bias", (8 * stem[0],))[0] / (4 * stem[0])
    levels = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
    settings["depth"] = tuple(count(state, level) for level in levels)
    return settings | label_rows(shapes.get("y_embedder.embedding_table_0.weight", (0,))[0], options)


def _needs(settings: Settings) -> Iterable[tuple[str, str]]:
    yield "hidden_size", "there is no x_embedder.proj.weight of four dimensions"
    yield "num_classes", "there is no y_embedder.embedding_table_0.weight"


TEXT_SETTINGS["dico"] = lambda width: {"text_width": width, "num_classes": 0}
LAYOUTS["dico"] = Layout(infer=_infer, needs=_needs, variants=VARIANTS)
