"""Captioned pictures that are read when they are needed, whatever they lie in: files, archives, tables.

N pictures, B batch, H and W height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ditkit.data.emoji import Split, is_held_out

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OnError = Literal["skip", "raise"]
NAMED = 20  # unreadable pictures that a message names; more would hide the message
log = logging.getLogger("ditkit.data")


class PictureError(ValueError):
    """A picture that can't be read; the message names it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One picture that was not read yet.

    Args:
        name: what tells it from the others, e.g. its path below the data's folder. The held-out twentieth is
            chosen by it.
        caption: empty where the data has none.
        label: name of its class; None where the data has none.
        source: opens it as a stream of an image file's bytes, or gives it as (H, W, 3) uint8.
    """

    name: str
    caption: str
    label: str | None
    source: Callable[[], IO[bytes] | np.ndarray]

    def pixels(self, size: int) -> np.ndarray:
        """The picture, scaled to fill a square of `size` pixels and cropped at the centre, (H, W, 3) uint8.

        Raises:
            PictureError: it is damaged, or no picture at all.
        """
        try:
            opened = self.source()
            if isinstance(opened, np.ndarray):
                return square(Image.fromarray(opened), size)
            with opened, Image.open(opened) as image:
                return square(ImageOps.exif_transpose(image).convert("RGB"), size)
        except Exception as error:  # for damaged files Pillow's readers raise a dozen kinds
            raise PictureError(f"{self.name}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Records:
    """Pictures by position.

    Args:
        rows: the pictures, in an order that does not change from one run to the next.
        class_names: the classes in the order of their labels, where the data says so.
    """

    rows: Sequence[Record]
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, split: Split) -> Records:
        """All, nineteen twentieths (`"train"`) or the rest (`"heldout"`), by the CRC-32 of the names."""
        if split == "all":
            return self
        rows = [row for row in self.rows if is_held_out(row.name) == (split == "heldout")]
        return Records(rows, self.class_names)


@dataclass
class Unreadable:
    """Pictures that could not be read, as `name: reason`."""

    on_error: OnError = "skip"
    reasons: list[str] = field(default_factory=list)

    def read(self, rows: Iterable[Record], size: int) -> Iterator[tuple[Record, np.ndarray]]:
        """The rows that can be read, with their pixels (size, size, 3).

        Raises:
            PictureError: a picture can't be read and `on_error` is "raise".
        """
        for row in rows:
            try:
                pixels = row.pixels(size)
            except PictureError as error:
                if self.on_error == "raise":
                    raise PictureError(f"{error} (data.on_error=skip leaves such pictures out)") from error
                self.reasons.append(str(error))
                continue
            yield row, pixels

    def report(self, total: int) -> None:
        """Say how many were left out, and which.

        Raises:
            PictureError: none of the pictures could be read.
        """
        if not self.reasons:
            return
        named = "; ".join(self.reasons[:NAMED])
        more = f"; and {len(self.reasons) - NAMED} more" if len(self.reasons) > NAMED else ""
        if len(self.reasons) == total:
            raise PictureError(f"none of {total} pictures can be read: {named}{more}")
        log.warning("left out %d of %d pictures: %s%s", len(self.reasons), total, named, more)


class PictureSet:
    """Pictures in memory, read once.

    Attributes:
        captions: (N,) texts.
        classes: (N,) names, None where the data has no classes.
        class_names: the classes in the order of their labels, where the data says so.
        skipped: `name: reason` of the pictures that could not be read.

    Raises:
        PictureError: see `Unreadable`.
    """

    def __init__(self, records: Records, size: int, on_error: OnError = "skip") -> None:
        unreadable = Unreadable(on_error)
        bar = tqdm(records.rows, desc="reading pictures", delay=2)
        found = list(unreadable.read(bar, size))
        unreadable.report(len(records))
        self.captions = [row.caption for row, _ in found]
        self.classes = [row.label for row, _ in found]
        self.class_names = records.class_names
        self.skipped = unreadable.reasons
        self.pictures = np.stack([pixels for _, pixels in found])  # (N, H, W, 3) uint8

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Any = slice(None)) -> torch.Tensor:
        """Pictures `(B, 3, size, size)`, float32 in [-1, 1]."""
        return to_tensor(self.pictures[indices])


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Pixels (B, H, W, 3) uint8 as (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def square(picture: Image.Image, size: int) -> np.ndarray:
    """A picture scaled to fill a square and cropped at its centre, (size, size, 3) uint8."""
    scale = size / min(picture.size)
    picture = picture.resize(
        (max(size, round(picture.width * scale)), max(size, round(picture.height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def name_as_text(name: str) -> str:
    """The caption of a picture that has none: its file name with `_` and `-` as spaces."""
    return Path(name).stem.replace("_", " ").replace("-", " ").strip().lower()
