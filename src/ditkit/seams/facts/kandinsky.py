"""Kandinsky 5 and 6: self-attention, cross-attention, feed-forward; channels last."""

from __future__ import annotations

from torch import nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit
from ditkit.seams.errors import SeamError
from ditkit.seams.facts.grids import Grid, channels_last
from ditkit.seams.facts.rows import table

_SPARSE = "sparse_params reorders the tokens into 8 x 8 tiles for the model's own sparse attention"


def _sparse(model: nn.Module, arguments: Arguments) -> str | None:
    return _SPARSE if arguments.get("sparse_params") is not None else None


def _dense_grid(model: nn.Module, arguments: Arguments) -> Grid:
    if _sparse(model, arguments) is not None:
        raise SeamError(f"{_SPARSE}; a method that needs the grid takes the model without them")
    return channels_last(model, arguments)


_KANDINSKY5 = Anatomy(
    name="Kandinsky5Transformer3DModel",
    text="cross",
    grid=_dense_grid,
    unfit={"output": "its output has the channels last"},
    no_tokens=_sparse,
    stacks=(
        # `text_transformer_blocks` see text only.
        Stack(
            path="visual_transformer_blocks",
            arguments=("visual_embed", "text_embed", "time_embed", "rope", "sparse_params"),
            units=(
                Unit("self_attention", bypass=("self_attention_norm",)),
                Unit("cross_attention", bypass=("cross_attention_norm",)),
                Unit("feed_forward", bypass=("feed_forward_norm",)),
            ),
            attention=(Attention("self_attention", "self"), Attention("cross_attention", "cross")),
            token_rows={"rope": table(1)},
        ),
    ),
)

_TWO_STREAMS = "a stream of sound runs through the same blocks and reads all tokens of the video"
_VIDEO, _SOUND = "video_dec_block", "audio_dec_block"
_KANDINSKY6 = Anatomy(
    name="Kandinsky6Transformer3DModel",
    text="cross",
    grid=channels_last,
    unfit={
        "stack": _TWO_STREAMS,
        "tokens": _TWO_STREAMS,
        "answer": _TWO_STREAMS,
        "output": _TWO_STREAMS,
    },
    stacks=(
        Stack(
            path="visual_transformer_blocks",
            arguments=("vis", "aud", "text_v", "text_a", "time_embed", "vis_rope", "aud_rope", "attn_mask"),
            # What text's cross-attention reads, the other stream's reads too.
            units=(
                Unit(f"{_VIDEO}.self_attention", bypass=(f"{_VIDEO}.self_attention_norm",)),
                Unit(f"{_VIDEO}.cross_attention", bypass=(f"{_VIDEO}.cross_attention_norm",)),
                Unit(f"{_SOUND}.self_attention", bypass=(f"{_SOUND}.self_attention_norm",)),
                Unit(f"{_SOUND}.cross_attention", bypass=(f"{_SOUND}.cross_attention_norm",)),
                Unit("va_cross_attention", bypass=("va_normalization", f"{_SOUND}.cross_attention_norm")),
                Unit("av_cross_attention", bypass=("av_normalization", f"{_VIDEO}.cross_attention_norm")),
                Unit(f"{_VIDEO}.feed_forward", bypass=(f"{_VIDEO}.feed_forward_norm",)),
                Unit(f"{_SOUND}.feed_forward", bypass=(f"{_SOUND}.feed_forward_norm",)),
            ),
            attention=(
                Attention(f"{_VIDEO}.self_attention", "self"),
                Attention(f"{_VIDEO}.cross_attention", "cross"),
                Attention(f"{_SOUND}.cross_attention", "cross"),
                Attention("va_cross_attention", "cross"),
                Attention("av_cross_attention", "cross"),
            ),
            returns=("hidden_states", "aud"),
        ),
    ),
)

ANATOMIES = (_KANDINSKY5, _KANDINSKY6)
