"""Where the text and the picture lie in a sequence of tokens.

B batch, T text tokens, F frames, H height, W width (all three in tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

TextPlace = Literal["prefix", "suffix", "cross", "none"]


@dataclass(frozen=True)
class TokenLayout:
    """The order of the tokens one forward of a transformer works on.

    Image (or video) tokens are in raster order: frames, then rows, then columns. Joint text tokens stand
    before them (`"prefix"`) or after them (`"suffix"`); with `"cross"` the text has attention modules of its
    own and with `"none"` there is no text, so that self-attention sees image tokens only.

    Args:
        grid: (F, H, W) in tokens, each >= 1; F is 1 for pictures.
        text_length: T >= 0, padding included; the number of text tokens in the joint sequence, or of the
            sequence that cross-attention reads.
        text: where the text stands.
        text_mask: (B, T) bool, True where a text token is valid; None when all are.

    Raises:
        ValueError: an argument out of range, with its value.
    """

    grid: tuple[int, int, int]
    text_length: int = 0
    text: TextPlace = "none"
    text_mask: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"grid must be (frames, height, width), each at least 1; got {self.grid}")
        if self.text not in get_args(TextPlace):
            raise ValueError(f"text must be one of {', '.join(get_args(TextPlace))}; got {self.text!r}")
        if self.text_length < 0:
            raise ValueError(f"text_length must be at least 0; got {self.text_length}")
        if self.text_mask is not None and self.text_mask.shape[-1] != self.text_length:
            raise ValueError(
                f"text_mask has {self.text_mask.shape[-1]} columns but text_length is {self.text_length}"
            )

    @property
    def image_length(self) -> int:
        """F x H x W."""
        return math.prod(self.grid)

    @property
    def joint_text_length(self) -> int:
        """Text tokens inside the self-attention sequence: T for prefix and suffix, otherwise 0."""
        return self.text_length if self.text in ("prefix", "suffix") else 0

    @property
    def length(self) -> int:
        """Length of the sequence that self- or joint attention works on."""
        return self.image_length + self.joint_text_length

    @property
    def image_span(self) -> slice:
        """The image tokens inside that sequence."""
        start = self.joint_text_length if self.text == "prefix" else 0
        return slice(start, start + self.image_length)

    @property
    def text_span(self) -> slice:
        """The joint text tokens inside that sequence (empty for cross and none)."""
        start = self.image_length if self.text == "suffix" else 0
        return slice(start, start + self.joint_text_length)


def splice(sequence: Tensor, image: slice, tokens: Tensor) -> Tensor:
    """The sequence (B, T + L, C) with other image tokens (B, K, C) in place of its own at `image`."""
    length = sequence.shape[1]
    start, stop, _ = image.indices(length)
    if stop - start == length:
        return tokens
    return torch.cat([sequence[:, :start], tokens, sequence[:, stop:]], dim=1)
