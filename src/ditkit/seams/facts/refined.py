"""Classes with one stream behind refiners: of the image alone and of the text alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit
from ditkit.seams.errors import SeamError
from ditkit.seams.facts.grids import Grid, patched_2d
from ditkit.seams.facts.rows import table


def _same(lengths: list[int]) -> int:
    """The text's length, where each sample of a batch keeps its own text only."""
    if len(set(lengths)) != 1:
        raise SeamError(
            f"the prompts of this batch have {sorted(set(lengths))} tokens, so that image "
            "tokens stand at another place in each sample; run prompts of one length, or one at a time"
        )
    return lengths[0]


def _lumina2_text(anatomy: Anatomy, model: nn.Module, arguments: Arguments) -> int:
    return _same([int(valid) for valid in arguments["encoder_attention_mask"].sum(1).tolist()])


_LUMINA2_BLOCKS = Stack(
    path="noise_refiner",
    arguments=("hidden_states", "attention_mask", "image_rotary_emb", "temb"),
    units=(Unit("attn", bypass=("norm1.norm",)), Unit("feed_forward", bypass=("ffn_norm1",))),
    attention=(Attention("attn", "self"),),
    # What follows counts on as many tokens as the picture has.
    whole=True,
)

_LUMINA2 = Anatomy(
    name="Lumina2Transformer2DModel",
    text="prefix",
    grid=patched_2d,
    text_tokens=_lumina2_text,
    falling_time=False,
    stacks=(
        _LUMINA2_BLOCKS,
        dataclasses.replace(
            _LUMINA2_BLOCKS,
            path="layers",
            attention=(Attention("attn", "joint"),),
            joint=True,
            whole=False,
            token_rows={"image_rotary_emb": table(1, "prefix"), "attention_mask": table(-1, "prefix")},
        ),
    ),
)

# Z-Image pads text and image to a multiple of 32 tokens each.
_MULTIPLE = 32


_LISTED = "it takes and gives lists of pictures, not tensors"


def _z_grid(model: nn.Module, arguments: Arguments) -> Grid:
    sample = arguments["x"]
    if isinstance(sample[0], list):
        raise SeamError("x has several pictures for a sample; one grid is needed")
    patch, patch_t = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    frames, height, width = (int(size) for size in sample[0].shape[-3:])
    grid = frames // patch_t, height // patch, width // patch
    if any(one.shape != sample[0].shape for one in sample) or grid[0] * grid[1] * grid[2] % _MULTIPLE:
        raise SeamError(
            f"a picture of {grid[1]} x {grid[2]} tokens is padded to a multiple of {_MULTIPLE}, or pictures "
            "differ within a batch; a method that needs the grid takes equal ones of such a multiple"
        )
    return grid


def _z_text(anatomy: Anatomy, model: nn.Module, arguments: Arguments) -> int:
    if isinstance(arguments["x"][0], list):
        raise SeamError("captions and pictures take turns in one sequence")
    return _same([-(-len(words) // _MULTIPLE) * _MULTIPLE for words in arguments["cap_feats"]])


def _z_tokens(model: nn.Module, arguments: Arguments) -> str | None:
    if arguments.get("controlnet_block_samples") is not None:
        return "controlnet_block_samples adds a residual for every token between the blocks"
    try:
        if arguments:
            _z_grid(model, arguments)
    except SeamError as reason:
        return str(reason)
    return None


_Z_BLOCKS = Stack(
    path="noise_refiner",
    arguments=("x", "attn_mask", "freqs_cis", "adaln_input", "noise_mask"),
    units=(Unit("attention", bypass=("attention_norm1",)), Unit("feed_forward", bypass=("ffn_norm1",))),
    attention=(Attention("attention", "self"),),
    whole=True,
    # Reference pictures are modulated apart.
    per_token={"noise_mask": lambda mask: mask is not None},
)

_Z_IMAGE = Anatomy(
    name="ZImageTransformer2DModel",
    text="suffix",
    grid=_z_grid,
    sample="x",
    encoder=(),
    text_tokens=_z_text,
    timestep="t",
    falling_time=False,
    unfit={"answer": _LISTED, "output": _LISTED},
    no_tokens=_z_tokens,
    stacks=(
        _Z_BLOCKS,
        dataclasses.replace(
            _Z_BLOCKS,
            path="layers",
            attention=(Attention("attention", "joint"),),
            joint=True,
            whole=False,
            token_rows={
                "attn_mask": table(-1, "suffix"),
                "freqs_cis": table(1, "suffix"),
                "noise_mask": table(1, "suffix"),
            },
        ),
    ),
)


def _fibo2_text(anatomy: Anatomy, model: nn.Module, arguments: Arguments) -> int:
    """Tokens of the gist that stands for the text; more for longer prompts."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    config: Any = model.config
    states, mask = arguments["encoder_hidden_states"], arguments.get("encoder_attention_mask")
    lengths = [states.shape[2]] if mask is None else [int(valid) for valid in mask.sum(1).tolist()]
    counts = compute_gist_count(
        lengths,
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )
    return _same(counts)


_CONTEXT = "context_latents stand behind the picture in its sequence"


def _fibo2_grid(model: nn.Module, arguments: Arguments) -> Grid:
    if arguments.get("context_latents"):
        raise SeamError(f"{_CONTEXT}; one grid is needed")
    return patched_2d(model, arguments)


_FIBO2_BLOCKS = dataclasses.replace(
    _Z_BLOCKS,
    arguments=(*_Z_BLOCKS.arguments[:3], "adaln_input", "noise_mask"),
    units=(*_Z_BLOCKS.units, Unit("cross_attention", bypass=("cross_attn_norm1",))),
    attention=(Attention("attention", "self"), Attention("cross_attention", "cross")),
)

_FIBO2 = Anatomy(
    name="BriaFibo2Transformer2DModel",
    text="prefix",
    grid=_fibo2_grid,
    text_tokens=_fibo2_text,
    no_tokens=lambda model, arguments: _CONTEXT if arguments.get("context_latents") else None,
    stacks=(
        _FIBO2_BLOCKS,
        dataclasses.replace(
            _FIBO2_BLOCKS,
            path="layers",
            attention=(Attention("attention", "joint"), Attention("cross_attention", "cross")),
            joint=True,
            whole=False,
            token_rows={
                "attn_mask": table(-1, "prefix"),
                "freqs_cis": table(1, "prefix"),
                "noise_mask": table(1, "prefix"),
            },
        ),
    ),
)


ANATOMIES = (_LUMINA2, _Z_IMAGE, _FIBO2)
