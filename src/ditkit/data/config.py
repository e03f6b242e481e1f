"""Which data a run uses, as validated sections of a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ditkit.data.motions import CAMERAS, DIRECTIONS


class Section(BaseModel):
    """Keys of a file; one that is not known is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class MotionConfig(Section):
    """What `emoji_motion` clips show.

    Args:
        objects: captions of the emoji set; None: `motions.VOCABULARY`.
        count: fewest and most objects in a clip.
        directions: keys of `motions.DIRECTIONS`.
        cameras, camera_share: the moves of the camera, and the share of clips in which it moves.
        object_size: width of an emoji's square in pixels, at magnification 1.
        travel: least and greatest way of a moving object over a clip, in pixels of the world.
        spread: share of the room that a motion leaves over which its place is drawn (0: the middle).
    """

    objects: list[str] | None = None
    count: tuple[int, int] = (1, 1)
    directions: list[str] = Field(default=list(DIRECTIONS), min_length=1)
    cameras: list[str] = ["zooms in", "zooms out"]
    camera_share: float = Field(default=0.3, ge=0, le=1)
    frames: int = Field(default=17, ge=1)
    object_size: float = Field(default=28.0, gt=4)
    travel: tuple[float, float] = (14.0, 20.0)
    spread: float = Field(default=1.0, ge=0, le=1)
    background: Literal["white", "soft", "dots"] = "white"

    @model_validator(mode="after")
    def _known_words(self) -> MotionConfig:
        for key, seen, known in (
            ("directions", self.directions, DIRECTIONS),
            ("cameras", self.cameras, CAMERAS[1:]),
        ):
            unknown = sorted(set(seen) - set(known))
            if unknown:
                raise ValueError(f"{key}: unknown {unknown}; there are {', '.join(known)}")
        if not 1 <= self.count[0] <= self.count[1]:
            raise ValueError(f"count={self.count}: fewest and most, from 1 on")
        if not 0 < self.travel[0] <= self.travel[1]:
            raise ValueError(f"travel={self.travel}: least and greatest, above 0")
        return self


class DataConfig(Section):
    """Which pictures. `every: {tone: 4}` shows a quarter of that group in each epoch, in turn.

    `kind: emoji-motion` are clips, of what `motion` says; the other keys but `size` do not concern them.

    Args:
        path: of `folder`, the folder; of `webdataset`, a shard, a folder of shards or a pattern such as
            `shard-{000..004}.tar`; of `huggingface`, a saved data set or `owner/name`; of `latents`, what
            `ditkit data cache-latents` wrote.
        size: pictures fill a square of so many pixels, cropped at the centre; of `latents`, what was cached.
        split: a fixed twentieth of the pictures is held out of `train`.
        subset: which of a Hugging Face data set's own splits.
        image_column, text_column, label_column: of a Hugging Face data set; the last two also of a folder's
            metadata file and of a shard's `key.json`. None: the usual names.
        on_error: whether pictures that can't be read are left out, by name, or stop the run.
    """

    kind: Literal["emoji", "folder", "webdataset", "huggingface", "latents", "emoji-motion"] = "emoji"
    motion: MotionConfig = MotionConfig()
    path: Path | None = None
    size: int = Field(default=64, ge=8)
    split: Literal["all", "train", "heldout"] = "train"
    subset: str = "train"
    image_column: str = "image"
    text_column: str | None = None
    label_column: str | None = None
    on_error: Literal["skip", "raise"] = "skip"
    groups: list[str] | None = None
    every: dict[str, int] = {}

    @model_validator(mode="after")
    def _elsewhere_has_path(self) -> DataConfig:
        if self.kind not in ("emoji", "emoji-motion") and self.path is None:
            raise ValueError(f"kind: {self.kind} needs path")
        return self
