"""PT-DiT: attention among one proxy token for each window, then within windows and shifted windows.

"Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task", arXiv 2409.04005. A
window's proxy is the mean of its tokens; proxies attend to each other and every token attends to them
(global, section 3.2.1), then tokens attend within their window and within windows shifted by half (local,
3.2.2). One network for pictures, clips and several views: frames are an axis of the grid. Blocks and
parameter names are those of the released model, in which the proxy branch has no time modulation (the
paper's figure draws one). With proxies for cells smaller than the window that code averages a comb of
tokens, `proxy="comb"`; `"cell"` is the contiguous cell it probably meant. There one sample's time reaches
another sample's windows when times differ in a batch; here each sample has its own. The class-conditional S
model was not released; inferred: the label is added to the time's embedding, and there is no text
attention. XL's sizes are the released ones, the others' those of the paper's table.

Dimensions: B batch, C latent channels, F x H x W latent, f x h x w grid of tokens, P windows of n tokens, D
width, Q proxies, T text tokens of width E.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  (a saved pipeline looks for it beside the model's class)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from ditkit.models.base import ClassConditionalModel, both_sides, chosen
from ditkit.models.building import SETTINGS, DataShape, usual_settings
from ditkit.models.layers import (
    CrossAttention,
    LabelEmbedder,
    RoutableBlock,
    modulate,
    sincos_line,
    sincos_table,
    unpatchify,
)
from ditkit.models.layouts import LAYOUTS, Layout, Settings, State, count, label_rows, shapes_of
from ditkit.models.routing import ChannelRouting
from ditkit.models.text import TEXT_SETTINGS
from ditkit.models.windows import Grid, from_windows, shift_mask, to_windows
from ditkit.registry import Paper, register

_BLOCKED = -10000.0  # what the authors add to a score that must not count


def pool_proxies(windows: Tensor, window: Grid, proxy: Grid, form: Literal["comb", "cell"]) -> Tensor:
    """The proxies of windows (B, P, n, D), means of their tokens: (B, Q, D), Q = P r_h r_w.

    Args:
        window: sides of a window.
        proxy: sides of what one proxy stands for; r is their quotient over height and width. Frames of a
            window share their proxies.
        form: which tokens those are when r > 1: "comb", of equal position modulo r; "cell", neighbours.
    """
    if window[1:] == proxy[1:]:
        return windows.mean(dim=2)
    rows, columns = window[1] // proxy[1], window[2] // proxy[2]
    if form == "comb":
        split = windows.unflatten(
            2, (window[0], proxy[1], rows, proxy[2], columns)
        )  # (B, P, f, h, r, w, r, D)
        return split.mean(dim=(2, 3, 5)).flatten(1, 3)
    split = windows.unflatten(2, (window[0], rows, proxy[1], columns, proxy[2]))  # (B, P, f, r, h, r, w, D)
    return split.mean(dim=(2, 4, 6)).flatten(1, 3)


def relative_attention_cost(ratio: int, tokens: int) -> float:
    """Attention multiply-adds over those of full attention (equation 4).

    Args:
        ratio: tokens of a window, the product of the compression ratios.
        tokens: N, of the whole grid.
    """
    return 1 / ratio**2 + 1 / ratio + 2 * ratio / tokens


class PTDiTBlock(RoutableBlock):
    """Proxies, windows, shifted windows, text, feed-forward; tokens stay in windows (B, P, n, D)."""

    def __init__(
        self, width: int, num_heads: int, bias: bool, eps: float, shift_window: bool, text: bool
    ) -> None:
        super().__init__()
        self.eps = eps
        self.proxy_attn1 = CrossAttention(width, num_heads, bias)
        self.pvisual_attn2 = CrossAttention(width, num_heads, bias)
        self.linear_1_visual = nn.Linear(width, width)
        self.attn1 = CrossAttention(width, num_heads, bias)
        if shift_window:
            self.attn3 = CrossAttention(width, num_heads, bias)
            self.linear_2 = nn.Linear(width, width)
            self.proxy_scale_shift_table = nn.Parameter(torch.randn(3, width) / width**0.5)
        self.shift_window = shift_window
        self.attn2 = CrossAttention(width, num_heads, bias) if text else None
        self.ff = FeedForward(width, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        for closed in (self.linear_1_visual, *((self.linear_2,) if shift_window else ())):
            nn.init.zeros_(closed.weight)
            nn.init.zeros_(closed.bias)

    def norm(self, hidden_states: Tensor) -> Tensor:
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)

    def transform(self, hidden_states: Tensor, conditioning: Tensor, *more: Any) -> Tensor:
        """One block.

        Args:
            hidden_states: (B, P, n, D).
            conditioning: the time's vector, (B, 6, D).
            *more: the `Geometry` and the text (B, T, D) with its mask (B, 1, 1, T), or two None.
        """
        geometry, text, text_mask = more
        table = self.scale_shift_table + conditioning  # (B, 6, D)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table[:, :, None, None].unbind(1)  # (B, 1, 1, D)
        shape = hidden_states.shape
        batch = shape[0]
        proxies = pool_proxies(hidden_states, geometry.window, geometry.proxy, geometry.form)  # (B, Q, D)
        proxies = proxies + self.proxy_attn1(self.norm(proxies))
        visual = self.pvisual_attn2(self.norm(hidden_states).flatten(1, 2), self.norm(proxies))  # (B, P n, D)
        hidden_states = hidden_states + self.linear_1_visual(visual).reshape(shape)

        modulated = modulate(self.norm(hidden_states), shift, scale)
        hidden_states = hidden_states + gate * self.attn1(modulated.flatten(0, 1)).reshape(shape)
        if self.shift_window:
            moved = self.proxy_scale_shift_table + conditioning[:, :3]  # (B, 3, D)
            shift, scale, gate = moved[:, :, None, None].unbind(1)
            shifted = geometry.roll(modulate(self.norm(hidden_states), shift, scale), -1)
            mask = geometry.mask.repeat(batch, 1, 1).unsqueeze(1)  # (B P, 1, n, n)
            attended = self.attn3(shifted.flatten(0, 1), mask=mask.to(shifted.dtype)).reshape(shape)
            hidden_states = hidden_states + self.linear_2(gate * geometry.roll(attended, 1))

        if self.attn2 is not None:
            read = self.attn2(hidden_states.flatten(1, 2), text, text_mask)  # queries as they are, not normed
            hidden_states = hidden_states + read.reshape(shape)
        modulated = modulate(self.norm(hidden_states), shift_mlp, scale_mlp)
        return hidden_states + gate_mlp * self.ff(modulated)


class Geometry:
    """Grid, windows and proxies of one forward."""

    def __init__(self, grid: Grid, window: Grid, proxy: Grid, form: Any, device: torch.device) -> None:
        self.grid, self.window, self.proxy, self.form = grid, window, proxy, form
        self.shift: Grid = tuple(side // 2 for side in window)  # type: ignore[assignment]
        self.mask = shift_mask(grid, window, self.shift).to(device) * -_BLOCKED  # (P, n, n)

    def roll(self, windows: Tensor, direction: int) -> Tensor:
        """The grid moved by half a window and cut into windows again; -1 forth, 1 back."""
        tokens = from_windows(windows, self.window, self.grid)
        by = tuple(direction * side for side in self.shift)
        return to_windows(tokens.roll(by, dims=(1, 2, 3)), self.window)


class _PositionedPatches(nn.Module):
    """Patches of each frame: (B, C, F, H, W) -> (B, f, h, w, D)."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, latent: Tensor) -> Tensor:
        patches = self.proj(latent.transpose(1, 2).flatten(0, 1))  # (B F, D, h, w)
        return patches.unflatten(0, (len(latent), -1)).permute(0, 1, 3, 4, 2)


