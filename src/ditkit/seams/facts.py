"""The facts on each transformer class, read from diffusers 0.42 and checked by tests on tiny instances.

B batch, L image tokens, T text tokens, C width, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ditkit.seams.anatomy import Anatomy, Arguments, Attention, Stack, Unit
from ditkit.seams.errors import SeamError

Grid = tuple[int, int, int]


# Rows of block arguments that belong to image tokens.


def _pair(dim: int, *, prefix: bool = False) -> Any:
    """Rotary (cos, sin) with a row for each image token along `dim`; with `prefix` after the text's rows."""

    def rows(tables: Any, indices: Tensor, text: int) -> Any:
        if tables is None:
            return None
        offset = text if prefix else 0
        wanted = torch.cat([torch.arange(offset, device=indices.device), indices + offset])
        return tuple(table.index_select(dim, wanted.to(table.device)) for table in tables)

    return rows


def _first_of_pair(tables: Any, indices: Tensor, text: int) -> Any:
    """QwenImage: (image frequencies (L, D/2), text frequencies): only the first has image rows."""
    return tables[0].index_select(0, indices.to(tables[0].device)), tables[1]


def _suffix_mask(mask: Any, indices: Tensor, text: int) -> Any:
    """(B, 1, 1, L + T): columns of the selected image tokens, then all text columns."""
    if mask is None:
        return None
    image = mask.shape[-1] - text
    tail = torch.arange(image, image + text, device=indices.device)
    return mask.index_select(-1, torch.cat([indices, tail]).to(mask.device))


def _modulation(dim: int, ndim: int) -> Any:
    """Modulation with a row for each token along `dim`; left alone when it has one row for all."""

    def rows(value: Any, indices: Tensor, text: int) -> Any:
        if value is None or value.ndim != ndim or value.shape[dim] == 1:
            return value
        return value.index_select(dim, indices.to(value.device))

    return rows


# Grids, in tokens.


def _packed_grid(model: nn.Module, arguments: Arguments) -> Grid:
    """Flux: positions of the image tokens, img_ids (L, 3) = frame, row, column."""
    ids = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    size = (ids.amax(0) - ids.amin(0) + 1).tolist()
    return int(size[0]), int(size[1]), int(size[2])


def _listed_grid(model: nn.Module, arguments: Arguments) -> Grid:
    """QwenImage: img_shapes, one list of (F, H, W) for each sample."""
    shapes = arguments["img_shapes"]
    first = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
    if len(first) != 1:
        raise SeamError(f"img_shapes lists {len(first)} pictures in one sequence; a single grid is needed")
    frames, height, width = first[0]
    return int(frames), int(height), int(width)


def _named_grid(model: nn.Module, arguments: Arguments) -> Grid:
    """LTX: num_frames, height and width of the latent, patch 1 in all released models."""
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise SeamError("LTX was called with video_coords but without num_frames, height and width: no grid")
    patch = int(model.config.patch_size)  # type: ignore[union-attr]
    patch_t = int(model.config.patch_size_t)  # type: ignore[union-attr]
    frames, height, width = (int(size) for size in sizes if size is not None)
    return frames // patch_t, height // patch, width // patch


def _patched_2d(model: nn.Module, arguments: Arguments) -> Grid:
    """(B, C, H, W) cut into square patches."""
    height, width = arguments["hidden_states"].shape[-2:]
    patch = int(model.config.patch_size)  # type: ignore[union-attr]
    return 1, height // patch, width // patch


def _patched_3d(model: nn.Module, arguments: Arguments) -> Grid:
    """Wan: (B, C, F, H, W) and a patch for each axis; HunyuanVideo: patch_size_t, patch_size."""
    config: Any = model.config
    frames, height, width = arguments["hidden_states"].shape[-3:]
    patch = config.patch_size
    if isinstance(patch, int):
        patch = (config.patch_size_t or 1, patch, patch)
    return frames // patch[0], height // patch[1], width // patch[2]


def _frames_first(model: nn.Module, arguments: Arguments) -> Grid:
    """CogVideoX: (B, F, C, H, W); patch_size_t is None before version 1.5."""
    config: Any = model.config
    _, frames, _, height, width = arguments["hidden_states"].shape
    return frames // (config.patch_size_t or 1), height // config.patch_size, width // config.patch_size


def _own_grid(model: nn.Module, arguments: Arguments) -> Grid:
    """Our DiT: (B, C, H, W); its patch embedding knows the grid."""
    height, width = arguments["hidden_states"].shape[-2:]
    embedder: Any = model.x_embedder
    rows, columns = embedder.grid(height, width)
    return 1, rows, columns


