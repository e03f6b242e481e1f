"""The emoji set that ships with the package: 3,779 pictures of 64 x 64 pixels with their Unicode names.

Noto Color Emoji (SIL Open Font License, the text lies beside the sheet), rendered by
`scripts/render_emoji.py`. Groups: `single` code points, `tone` (skin-tone sequences), `flag`, `keycap` and
`joined` sequences.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ditkit.files import whole_file

Split = Literal["all", "train", "heldout"]
GROUPS = ("single", "tone", "flag", "keycap", "joined")
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Emoji:
    emoji: str
    caption: str
    group: str


@lru_cache(maxsize=1)
def _sheet() -> tuple[tuple[Emoji, ...], np.ndarray]:
    """All rows and pictures `(N, 64, 64, 3)` uint8."""
    with as_file(files("ditkit") / "assets" / "emoji") as folder:
        facts = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        with Image.open(folder / "sheet.webp") as image:
            sheet = np.asarray(image.convert("RGB"))
    size, columns = facts["size"], facts["columns"]
    rows = tuple(Emoji(**row) for row in facts["pictures"])
    tiles = sheet.reshape(sheet.shape[0] // size, size, columns, size, 3).swapaxes(1, 2)
    return rows, np.ascontiguousarray(tiles.reshape(-1, size, size, 3)[: len(rows)])


def is_held_out(caption: str) -> bool:
    """Whether a caption is in the held-out twentieth: by its CRC-32, so it never depends on order or seed."""
    return zlib.crc32(caption.encode()) % HELD_OUT_ONE_IN == 0


class EmojiDataset(Dataset[dict[str, Any]]):
    """Captioned pictures.

    Items are `{"image": (3, 64, 64) float32 in [-1, 1], "caption": str, "label": int}`; `label` is the index
    of the item's group in `GROUPS`.

    Args:
        split: `"all"`, `"train"` (nineteen twentieths) or `"heldout"` (the rest).
        groups: which groups to take.

    Raises:
        ValueError: an unknown split or group.
    """

    def __init__(self, split: Split = "all", groups: tuple[str, ...] | list[str] = GROUPS) -> None:
        if split not in ("all", "train", "heldout"):
            raise ValueError(f"split={split!r}: expected all, train or heldout")
        unknown = sorted(set(groups) - set(GROUPS))
        if unknown:
            raise ValueError(f"groups: unknown {unknown}; there are {', '.join(GROUPS)}")
        rows, pictures = _sheet()
        keep = [
            i
            for i, row in enumerate(rows)
            if row.group in groups and (split == "all" or is_held_out(row.caption) == (split == "heldout"))
        ]
        self.rows = [rows[i] for i in keep]
        self.captions = [row.caption for row in self.rows]
        self.classes = [row.group for row in self.rows]
        self.pictures = pictures[keep]  # (N, 64, 64, 3) uint8

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"image": self.images([index])[0], "caption": row.caption, "label": GROUPS.index(row.group)}

    def images(self, indices: Any = slice(None)) -> torch.Tensor:
        """Pictures `(B, 3, 64, 64)`, float32 in [-1, 1]."""
        pixels = torch.from_numpy(self.pictures[indices])
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    def find(self, caption: str) -> int:
        """Index of the picture with exactly that caption.

        Raises:
            KeyError: no such caption.
        """
        try:
            return self.captions.index(caption.lower())
        except ValueError:
            raise KeyError(f"no emoji is called {caption!r}") from None


def preview(path: Path, count: int = 256, seed: int = 0) -> None:
    """Write a sheet of `count` pictures drawn at random (all of them when `count` is 0) as PNG or WebP."""
    dataset = EmojiDataset()
    order = np.random.default_rng(seed).permutation(len(dataset))[: count or None]
    columns = max(1, int(np.ceil(np.sqrt(len(order)))))
    size = dataset.pictures.shape[1]
    sheet = np.full((-(-len(order) // columns) * size, columns * size, 3), 255, np.uint8)
    for place, index in enumerate(np.sort(order)):
        y, x = divmod(place, columns)
        sheet[y * size : (y + 1) * size, x * size : (x + 1) * size] = dataset.pictures[index]
    with whole_file(path) as part:
        Image.fromarray(sheet).save(part)
