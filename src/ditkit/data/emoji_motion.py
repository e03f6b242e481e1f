"""Endless short clips of emoji that move in a known way, with everything that is known about them.

A clip is a function of (seed, index): one or more emoji on a plain ground, each moving straight in one of
eight directions or staying still, seen by a camera that is static, zooms or pans. Beside the frames there
are the caption, the exact track, mask and depth of each object, and the path of the camera.

    F frames, N objects, H x W pixels; positions are (x, y) in pixels, the pixel (i, j) spans
    [j, j + 1) x [i, i + 1), so its centre is (j + 0.5, i + 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ditkit.data.config import MotionConfig
from ditkit.data.emoji import EmojiDataset
from ditkit.data.motions import BACKGROUNDS, CAMERAS, DIRECTIONS, PAN, STILL, VOCABULARY, ZOOM

WHITE_FROM = 240  # darkest channel of the sheet's white ground, after its lossy compression


@dataclass(frozen=True)
class Moving:
    """One object of a clip: its caption in the emoji set and its direction (a key of `DIRECTIONS`)."""

    name: str
    direction: str

    def __str__(self) -> str:
        return (
            f"{self.name} {self.direction}"
            if self.direction == STILL
            else f"{self.name} moving {self.direction}"
        )


@dataclass(frozen=True)
class Clip:
    """Frames and what is true of them. Objects are ordered by depth, the nearest first.

    Args:
        video: (3, F, H, W) float32 in [-1, 1].
        caption: e.g. "red apple moving left, camera zooms in".
        objects: the N objects.
        tracks: (N, F, 2) float32, centre of mass of each object's mask as it is drawn, (x, y) in pixels.
        masks: (N, F, H, W) bool, the whole object, also where a nearer one hides it.
        camera: a key of `CAMERAS`.
        camera_path: (F, 3) float32: magnification, and x and y of the world's point at the picture's centre,
            relative to the world's centre.
    """

    video: torch.Tensor
    caption: str
    objects: tuple[Moving, ...]
    tracks: torch.Tensor
    masks: torch.Tensor
    camera: str
    camera_path: torch.Tensor
    background: tuple[int, int, int] = field(default=(255, 255, 255))

    @property
    def visible(self) -> torch.Tensor:
        """(N, F, H, W) bool: each mask without what nearer objects hide."""
        hidden = self.masks.cumsum(0) - self.masks.long() > 0
        return self.masks & ~hidden


class EmojiMotion:
    """Clips by index.

    Args:
        config: what moves and how, see `MotionConfig`.
        size: height and width of the frames.
        seed: different seeds give different clips.

    Raises:
        ValueError: an object that is no emoji caption, or a motion that would leave the picture.
    """

    def __init__(self, config: MotionConfig | None = None, size: int = 64, seed: int = 0) -> None:
        self.config = config or MotionConfig()
        self.size, self.seed = size, seed
        self.names = list(self.config.objects or VOCABULARY)
        unknown = sorted(set(self.names) - set(_known_captions()))
        if unknown:
            raise ValueError(f"motion.objects: not in the emoji set: {', '.join(unknown[:3])}")
        self._room = {camera: self._room_for(camera) for camera in (CAMERAS[0], *self.config.cameras)}

    def _room_for(self, camera: str) -> float:
        """How far from the world's centre an object's centre may be, in each direction, to stay in view."""
        largest = ZOOM if "zoom" in camera else 1.0
        pan = PAN * self.size if "pan" in camera else 0.0
        room = self.size / 2 / largest - self.config.object_size / 2 - pan
        if room < self.config.travel[1] / 2:
            raise ValueError(
                f"motion.travel: {self.config.travel[1]} pixels leave the picture with object_size "
                f"{self.config.object_size} and a camera that {camera}; at most {2 * room:.1f} fit"
            )
        return room

    def scenes(self) -> list[tuple[list[Moving], str]]:
        """Everything that one object can do: each object, direction and camera."""
        cameras = (CAMERAS[0], *self.config.cameras)
        return [
            ([Moving(name, direction)], camera)
            for name in self.names
            for direction in self.config.directions
            for camera in cameras
        ]

    def captions(self) -> list[str]:
        """The captions of `scenes`."""
        return [caption(objects, camera) for objects, camera in self.scenes()]

    def clip(self, index: int) -> Clip:
        """The clip of that index."""
        rng = np.random.default_rng((self.seed, index))
        objects, camera = self._draw_scene(rng)
        return self.make(objects, camera, rng)

    def scene(self, index: int) -> tuple[list[Moving], str, str]:
        """Objects, camera and caption of the clip of that index, without drawing it."""
        objects, camera = self._draw_scene(np.random.default_rng((self.seed, index)))
        return objects, camera, caption(objects, camera)

    def _draw_scene(self, rng: np.random.Generator) -> tuple[list[Moving], str]:
        config = self.config
        count = int(rng.integers(config.count[0], config.count[1] + 1))
        names = rng.choice(len(self.names), size=count, replace=count > len(self.names))
        objects = [Moving(self.names[i], str(rng.choice(config.directions))) for i in names]
        moves = config.cameras and rng.random() < config.camera_share
        return objects, str(rng.choice(config.cameras)) if moves else CAMERAS[0]

    def make(
        self, objects: Sequence[Moving], camera: str = CAMERAS[0], rng: np.random.Generator | None = None
    ) -> Clip:
        """A clip of these objects; what is left open (places, speed, ground) is drawn from `rng`.

        Raises:
            KeyError: an unknown name, direction or camera.
        """
        config, rng = self.config, rng or np.random.default_rng(self.seed)
        if camera not in self._room:
            raise KeyError(f"camera {camera!r}: this set has {', '.join(self._room)}")
        path = camera_path(camera, config.frames, self.size)
        ground = _ground(config.background, rng)
        world = np.stack([self._world_track(item, self._room[camera], rng) for item in objects])  # (N, F, 2)
        tracks = self.size / 2 + path[:, :1] * (world - path[:, 1:])  # (N, F, 2)
        frames = _draw_ground(config.background, ground, path, self.size)  # (F, 3, H, W) in [0, 1]
        masks = []
        for item, track in reversed(list(zip(objects, tracks, strict=True))):  # the farthest first
            layer = _draw(item.name, config.object_size, track, path[:, 0], self.size)  # (F, 4, H, W)
            frames = frames * (1 - layer[:, 3:]) + layer[:, :3]
            masks.append(layer[:, 3] > 0.5)
        return Clip(
            video=(frames * 2 - 1).clamp(-1, 1).permute(1, 0, 2, 3).contiguous(),
            caption=caption(objects, camera),
            objects=tuple(objects),
            tracks=torch.from_numpy(tracks).float(),
            masks=torch.stack(masks[::-1]),
            camera=camera,
            camera_path=torch.from_numpy(path).float(),
            background=ground,
        )

    def _world_track(self, item: Moving, room: float, rng: np.random.Generator) -> np.ndarray:
        """(F, 2) positions relative to the world's centre: straight, at constant speed."""
        way = np.asarray(DIRECTIONS[item.direction]) * rng.uniform(*self.config.travel)
        free = (room - np.abs(way) / 2) * self.config.spread
        middle = rng.uniform(-1, 1, 2) * free
        time = np.linspace(-0.5, 0.5, self.config.frames) if self.config.frames > 1 else np.zeros(1)
        return middle + time[:, None] * way