def _controlled(model: nn.Module, arguments: Arguments) -> str | None:
    """ControlNet residuals are added between blocks with a row for every token."""
    for name, value in arguments.items():
        if name.startswith(("controlnet_", "block_controlnet_")) and isinstance(value, (list, tuple, Tensor)):
            return f"{name} adds a residual for every token between the blocks"
    return None


def _replaced_frame(model: nn.Module, arguments: Arguments) -> str | None:
    if getattr(model.config, "image_condition_type", None) == "token_replace":
        return "token_replace modulates the tokens of the first frame by their position in the sequence"
    return None


_JOINT = ("encoder_hidden_states", "hidden_states")
_ADA = ("norm1.norm", "norm1_context.norm")
_SINGLE = Unit("proj_out", bypass=("norm.norm", "proj_mlp", "act_mlp", "attn"))

_FLUX = Anatomy(
    name="FluxTransformer2DModel",
    text="prefix",
    grid=_packed_grid,
    packed=2,
    no_tokens=_controlled,
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(
                Unit("attn", bypass=_ADA),
                Unit("ff", bypass=("norm2",)),
                Unit("ff_context", bypass=("norm2_context",)),
            ),
            attention=(Attention("attn", "joint"),),
            returns=_JOINT,
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            token_rows={"image_rotary_emb": _pair(0, prefix=True)},
            per_token={},
        ),
        Stack(
            path="single_transformer_blocks",
            units=(_SINGLE,),
            attention=(Attention("attn", "joint"),),
            returns=_JOINT,
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            token_rows={"image_rotary_emb": _pair(0, prefix=True)},
            per_token={},
        ),
    ),
)

_SD3 = Anatomy(
    name="SD3Transformer2DModel",
    text="suffix",
    grid=_patched_2d,
    no_tokens=_controlled,
    stacks=(
        Stack(
            path="transformer_blocks",
            # The dual-attention blocks of SD 3.5 medium norm once for attn and attn2; the last block has no
            # feed-forward for text.
            units=(
                Unit("attn", bypass=_ADA),
                Unit("attn2", bypass=("norm1.norm",)),
                Unit("ff", bypass=("norm2",)),
                Unit("ff_context", bypass=("norm2_context",)),
            ),
            attention=(Attention("attn", "joint"), Attention("attn2", "self")),
            returns=_JOINT,
            arguments=("hidden_states", "encoder_hidden_states", "temb"),
            token_rows={},
            per_token={},
        ),
    ),
)

_PIXART = Anatomy(
    name="PixArtTransformer2DModel",
    text="cross",
    grid=_patched_2d,
    text_mask=("encoder_attention_mask",),
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(Unit("attn1", bypass=("norm1",)), Unit("attn2"), Unit("ff", bypass=("norm2",))),
            attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
            returns=("hidden_states",),
            arguments=("hidden_states", "attention_mask", "encoder_hidden_states"),
            token_rows={},
            per_token={},
        ),
    ),
)

_DIT = Anatomy(
    name="DiTTransformer2DModel",
    text="none",
    grid=_patched_2d,
    encoder=(),
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(Unit("attn1", bypass=("norm1.norm",)), Unit("ff", bypass=("norm3",))),
            attention=(Attention("attn1", "self"),),
            returns=("hidden_states",),
            arguments=("hidden_states",),
            token_rows={},
            per_token={},
        ),
    ),
)

_WAN = Anatomy(
    name="WanTransformer3DModel",
    text="cross",
    grid=_patched_3d,
    encoder=("encoder_hidden_states_image", "encoder_hidden_states"),
    stacks=(
        Stack(
            path="blocks",
            units=(
                Unit("attn1", bypass=("norm1",)),
                Unit("attn2", bypass=("norm2",)),
                Unit("ffn", bypass=("norm3",)),
            ),
            attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
            returns=("hidden_states",),
            arguments=("hidden_states", "encoder_hidden_states", "temb", "rotary_emb"),
            token_rows={"rotary_emb": _pair(1), "temb": _modulation(1, ndim=4)},
            # Wan 2.2 TI2V gives every token its own timestep.
            per_token={"temb": lambda temb: temb.ndim == 4},
        ),
    ),
)

