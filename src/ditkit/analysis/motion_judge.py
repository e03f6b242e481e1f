"""What moves in a clip and where to: matched against the known emoji, then followed from frame to frame.

An emoji is looked for at every place of a frame, whole pixels apart, and in a few sizes: by least squares
between the frame and a white picture with the emoji at that place, for all places at once by the Fourier
transform. The object is the emoji with the least error summed over the looked-at frames; its places in all
frames give the motion, by a straight line through them.

The measure suits clips on white with one object of a closed vocabulary. Legend: F frames, S side in pixels,
V emoji, Z sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ditkit.data.emoji_motion import read_caption, sprite
from ditkit.data.motions import DIRECTIONS, STILL, VOCABULARY, ZOOM

STILL_BELOW = 5.0
"""Pixels over the clip: motions of the data set are 14 or more, objects that stay still move 0."""
MARGIN = 8
"""Pixels that an emoji may reach over the border."""
LOOKED_AT = 5
"""Frames, evenly spaced, that decide which object it is."""


@dataclass(frozen=True)
class Seen:
    """What was found in a clip.

    Args:
        name: the emoji.
        displacement: (x, y) in pixels over the whole clip.
        explained: share of the frames' deviation from white that the emoji at its places accounts for,
            1 for a perfect match.
        track: (F, 2) centres (x, y) in pixels.
    """

    name: str
    displacement: tuple[float, float]
    explained: float
    track: torch.Tensor

    @property
    def length(self) -> float:
        return math.hypot(*self.displacement)

    @property
    def direction(self) -> str:
        """The nearest of `DIRECTIONS`."""
        if self.length < STILL_BELOW:
            return STILL
        x, y = self.displacement
        return max(DIRECTIONS, key=lambda name: x * DIRECTIONS[name][0] + y * DIRECTIONS[name][1])

    def moves(self, direction: str, within: float = 45.0) -> bool:
        """Whether it moves within so many degrees of a direction, or not at all for `STILL`."""
        if direction == STILL or self.length < STILL_BELOW:
            return direction == STILL and self.length < STILL_BELOW
        way = DIRECTIONS[direction]
        cosine = (self.displacement[0] * way[0] + self.displacement[1] * way[1]) / self.length
        return math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) <= within


class MotionJudge:
    """Finds the object of a clip and how it moves.

    Args:
        names: the candidates for every clip; None: `VOCABULARY`.
        object_size: width of an emoji in pixels at magnification 1.
        size: side of the frames.
    """

    def __init__(self, names: Sequence[str] | None = None, object_size: float = 28.0, size: int = 64) -> None:
        self.names = list(names or VOCABULARY)
        self.side = size + 2 * MARGIN
        self.sizes = [round(object_size * ZOOM**power) for power in (0.0, 0.5, 1.0)]
        kernels, centres, norms = [], [], []
        for name in self.names:
            for width in self.sizes:
                layers, x, y = sprite(name, width)
                darkness = layers[3:] - layers[:3]  # what the emoji takes from a white ground, (3, w, w)
                kernels.append(torch.fft.rfft2(F.pad(darkness, (0, self.side - width, 0, self.side - width))))
                norms.append(darkness.square().sum())
                centres.append((x - MARGIN, y - MARGIN))
        shape = (len(self.names), len(self.sizes))
        self._kernels = torch.stack(kernels).conj().unflatten(0, shape)  # (V, Z, 3, S, S / 2 + 1)
        self._norms = torch.stack(norms).view(shape)
        self._centres = torch.tensor(centres).view(*shape, 2)

    def look(self, video: torch.Tensor) -> Seen:
        """The object of a clip (3, F, S, S) in [-1, 1]."""
        darkness = (1 - video.float().clamp(-1, 1)).transpose(0, 1) / 2  # (F, 3, S, S)
        chosen = torch.linspace(0, len(darkness) - 1, min(LOOKED_AT, len(darkness))).round().long()
        errors, _ = self._match(darkness[chosen], slice(None))  # (f, V)
        best = int(errors.sum(0).argmin())
        errors, track = self._match(darkness, slice(best, best + 1))  # (F, 1), (F, 1, 2)
        time = torch.linspace(-0.5, 0.5, len(track)) if len(track) > 1 else torch.ones(1)
        x, y = ((time[:, None] * track[:, 0]).sum(0) / time.square().sum()).tolist()
        explained = 1 - float(errors.sum() / darkness.square().sum().clamp_min(1e-9))
        return Seen(self.names[best], (x, y), explained, track[:, 0])

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str]) -> float:
        """The share of clips that show object and motion of their prompts.

        Args:
            pictures: (B, H, F W, 3) in [0, 1], the frames of each clip side by side.
            prompts: what is no caption of a clip with one object is left out (nan when all are).
        """
        right = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            try:
                (item,), _ = read_caption(prompt)
            except ValueError:
                continue
            frames = torch.from_numpy(np.asarray(picture)).unflatten(
                1, (-1, picture.shape[0])
            )  # (H, F, W, 3)
            seen = self.look(frames.permute(3, 1, 0, 2) * 2 - 1)
            right.append(seen.name == item.name and seen.moves(item.direction))
        return float(np.mean(right)) if right else float("nan")

    def _match(self, darkness: torch.Tensor, names: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Least error of each emoji in each frame (F, V), and its centre there (F, V, 2)."""
        kernels = self._kernels[names]
        spectrum = torch.fft.rfft2(F.pad(darkness, (MARGIN,) * 4))[
            :, None, None
        ]  # (F, 1, 1, 3, S, S / 2 + 1)
        products = (spectrum * kernels).sum(3)  # (F, V, Z, S, S / 2 + 1)
        overlap = torch.fft.irfft2(products, s=(self.side, self.side))  # (F, V, Z, S, S)
        for index, width in enumerate(self.sizes):  # places that would wrap around the picture
            overlap[:, :, index, self.side - width + 1 :] = -math.inf
            overlap[:, :, index, :, self.side - width + 1 :] = -math.inf
        gain = 2 * overlap - self._norms[names, :, None, None]
        least, place = gain.flatten(2).max(-1)  # over sizes and places, (F, V)
        size, row, column = place // self.side**2, place // self.side % self.side, place % self.side
        emoji = torch.arange(len(self.names))[names].expand_as(size)
        centres = self._centres[emoji, size] + torch.stack([column, row], -1)
        return darkness.square().sum((1, 2, 3))[:, None] - least, centres
