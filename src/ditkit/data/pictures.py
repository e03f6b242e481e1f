"""Captioned pictures in memory, from whatever a training file names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ditkit.data.config import DataConfig
from ditkit.data.emoji import EmojiDataset, Split
from ditkit.data.records import PictureSet, Record, Records


class Pictures(Protocol):
    """`captions` and `classes` of N pictures and `images(indices) -> (B, 3, H, W)` in [-1, 1].

    `classes` are names, None where the data has none.
    """

    captions: list[str]

    @property
    def classes(self) -> Sequence[str | None]: ...
    def __len__(self) -> int: ...
    def images(self, indices: Any = ...) -> torch.Tensor: ...


def open_pictures(data: DataConfig, split: Split | None = None) -> Pictures:
    """The data set that a training file names; `split` overrides the file's.

    Raises:
        ValueError: the file names no pictures, a size that the emoji do not have, or a source that can't be
            read.
        FileNotFoundError: nothing is there, or nothing of that split.
    """
    split = split or data.split
    if data.kind == "emoji":
        if data.size != 64:
            raise ValueError(f"data.size: the emoji pictures are 64 pixels wide (got {data.size})")
        return EmojiDataset(split, **({} if data.groups is None else {"groups": data.groups}))
    records = open_records(data)
    chosen = records.of(split)
    if not len(chosen):
        raise FileNotFoundError(f"no pictures of the {split} split in {data.path}: {len(records)} in all")
    return PictureSet(chosen, data.size, data.on_error)


def open_records(data: DataConfig) -> Records:
    """All pictures that a training file names, in no split and none of them read.

    Raises:
        ValueError: the file names no pictures, or a source that can't be read.
        FileNotFoundError: nothing is there.
    """
    if data.kind == "emoji":
        return _emoji_records(data.groups)
    if data.path is None or data.kind in ("emoji-motion", "latents"):
        raise ValueError(
            "data.kind: this task needs pictures, emoji, folder, webdataset or huggingface "
            f"(got {data.kind!r})"
        )
    columns = {"text_column": data.text_column, "label_column": data.label_column}
    if data.kind == "folder":
        from ditkit.data.folder import folder_records

        return folder_records(data.path, **columns)
    if data.kind == "webdataset":
        from ditkit.data.webdataset import webdataset_records

        return webdataset_records(data.path, **columns)
    from ditkit.data.huggingface import huggingface_records

    return huggingface_records(data.path, data.subset, data.image_column, **columns)


def _emoji_records(groups: list[str] | None) -> Records:
    emoji = EmojiDataset("all", **({} if groups is None else {"groups": groups}))
    return Records(
        [
            Record(row.caption, row.caption, row.group, partial(emoji.pictures.__getitem__, index))
            for index, row in enumerate(emoji.rows)
        ]
    )


def periods(data: DataConfig, pictures: Pictures) -> list[int] | None:
    """`data.every` for each sample: in how many epochs it comes once."""
    if not data.every:
        return None
    if not isinstance(pictures, EmojiDataset):
        raise ValueError("data.every: only the emoji set has groups")
    unknown = sorted(set(data.every) - {row.group for row in pictures.rows})
    if unknown:
        raise ValueError(f"data.every: no group {unknown} in the data")
    return [data.every.get(row.group, 1) for row in pictures.rows]


def class_labels(pictures: Any, classes: list[str] | None = None) -> tuple[torch.Tensor, list[str]]:
    """Labels (N,) and the names they index: those the data counts by, else sorted (numbers as numbers).

    Args:
        pictures: with `classes`.
        classes: the names to count by, of other pictures of the same data.

    Raises:
        ValueError: pictures without a class, or of one that is not among `classes`.
    """
    names = list(pictures.classes)
    if None in names:
        raise ValueError(
            f"{names.count(None)} of {len(names)} pictures have no class: name the column with "
            "data.label_column, or put a .cls file beside each picture of a shard"
        )
    known: list[str] = classes or getattr(pictures, "class_names", None) or classes_of(names)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"classes {unknown[:5]} are not among those of training, {known[:5]} ...")
    places = {name: place for place, name in enumerate(known)}
    return torch.tensor([places[name] for name in names]), known


def classes_of(names: Iterable[str]) -> list[str]:
    """The different names in order, numbers as numbers."""
    return sorted(set(names), key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))


def need_captions(pictures: Any) -> list[str]:
    """The captions, for what is trained on texts.

    Raises:
        ValueError: all are empty.
    """
    if not any(pictures.captions):
        raise ValueError(
            "the pictures have no captions: name the column with data.text_column, or put a .txt file beside "
            "each picture"
        )
    return pictures.captions


def grid(images: torch.Tensor, columns: int) -> Image.Image:
    """One picture of many: images `(B, 3, H, W)` in [-1, 1], row by row."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = -(-len(pixels) // columns)
    height, width = pixels.shape[1:3]
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for place, picture in enumerate(pixels):
        y, x = divmod(place, columns)
        sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] = picture
    return Image.fromarray(sheet)
