"""Classes with one stream: text and image are one sequence from the start."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit
from ditkit.seams.errors import SeamError
from ditkit.seams.facts.grids import Grid, patched_2d, positions
from ditkit.seams.facts.rows import pair, square, table


def _omnigen_text(anatomy: Anatomy, model: nn.Module, arguments: Arguments) -> int:
    """The condition's tokens and one for the time."""
    words = arguments.get("input_ids")
    return 1 if words is None else int(words.shape[1]) + 1


_OMNIGEN = Anatomy(
    name="OmniGenTransformer2DModel",
    text="prefix",
    grid=patched_2d,
    encoder=(),
    text_tokens=_omnigen_text,
    falling_time=False,
    stacks=(
        Stack(
            path="layers",
            arguments=("hidden_states", "attention_mask", "image_rotary_emb"),
            units=(
                Unit("self_attn", bypass=("input_layernorm",)),
                Unit("mlp", bypass=("post_attention_layernorm",)),
            ),
            attention=(Attention("self_attn", "joint"),),
            joint=True,
            token_rows={"attention_mask": square("prefix"), "image_rotary_emb": pair(0, "prefix")},
        ),
    ),
)


def _sequence_first(model: nn.Module, sequence: Tensor, grid: Grid) -> Tensor:
    """(S, B, C), the picture before the text, to image tokens (B, L, C)."""
    return sequence[: math.prod(grid)].transpose(0, 1)


_ERNIE = Anatomy(
    name="ErnieImageTransformer2DModel",
    text="suffix",
    grid=patched_2d,
    encoder=("text_bth",),
    unfit={"tokens": "its sequence is the first dimension, (S, B, C), which no tokens are taken from"},
    stacks=(
        Stack(
            path="layers",
            arguments=("x", "rotary_pos_emb", "temb", "attention_mask"),
            # Norms run at every step: without tokens their modulation (S, B, C) would not match.
            units=(Unit("self_attention"), Unit("mlp")),
            attention=(Attention("self_attention", "joint"),),
            raster=_sequence_first,
        ),
    ),
)


def _krea_grid(model: nn.Module, arguments: Arguments) -> Grid:
    """position_ids (T + L, 3): the text's, then frame, row and column of each image token."""
    return positions(arguments["position_ids"][arguments["encoder_hidden_states"].shape[1] :])


_KREA2 = Anatomy(
    name="Krea2Transformer2DModel",
    text="prefix",
    grid=_krea_grid,
    text_mask=("encoder_attention_mask",),
    stacks=(
        Stack(
            path="transformer_blocks",
            arguments=("hidden_states", "temb", "image_rotary_emb", "attention_mask"),
            units=(Unit("attn", bypass=("norm1",)), Unit("ff", bypass=("norm2",))),
            attention=(Attention("attn", "joint"),),
            joint=True,
            token_rows={"image_rotary_emb": pair(0, "prefix"), "attention_mask": table(-1, "prefix")},
        ),
    ),
)

_IDEOGRAM_IMAGE = 2


def _ideogram_text(anatomy: Anatomy, model: nn.Module, arguments: Arguments) -> int:
    """Tokens before the picture: padding and text."""
    image: Tensor = arguments["indicator"] == _IDEOGRAM_IMAGE
    length = int(image[0].sum())
    text = image.shape[1] - length
    if not bool(image[:, text:].all()) or bool(image[:, :text].any()):
        raise SeamError("the indicator does not put the image tokens at the end of each sequence")
    return text


def _ideogram_grid(model: nn.Module, arguments: Arguments) -> Grid:
    text = _ideogram_text(_IDEOGRAM4, model, arguments)
    return positions(arguments["position_ids"][0, text:])


_IDEOGRAM4 = Anatomy(
    name="Ideogram4Transformer2DModel",
    text="prefix",
    grid=_ideogram_grid,
    text_tokens=_ideogram_text,
    unfit={"output": "its output has rows for the text, too"},
    falling_time=False,
    stacks=(
        Stack(
            path="layers",
            arguments=("hidden_states", "attention_mask", "image_rotary_emb", "adaln_input"),
            units=(
                Unit("attention", bypass=("attention_norm1",)),
                Unit("feed_forward", bypass=("ffn_norm1",)),
            ),
            attention=(Attention("attention", "joint"),),
            joint=True,
            token_rows={"attention_mask": square("prefix"), "image_rotary_emb": pair(1, "prefix")},
            per_token={"adaln_input": lambda adaln: adaln.shape[1] > 1},
        ),
    ),
)

_KEYS_ONLY = "the text has keys but no queries in the image's attention, so that it is not square"
_PRX = Anatomy(
    name="PRXTransformer2DModel",
    text="cross",
    grid=patched_2d,
    unfit={"attention": _KEYS_ONLY},
    stacks=(
        Stack(
            path="blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            units=(
                Unit("attention", bypass=("img_pre_norm",)),
                Unit("down_proj", bypass=("post_attention_layernorm", "gate_proj", "mlp_act", "up_proj")),
            ),
            attention=(Attention("attention", "joint"),),
            token_rows={"image_rotary_emb": table(2)},
        ),
    ),
)

ANATOMIES = (_OMNIGEN, _ERNIE, _KREA2, _IDEOGRAM4, _PRX)