_HUNYUAN_VIDEO = Anatomy(
    name="HunyuanVideoTransformer3DModel",
    text="suffix",
    grid=_patched_3d,
    text_mask=("encoder_attention_mask",),
    no_tokens=_replaced_frame,
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(
                Unit("attn", bypass=_ADA),
                Unit("ff", bypass=("norm2",)),
                Unit("ff_context", bypass=("norm2_context",)),
            ),
            attention=(Attention("attn", "joint"),),
            returns=("hidden_states", "encoder_hidden_states"),
            arguments=("hidden_states", "encoder_hidden_states", "temb", "attention_mask", "freqs_cis"),
            token_rows={"attention_mask": _suffix_mask, "freqs_cis": _pair(0)},
            per_token={},
        ),
        Stack(
            path="single_transformer_blocks",
            units=(_SINGLE,),
            attention=(Attention("attn", "joint"),),
            returns=("hidden_states", "encoder_hidden_states"),
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "temb",
                "attention_mask",
                "image_rotary_emb",
            ),
            token_rows={"attention_mask": _suffix_mask, "image_rotary_emb": _pair(0)},
            per_token={},
        ),
    ),
)

_COGVIDEOX = Anatomy(
    name="CogVideoXTransformer3DModel",
    text="prefix",
    grid=_frames_first,
    channels=2,
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(Unit("attn1", bypass=("norm1.norm",)), Unit("ff", bypass=("norm2.norm",))),
            attention=(Attention("attn1", "joint"),),
            returns=("hidden_states", "encoder_hidden_states"),
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            token_rows={"image_rotary_emb": _pair(0)},
            per_token={},
        ),
    ),
)

_LTX = Anatomy(
    name="LTXVideoTransformer3DModel",
    text="cross",
    grid=_named_grid,
    text_mask=("encoder_attention_mask",),
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(Unit("attn1", bypass=("norm1",)), Unit("attn2"), Unit("ff", bypass=("norm2",))),
            attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
            returns=("hidden_states",),
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            token_rows={"image_rotary_emb": _pair(1), "temb": _modulation(1, ndim=3)},
            per_token={"temb": lambda temb: temb.shape[1] > 1},
        ),
    ),
)

_QWEN = Anatomy(
    name="QwenImageTransformer2DModel",
    text="prefix",
    grid=_listed_grid,
    packed=2,
    text_mask=("encoder_hidden_states_mask",),
    no_tokens=_controlled,
    stacks=(
        Stack(
            path="transformer_blocks",
            units=(
                Unit("attn", bypass=("img_norm1", "txt_norm1")),
                Unit("img_mlp", bypass=("img_norm2",)),
                Unit("txt_mlp", bypass=("txt_norm2",)),
            ),
            attention=(Attention("attn", "joint"),),
            returns=_JOINT,
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "encoder_hidden_states_mask",
                "temb",
                "image_rotary_emb",
                "joint_attention_kwargs",
                "modulate_index",
            ),
            token_rows={"image_rotary_emb": _first_of_pair, "modulate_index": _modulation(1, ndim=2)},
            # QwenImage-Edit 2511 modulates reference tokens apart.
            per_token={"modulate_index": lambda index: index is not None},
        ),
    ),
)

_HUNYUAN_DIT = Anatomy(
    name="HunyuanDiT2DModel",
    text="cross",
    grid=_patched_2d,
    encoder=("encoder_hidden_states", "encoder_hidden_states_t5"),
    text_mask=("text_embedding_mask", "text_embedding_mask_t5"),
    no_tokens=_controlled,
    stacks=(
        Stack(
            path="blocks",
            # The long skips (skip_norm, skip_linear) run at every step: they stand outside the units.
            units=(
                Unit("attn1", bypass=("norm1",)),
                Unit("attn2", bypass=("norm2",)),
                Unit("ff", bypass=("norm3",)),
            ),
            attention=(Attention("attn1", "self"), Attention("attn2", "cross")),
            returns=("hidden_states",),
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            token_rows={"image_rotary_emb": _pair(0)},
            per_token={},
        ),
    ),
)

_OWN_DIT = Anatomy(
    name="DiT",
    text="none",
    grid=_own_grid,
    encoder=(),
    # The same network runs DiT's times, which fall, and SiT's, which rise.
    falling_time=False,
    stacks=(
        Stack(
            path="blocks",
            units=(Unit("attn", bypass=("norm1",)), Unit("mlp", bypass=("norm2",))),
            attention=(Attention("attn", "self"),),
            returns=("hidden_states",),
            arguments=("hidden_states", "conditioning"),
            token_rows={"conditioning": _modulation(1, ndim=3)},
            per_token={"conditioning": lambda conditioning: conditioning.shape[1] > 1},
        ),
    ),
)

FACTS: dict[str, Anatomy] = {
    anatomy.name: anatomy
    for anatomy in (
        _FLUX,
        _SD3,
        _PIXART,
        _DIT,
        _WAN,
        _HUNYUAN_VIDEO,
        _COGVIDEOX,
        _LTX,
        _QWEN,
        _HUNYUAN_DIT,
        _OWN_DIT,
    )
}