class PTDiT(ClassConditionalModel):
    """The network.

    Args:
        in_channels: latent channels C.
        out_channels: channels of the prediction; None: C, or 2 C with `learn_sigma`, as in the released
            text-to-image model.
        hidden_size: width D, a multiple of 16 and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        patch_size: side of a patch; frames are not cut.
        input_size: height and width of the latent; other sizes run too.
        num_frames: frames, or views, by default.
        compress_ratios: sides of a window in tokens (frames, height, width); the grid must be a multiple.
        proxy_compress_ratios: of what one proxy stands for; None: the window.
        proxy: which tokens a proxy averages when it stands for less than a window, "comb" or "cell".
        caption_channels: width E of text states; None: no text attention.
        num_classes: classes for a class-conditional model; None: none.
        class_dropout_prob: how often training drops a label.
        shift_window: whether blocks have shifted windows (the paper's ablation).
        attention_bias: whether q, k and v have a bias.
        norm_eps: of all layer norms.
        learn_sigma: whether 2 C channels are predicted, where `out_channels` does not say.
        routing: options of `routing.ChannelRouting`; None: none.

    Raises:
        ValueError: for sizes that do not divide.
    """

    unit_time = False
    authors_guidance = "all"
    _no_split_modules = ["PTDiTBlock"]
    _repeated_blocks = ["PTDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "adaln_single", "y_embedder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int | None = None,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        patch_size: int = 2,
        input_size: int | tuple[int, int] = 128,
        num_frames: int = 1,
        compress_ratios: Sequence[int] = (1, 8, 8),
        proxy_compress_ratios: Sequence[int] | None = None,
        proxy: Literal["comb", "cell"] = "comb",
        caption_channels: int | None = 4096,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        shift_window: bool = True,
        attention_bias: bool = True,
        norm_eps: float = 1e-6,
        learn_sigma: bool = True,
        routing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % 16:
            raise ValueError(
                f"hidden_size={hidden_size} has no three-axis positions; choose a multiple of 16"
            )
        self.window: Grid = tuple(compress_ratios)  # type: ignore[assignment]
        self.proxy_sides: Grid = tuple(proxy_compress_ratios or compress_ratios)  # type: ignore[assignment]
        if any(w % p for w, p in zip(self.window[1:], self.proxy_sides[1:], strict=True)):
            raise ValueError(
                f"proxy_compress_ratios={self.proxy_sides} must divide compress_ratios={self.window}"
            )
        if proxy not in ("comb", "cell"):
            raise ValueError(f"proxy={proxy!r} is neither 'comb' nor 'cell'")
        self.in_channels = in_channels
        self.out_channels = out_channels or in_channels * (2 if learn_sigma else 1)
        self.latent_size = both_sides(input_size)
        # Where windows are not square, each side has its own multiple; `_check_conditions` knows.
        self.side_multiple = patch_size * (self.window[1] if self.window[1] == self.window[2] else 1)
        self.gradient_checkpointing = False
        self.pos_embed = _PositionedPatches(patch_size, in_channels, hidden_size)
        self.adaln_single = AdaLayerNormSingle(hidden_size)
        self.caption_projection = (
            PixArtAlphaTextProjection(caption_channels, hidden_size) if caption_channels else None
        )
        self.y_embedder = (
            LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes is not None else None
        )
        self.transformer_blocks = nn.ModuleList(
            PTDiTBlock(
                hidden_size, num_heads, attention_bias, norm_eps, shift_window, caption_channels is not None
            )
            for _ in range(depth)
        )
        self.channel_routing = None if routing is None else ChannelRouting(hidden_size, **routing)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * self.out_channels)

    @property
    def text_channels(self) -> int | None:
        return self.config["caption_channels"]

    def positions(self, grid: Grid) -> Tensor:
        """Sines and cosines of a grid (f, h, w): D/4 channels of the frame, then 3 D/4 of column and row,
        (1, f, h, w, D). Large pictures spread the positions of smaller ones, as in the authors' code."""
        frames, height, width = grid
        channels = self.config["hidden_size"]
        scale = max(max(self.latent_size) // 64, 1)
        spatial = sincos_table(channels * 3 // 4, height, width, scale).unflatten(1, (height, width))
        time = sincos_line(channels // 4, torch.arange(frames, dtype=torch.float64, device="cpu")).float()
        time = time[:, None, None].expand(-1, height, width, -1)
        both = torch.cat([time, spatial.expand(frames, -1, -1, -1)], dim=-1)
        return both.unsqueeze(0).to(self.pos_embed.proj.weight.device, self.pos_embed.proj.weight.dtype)

    def example_inputs(self) -> dict[str, Tensor]:
        """As other models', with 120 text tokens, the paper's number, where there is text."""
        inputs = super().example_inputs()
        inputs["hidden_states"] = (
            inputs["hidden_states"].unsqueeze(2).repeat(1, 1, self.config["num_frames"], 1, 1)
        )
        if self.y_embedder is None:
            del inputs["class_labels"]
        if self.caption_projection is not None:
            inputs["encoder_hidden_states"] = torch.zeros(1, 120, self.config["caption_channels"])
        return inputs

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latent (B, C, F, H, W) and times (B,) to windows (B, P, n, D), the blocks' vector (B, 6, D) and the
        head's (B, D)."""
        tokens = self.pos_embed(hidden_states)  # (B, f, h, w, D)
        grid: Grid = tuple(tokens.shape[1:4])  # type: ignore[assignment]
        windows = to_windows(tokens + self.positions(grid), self.window)
        vector, embedded = self.adaln_single(timestep, batch_size=len(tokens), hidden_dtype=tokens.dtype)
        if self.y_embedder is not None:
            labels = self.labels(class_labels, len(tokens))
            embedded = embedded + self.y_embedder(labels, force_drop_ids)
            vector = self.adaln_single.linear(self.adaln_single.silu(embedded))
        return windows, vector.unflatten(1, (6, -1)), embedded

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        force_drop_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The network's prediction.

        Args:
            hidden_states: noised latent, (B, C, H, W) or with frames (B, C, F, H, W).
            timestep: times, (B,) or a scalar.
            class_labels: integer labels, (B,), of a class-conditional model; None is null for all.
            force_drop_ids: 1 where the label is to be dropped, (B,).
            encoder_hidden_states: text states, (B, T, E) or (B, 1, T, E), of a model with text.
            encoder_attention_mask: 1 where a text token counts, (B, T); None: all.
            return_dict: whether to return an object with `.sample`, or a tuple.

        Returns:
            The prediction, (B, C_out, [F,] H, W).

        Raises:
            ValueError: for inputs of the wrong shape, missing or unexpected conditions.
        """
        if timestep.ndim == 0:
            timestep = timestep.expand(len(hidden_states))
        clip = hidden_states.ndim == 5
        latent = hidden_states if clip else hidden_states.unsqueeze(2)
        self._check_conditions(latent, timestep, class_labels, encoder_hidden_states)
        windows, vector, embedded = self.embed(latent, timestep, class_labels, force_drop_ids)
        text = text_mask = None
        if encoder_hidden_states is not None and self.caption_projection is not None:
            text = self.caption_projection(encoder_hidden_states.flatten(1, -2))  # (B, T, D)
            if encoder_attention_mask is not None:
                blocked = 1 - encoder_attention_mask.to(text.dtype)
                text_mask = (blocked * _BLOCKED)[:, None, None]  # (B, 1, 1, T)
        patch = self.config["patch_size"]
        grid = (latent.shape[2], latent.shape[3] // patch, latent.shape[4] // patch)
        geometry = Geometry(grid, self.window, self.proxy_sides, self.config["proxy"], windows.device)
        mask = None if self.channel_routing is None else self.channel_routing(timestep, dtype=windows.dtype)
        mask = None if mask is None else mask.unsqueeze(1)  # (B, 1, 1, D)
        for block in self.transformer_blocks:
            windows = self.run(block, windows, vector, mask, geometry, text, text_mask)
        table = self.scale_shift_table + embedded[:, None]  # (B, 2, D)
        shift, scale = table[:, :, None, None].unbind(1)
        windows = F.layer_norm(windows, windows.shape[-1:], eps=self.config["norm_eps"])
        patches = self.proj_out(modulate(windows, shift, scale))  # (B, P, n, p p C_out)
        frames = from_windows(patches, self.window, grid).flatten(0, 1).flatten(1, 2)  # (B f, h w, p p C_out)
        sample = unpatchify(frames, grid[1:], patch).unflatten(0, (len(latent), -1)).transpose(1, 2)
        sample = sample if clip else sample.squeeze(2)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_conditions(
        self, latent: Tensor, timestep: Tensor, class_labels: Tensor | None, text: Tensor | None
    ) -> None:
        if latent.ndim != 5:
            raise ValueError(
                f"hidden_states has shape {tuple(latent.squeeze(2).shape)}; expected "
                f"(B, {self.in_channels}, H, W) or (B, {self.in_channels}, F, H, W)"
            )
        self.check(latent[:, :, 0], timestep, class_labels)
        patch = self.config["patch_size"]
        sizes = (latent.shape[2], latent.shape[3] // patch, latent.shape[4] // patch)
        if any(size % side for size, side in zip(sizes, self.window, strict=True)):
            raise ValueError(
                f"a grid of {sizes} tokens can't be cut into windows of {self.window}: pad or crop, or build "
                "the model with other compress_ratios"
            )
        for name, given, place in (
            ("encoder_hidden_states", text, self.caption_projection),
            ("class_labels", class_labels, self.y_embedder),
        ):
            if given is not None and place is None:
                raise ValueError(f"{name} was given, but the model has no place for it")
        if text is None and self.caption_projection is not None:
            raise ValueError("encoder_hidden_states is missing: the model reads text")


VARIANTS: dict[str, dict[str, Any]] = {
    "s-class": {
        "depth": 10,
        "hidden_size": 288,
        "num_heads": 6,
        "input_size": 32,
        "compress_ratios": (1, 2, 2),
        "caption_channels": None,
        "num_classes": 1000,
    },
    "b": {"depth": 12, "hidden_size": 640, "num_heads": 10},
    "l": {"depth": 28, "hidden_size": 864, "num_heads": 12},
    "xl": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "h": {"depth": 30, "hidden_size": 1440, "num_heads": 20},
}


@register(
    "model",
    "pt-dit",
    summary="proxy-token and window attention for pictures, clips, views; pt-dit-{s-class,b,l,xl,h}",
    paper=Paper(
        "Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task",
        "2409.04005",
        2024,
    ),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def pt_dit(variant: str | None = None, **config: Any) -> PTDiT:
    """A fresh PT-DiT of a named variant ("xl"; None: the defaults), with changes to its config."""
    return PTDiT(**{**chosen(VARIANTS, variant), **config})


def _for_data(shape: DataShape, variant: str | None) -> dict[str, Any]:
    """Classes in place of captions."""
    return {**usual_settings(shape, variant), "caption_channels": None}


SETTINGS["pt-dit"] = _for_data


def _infer(state: State, options: Mapping[str, Any]) -> Settings:
    shapes = shapes_of(state)
    settings: Settings = {
        "depth": count(state, "transformer_blocks"),
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in state,
        "shift_window": "transformer_blocks.0.attn3.to_q.weight" in state,
        "caption_channels": shapes.get("caption_projection.linear_1.weight", (0, None))[1],
    }
    patches = shapes.get("pos_embed.proj.weight", ())
    if len(patches) == 4 and all(patches):
        settings |= {"hidden_size": patches[0], "in_channels": patches[1], "patch_size": patches[2]}
        settings["out_channels"] = shapes.get("proj_out.weight", (0,))[0] // patches[2] ** 2
        heads = {size["hidden_size"]: size["num_heads"] for size in VARIANTS.values()}
        if patches[0] in heads:
            settings["num_heads"] = heads[patches[0]]
    labels = label_rows(shapes.get("y_embedder.embedding_table.weight", (0,))[0], options)
    return settings | (labels or {"num_classes": None})


def _needs(settings: Settings) -> Iterable[tuple[str, str]]:
    yield "hidden_size", "there is no pos_embed.proj.weight of four dimensions"
    yield (
        "num_heads",
        f"a width of {settings.get('hidden_size')} is no named size's: give config={{'num_heads': N}}",
    )


def _rename(state: State) -> dict[str, Tensor]:
    """Positions are computed, whatever the size."""
    return {name: value for name, value in state.items() if name != "pos_embed.pos_embed"}


TEXT_SETTINGS["pt-dit"] = lambda width: {"caption_channels": width, "num_classes": None}
LAYOUTS["pt-dit"] = Layout(infer=_infer, needs=_needs, variants=VARIANTS, rename=_rename, null_class=False)
