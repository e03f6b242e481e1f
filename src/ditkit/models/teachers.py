"""Frozen vision transformers as teachers: their patch tokens and attention maps of clean pictures.

Whatever class of transformers the folder or repository names: those that give `last_hidden_state` of a class
token, registers or nothing before the patches (ViT, DINOv2, SigLIP, MAE, CLIP). Layers are counted from 1.

Dimensions: B pictures of H x W pixels, R and S rows and columns of patches, T = R S, D width, h heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig
from transformers.image_processing_utils import BaseImageProcessor

Grid = tuple[int, int]


@dataclass
class Seen:
    """What a teacher sees in pictures.

    Attributes:
        tokens: of the patches, after the last layer and its norm where the class has one there, (B, T, D).
        grid: (R, S).
        attention: layer -> how much each patch attends to each patch, without the class token: rows sum to
            1, (B, h, T, T).
        hidden: layer -> tokens of the patches behind it, (B, T, D).
    """

    tokens: Tensor
    grid: Grid
    attention: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)


class Teacher(nn.Module):
    """A frozen vision transformer, always in eval mode.

    Args:
        network: of transformers; of one with a text half, the half that sees.
        mean, std: of the pixels in [0, 1] that it was trained with, three each.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network: Any = getattr(network, "vision_model", network)
        config = self.network.config
        if not hasattr(config, "patch_size"):
            raise ValueError(f"{type(network).__name__} is no vision transformer: it has no patch_size")
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0  # a masked autoencoder sees the whole picture
        self.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self._takes = set(inspect.signature(type(self.network).forward).parameters)

    def train(self, mode: bool = True) -> Teacher:
        """It stays as it is used."""
        return super().train(False)

    @property
    def patch(self) -> Grid:
        """Height and width of a patch in pixels."""
        size = self.network.config.patch_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def width(self) -> int:
        """D."""
        return self.network.config.hidden_size

    @property
    def layers(self) -> int:
        """How many layers with attention it has."""
        return self.network.config.num_hidden_layers

    @torch.no_grad()
    def forward(self, pictures: Tensor, grid: Grid, layers: Sequence[int] = ()) -> Seen:
        """What it sees in pictures (B, 3, H, W) in [-1, 1], scaled so that it has a patch for each cell.

        Args:
            grid: (R, S).
            layers: whose attention is wanted.
        """
        return self.look(pictures, grid, layers)

    def look(
        self, pictures: Tensor, grid: Grid, layers: Sequence[int] = (), hidden: Sequence[int] = ()
    ) -> Seen:
        """The same with gradients that reach the pictures, and the tokens behind the layers `hidden`."""
        rows, columns = grid
        pixels = ((pictures + 1) / 2 - self.mean) / self.std
        size = (rows * self.patch[0], columns * self.patch[1])
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic")
        options: dict[str, Any] = {}
        if "interpolate_pos_encoding" in self._takes:
            options["interpolate_pos_encoding"] = True
        if "noise" in self._takes:  # a masked autoencoder orders its patches by it
            options["noise"] = torch.arange(rows * columns, device=pixels.device).expand(len(pixels), -1)
        if hidden:
            options["output_hidden_states"] = True
        given = self.network(pixel_values=pixels, output_attentions=bool(layers), **options)
        before = given.last_hidden_state.shape[1] - rows * columns  # class token and registers
        tokens = given.last_hidden_state[:, before:].float()
        attention = {n: among_patches(given.attentions[n - 1], before) for n in layers}
        return Seen(tokens, grid, attention, {n: given.hidden_states[n][:, before:].float() for n in hidden})

    def drop_last_scale(self) -> bool:
        """Take scale and bias from the norm behind the last layer; whether its tokens pass through one."""
        kind = self.network.config.model_type
        norm = getattr(self.network, "layernorm", None)
        if norm is None and not kind.startswith("clip"):  # CLIP norms the class token alone
            norm = getattr(self.network, "post_layernorm", None)
        if norm is None:
            return False
        norm.weight = norm.bias = None
        return True


def among_patches(attention: Tensor, before: int) -> Tensor:
    """Attention (B, h, L, L) without the first tokens, as a softmax over the patches alone gives it."""
    inner = attention[..., before:, before:].float()
    return inner / inner.sum(-1, keepdim=True)


def resize(tokens: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Tokens (B, R S, D) of one grid bilinearly on another, (B, R' S', D)."""
    if grid == to:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, grid)  # (B, D, R, S)
    return F.interpolate(maps, to, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


def load_teacher(name: str, find: Callable[[str], Path] = Path) -> Teacher:
    """A teacher from a folder or the hub.

    Only safetensors weights are read and no code of a repository is run.

    Args:
        name: an earlier stage or a folder, as `find` knows them, or a repository `owner/name` of the hub.
        find: gives the folder of that name, or raises ValueError.

    Raises:
        ValueError: there is none, or it is no vision transformer.
    """
    try:
        source = str(find(name))
        if not Path(source).is_dir():
            raise ValueError(f"no folder {name!r}")
    except ValueError as error:
        if name.count("/") != 1 or Path(name).exists() or name[0] in "/.~":
            raise ValueError(f"teacher: {error}, and it is no repository owner/name of the hub") from error
        source = name
    config = AutoConfig.from_pretrained(source)
    kind, options = _network_class(config)
    options |= {"attn_implementation": "eager", "dtype": torch.float32}
    network = kind.from_pretrained(source, config=config, use_safetensors=True, **options)
    facts = _preprocessing(source)
    return Teacher(network, facts.get("image_mean") or [0.5] * 3, facts.get("image_std") or [0.5] * 3)


def fresh_network(config: Mapping[str, Any]) -> nn.Module:
    """A vision transformer with random weights, of a configuration as `plain_config` gives it.

    Raises:
        ValueError: it is of no vision transformer of transformers.
    """
    settings = dict(config)
    name = settings.pop("model_type", None)
    try:
        known = AutoConfig.for_model(name, **settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model_type={name!r} is no vision transformer of transformers: {error}") from error
    kind, options = _network_class(known)
    return kind(known, **options)


def plain_config(network: Any) -> dict[str, Any]:
    """What `fresh_network` needs to build a vision transformer again, in plain values."""
    chosen = network.config.to_diff_dict()
    left_out = ("architectures", "transformers_version", "dtype", "torch_dtype")
    settings = {key: v for key, v in chosen.items() if key not in left_out and not key.startswith("_")}
    return {**settings, "model_type": network.config.model_type}


def _network_class(config: Any) -> tuple[Any, dict[str, Any]]:
    """The class of a configuration of transformers, and how it is built."""
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"teacher: a {type(config).__name__} is of no vision transformer")
    kind: Any = MODEL_MAPPING[type(config)]
    # A pooler's output is not read, and not every checkpoint has it.
    without = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return kind, {"add_pooling_layer": False} if without else {}


def _preprocessing(source: str) -> dict[str, Any]:
    """What preprocessor_config.json says; nothing where there is none."""
    try:
        return BaseImageProcessor.get_image_processor_dict(source)[0]
    except OSError:
        return {}