def caption(objects: Sequence[Moving], camera: str = CAMERAS[0]) -> str:
    """The caption of a clip, the nearest object first."""
    text = " in front of ".join(str(item) for item in objects)
    return text if camera == CAMERAS[0] else f"{text}, camera {camera}"


def read_caption(text: str) -> tuple[list[Moving], str]:
    """Objects and camera of a caption; the inverse of `caption`.

    Raises:
        ValueError: not of the form that captions have.
    """
    what, _, camera = text.strip().lower().partition(", camera ")
    objects = []
    for part in what.split(" in front of "):
        name, moving, direction = part.partition(" moving ")
        if not moving and part.endswith(f" {STILL}"):
            name, direction = part.removesuffix(f" {STILL}"), STILL
        if direction not in DIRECTIONS or name not in _known_captions() or camera not in ("", *CAMERAS):
            raise ValueError(
                f"{text!r} is no caption of a clip, such as 'red apple moving left, camera zooms in'"
            )
        objects.append(Moving(name, direction))
    return objects, camera or CAMERAS[0]


def camera_path(camera: str, frames: int, size: int) -> np.ndarray:
    """(F, 3): magnification, and the world's point at the centre of the picture (x, y)."""
    time = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    path = np.zeros((frames, 3))
    path[:, 0] = 1.0
    if camera == "zooms in":
        path[:, 0] = ZOOM**time
    elif camera == "zooms out":
        path[:, 0] = ZOOM ** (1 - time)
    elif camera.startswith("pans "):
        way = np.asarray(DIRECTIONS[camera.removeprefix("pans ")])
        path[:, 1:] = (2 * time[:, None] - 1) * way * PAN * size
    elif camera != CAMERAS[0]:
        raise KeyError(f"camera {camera!r}: one of {', '.join(CAMERAS)}")
    return path


