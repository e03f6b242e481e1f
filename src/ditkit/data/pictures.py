"""Captioned pictures in memory, from the bundled emoji or a folder of image files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ditkit.data.config import DataConfig
from ditkit.data.emoji import EmojiDataset, Split, is_held_out

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Pictures(Protocol):
    """`captions` and `labels` of N pictures and `images(indices) -> (B, 3, H, W)` in [-1, 1]."""

    captions: list[str]

    def __len__(self) -> int: ...
    def images(self, indices: Any = ...) -> torch.Tensor: ...


class FolderDataset:
    """All pictures under a folder, scaled to fill a square and cropped at the centre.

    The caption of a picture is the text of the `.txt` file beside it, else its file name with `_` and `-` as
    spaces. The held-out twentieth is chosen by the CRC-32 of the path below the folder.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """

    def __init__(self, folder: Path, size: int, split: Split = "all") -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of pictures at {folder}")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        files = [
            f
            for f in files
            if split == "all" or is_held_out(str(f.relative_to(folder))) == (split == "heldout")
        ]
        if not files:
            raise FileNotFoundError(
                f"no pictures ({', '.join(SUFFIXES)}) of the {split} split under {folder}"
            )
        self.captions = [_caption(file) for file in files]
        self.classes = [file.parent.name for file in files]
        bar = tqdm(files, desc="reading pictures", delay=2)
        self.pictures = np.stack([_read(file, size) for file in bar])  # (N, H, W, 3) uint8

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Any = slice(None)) -> torch.Tensor:
        """Pictures `(B, 3, size, size)`, float32 in [-1, 1]."""
        return torch.from_numpy(self.pictures[indices]).permute(0, 3, 1, 2).float() / 127.5 - 1


def open_pictures(data: DataConfig, split: Split | None = None) -> Pictures:
    """The data set that a training file names; `split` overrides the file's.

    Raises:
        ValueError: the file names clips, or a size that the emoji do not have.
    """
    if data.kind == "emoji-motion":
        raise ValueError("data.kind: this task needs pictures, emoji or folder (got 'emoji-motion')")
    if data.kind == "folder":
        if data.path is None:
            raise ValueError("data.path: needed for kind: folder")
        return FolderDataset(data.path, data.size, split or data.split)
    if data.size != 64:
        raise ValueError(f"data.size: the emoji pictures are 64 pixels wide (got {data.size})")
    kwargs = {} if data.groups is None else {"groups": data.groups}
    return EmojiDataset(split or data.split, **kwargs)


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
    """Labels (N,) and the names they index: emoji groups, or the folders that picture files lie in."""
    if isinstance(pictures, EmojiDataset):
        names = [row.group for row in pictures.rows]
    else:
        names = list(pictures.classes)
    classes = classes or sorted(set(names))
    return torch.tensor([classes.index(name) for name in names]), classes


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


def _caption(file: Path) -> str:
    beside = file.with_suffix(".txt")
    if beside.is_file():
        return beside.read_text(encoding="utf-8").strip()
    return file.stem.replace("_", " ").replace("-", " ").strip().lower()


def _read(file: Path, size: int) -> np.ndarray:
    with Image.open(file) as image:
        picture = image.convert("RGB")
    scale = size / min(picture.size)
    picture = picture.resize(
        (max(size, round(picture.width * scale)), max(size, round(picture.height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))
