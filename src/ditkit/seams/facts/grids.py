"""Grids (F, H, W) in tokens, read from the arguments of a model's forward; and why a call has none.

B batch, L image tokens, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ditkit.seams.anatomy import Arguments
from ditkit.seams.errors import SeamError

Grid = tuple[int, int, int]


def packed_grid(model: nn.Module, arguments: Arguments) -> Grid:
    """Flux: positions of the image tokens, img_ids (L, 3) = frame, row, column."""
    ids = arguments["img_ids"]
    return positions(ids[0] if ids.ndim == 3 else ids)


def positions(ids: Tensor) -> Grid:
    """(L, 3) or more columns: frame, row and column of each image token."""
    size = (ids.amax(0) - ids.amin(0) + 1).tolist()
    return int(size[0]), int(size[1]), int(size[2])


def listed_grid(model: nn.Module, arguments: Arguments) -> Grid:
    """QwenImage: img_shapes, one list of (F, H, W) for each sample."""
    shapes = arguments["img_shapes"]
    first = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
    if len(first) != 1:
        raise SeamError(f"img_shapes lists {len(first)} pictures in one sequence; a single grid is needed")
    frames, height, width = first[0]
    return int(frames), int(height), int(width)


def named_grid(model: nn.Module, arguments: Arguments) -> Grid:
    """LTX: num_frames, height and width of the latent, patch 1 in all released models."""
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise SeamError("LTX was called with video_coords but without num_frames, height and width: no grid")
    patch = int(model.config.patch_size)  # type: ignore[union-attr]
    patch_t = int(model.config.patch_size_t)  # type: ignore[union-attr]
    frames, height, width = (int(size) for size in sizes if size is not None)
    return frames // patch_t, height // patch, width // patch


def patched_2d(model: nn.Module, arguments: Arguments) -> Grid:
    """(B, C, H, W) cut into square patches."""
    height, width = arguments["hidden_states"].shape[-2:]
    patch = int(model.config.patch_size)  # type: ignore[union-attr]
    return 1, height // patch, width // patch


def patched_3d(model: nn.Module, arguments: Arguments) -> Grid:
    """(B, C, F, H, W) with a patch for each axis (Wan), or patch_size and perhaps patch_size_t."""
    frames, height, width = arguments["hidden_states"].shape[-3:]
    patch = _patches(model)
    return frames // patch[0], height // patch[1], width // patch[2]


def frames_first(model: nn.Module, arguments: Arguments) -> Grid:
    """(B, F, C, H, W): CogVideoX, AnyFlow."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch = _patches(model)
    return frames // patch[0], height // patch[1], width // patch[2]


def channels_last(model: nn.Module, arguments: Arguments) -> Grid:
    """(B, F, H, W, C): Kandinsky."""
    _, frames, height, width, _ = arguments["hidden_states"].shape
    patch = _patches(model)
    return frames // patch[0], height // patch[1], width // patch[2]


def _patches(model: nn.Module) -> tuple[int, int, int]:
    config: Any = model.config
    patch = config.patch_size
    if isinstance(patch, int):
        # None before CogVideoX 1.5; other classes have no patch over time at all.
        return getattr(config, "patch_size_t", None) or 1, patch, patch
    return tuple(patch)  # type: ignore[return-value]


def patched_nd(model: nn.Module, arguments: Arguments) -> Grid:
    """HunyuanImage: (B, C, H, W) or (B, C, F, H, W) and a patch for each axis."""
    sizes = arguments["hidden_states"].shape[2:]
    patches: Any = model.config.patch_size  # type: ignore[union-attr]
    tokens = [int(size) // patch for size, patch in zip(sizes, patches, strict=True)]
    return tokens[0] if len(tokens) == 3 else 1, tokens[-2], tokens[-1]


def own_grid(model: nn.Module, arguments: Arguments) -> Grid:
    """Our DiT: (B, C, H, W); its patch embedding knows the grid."""
    height, width = arguments["hidden_states"].shape[-2:]
    embedder: Any = model.x_embedder
    rows, columns = embedder.grid(height, width)
    return 1, rows, columns


def controlled(model: nn.Module, arguments: Arguments) -> str | None:
    """ControlNet residuals are added between blocks with a row for every token."""
    for name, value in arguments.items():
        if name.startswith(("controlnet_", "block_controlnet_")) and isinstance(value, (list, tuple, Tensor)):
            return f"{name} adds a residual for every token between the blocks"
    return None


def replaced_frame(model: nn.Module, arguments: Arguments) -> str | None:
    if getattr(model.config, "image_condition_type", None) == "token_replace":
        return "token_replace modulates the tokens of the first frame by their position in the sequence"
    return None