# ---- drawing ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _emoji() -> EmojiDataset:
    return EmojiDataset()


@lru_cache(maxsize=1)
def _known_captions() -> frozenset[str]:
    return frozenset(_emoji().captions)


@lru_cache(maxsize=4096)
def sprite(name: str, size: int) -> tuple[torch.Tensor, float, float]:
    """An emoji with its ground cut out: premultiplied RGBA (4, size, size) in [0, 1], and its centre (x, y).

    The ground is what is white and joined to the border. The centre is the alpha's centre of mass.
    """
    pixels = torch.from_numpy(_emoji().pictures[_emoji().find(name)])  # (64, 64, 3) uint8
    white = pixels.min(-1).values >= WHITE_FROM
    outside = F.pad(torch.zeros_like(white), (1, 1, 1, 1), value=True)  # a frame that floods inwards
    open_ = F.pad(white, (1, 1, 1, 1), value=True)
    while True:
        grown = F.max_pool2d(outside[None].float(), 3, stride=1, padding=1)[0].bool() & open_
        if torch.equal(grown, outside):
            break
        outside = grown
    alpha = (~outside[1:-1, 1:-1]).float()
    colour = pixels.permute(2, 0, 1).float() / 255 * alpha
    layers = F.interpolate(torch.cat([colour, alpha[None]])[None], size=(size, size), mode="area")[0]
    mass = layers[3] / layers[3].sum()
    places = torch.arange(size) + 0.5
    return layers, float((mass.sum(0) * places).sum()), float((mass.sum(1) * places).sum())


def _draw(
    name: str, object_size: float, track: np.ndarray, magnification: np.ndarray, size: int
) -> torch.Tensor:
    """One object in every frame, premultiplied RGBA (F, 4, size, size)."""
    level = math.ceil(object_size * float(magnification.max()))
    layers, x, y = sprite(name, level)
    pitch = torch.from_numpy(level / (object_size * magnification)).float()[:, None]  # (F, 1)
    places = torch.arange(size) + 0.5
    along = torch.from_numpy(track).float()
    # Where each picture column and row lies in the sprite, in grid_sample's [-1, 1].
    columns = ((places - along[:, :1]) * pitch + x) * 2 / level - 1  # (F, W)
    rows = ((places - along[:, 1:]) * pitch + y) * 2 / level - 1  # (F, H)
    frames = len(track)
    grid = torch.stack(
        [columns[:, None].expand(frames, size, size), rows[:, :, None].expand(frames, size, size)], -1
    )
    return F.grid_sample(layers.expand(frames, -1, -1, -1), grid, align_corners=False)


def _ground(kind: str, rng: np.random.Generator) -> tuple[int, int, int]:
    if kind == BACKGROUNDS[0]:
        return (255, 255, 255)
    red, green, blue = (int(v) for v in rng.integers(190, 251, 3))
    return (red, green, blue)


def _draw_ground(kind: str, colour: tuple[int, int, int], path: np.ndarray, size: int) -> torch.Tensor:
    """(F, 3, H, W) in [0, 1]; `dots` are fixed in the world, so that the camera's moves are seen."""
    plain = torch.tensor(colour).float().view(1, 3, 1, 1) / 255
    frames = plain.expand(len(path), 3, size, size)
    if kind != "dots":
        return frames
    zoom, centre = torch.from_numpy(path[:, 0]).float(), torch.from_numpy(path[:, 1:]).float()
    places = (torch.arange(size) + 0.5 - size / 2) / zoom[:, None]  # (F, S) in the world
    x, y = places + centre[:, :1], places + centre[:, 1:]
    waves = torch.cos(x * (math.tau / 12))[:, None, :] + torch.cos(y * (math.tau / 12))[:, :, None]
    dots = ((waves - 1.2) * 4).clamp(0, 1)[:, None]  # (F, 1, H, W)
    return frames * (1 - 0.25 * dots)


def videos(clips: Sequence[Any]) -> torch.Tensor:
    """Clips' frames as one batch (B, 3, F, H, W)."""
    return torch.stack([clip.video for clip in clips])
