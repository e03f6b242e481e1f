"""Arrays to pictures, pictures to files, many pictures to one sheet with captions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditkit.files import whole_file

_PAGE, _INK, _SOFT = (255, 255, 255), (29, 28, 26), (109, 106, 100)
_GAP = 10


def to_image(picture: np.ndarray) -> Image.Image:
    """A picture (H, W, 3) in [0, 1] as a Pillow image; what is outside the range is clipped."""
    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


def save(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture, whole or not at all; the suffix chooses the format."""
    with whole_file(path) as part:
        image.save(part)
    return Path(path)


def sheet(rows: Mapping[str, np.ndarray], captions: Sequence[str] = (), cell: int = 112) -> Image.Image:
    """A table of pictures: one row per entry of `rows`, named at its left, captions above the columns.

    Args:
        rows: name -> pictures (B, H, W, 3) in [0, 1]; an empty name leaves no room at the left.
        captions: one per column, may be empty.
        cell: width of a picture in the sheet in pixels; the height follows.
    """
    if not rows:
        raise ValueError("rows is empty; at least one row of pictures is needed")
    names = _font(15)
    small = _font(13)
    first = next(iter(rows.values()))
    height = max(1, round(cell * first.shape[1] / first.shape[2]))
    columns = max(len(pictures) for pictures in rows.values())
    left = max((_width(names, line) for name in rows for line in name.split("\n")), default=0)
    left += 2 * _GAP if left else _GAP
    wrapped = [_wrap(caption, small, cell) for caption in captions]
    top = _GAP + max((len(lines) for lines in wrapped), default=0) * 17
    page = Image.new("RGB", (left + columns * (cell + _GAP), top + len(rows) * (height + _GAP)), _PAGE)
    draw = ImageDraw.Draw(page)
    for column, lines in enumerate(wrapped):
        for i, line in enumerate(lines):
            x = left + column * (cell + _GAP) + cell / 2
            draw.text((x, top - 5 - 17 * (len(lines) - i - 0.5)), line, _SOFT, small, anchor="mm")
    for row, (name, pictures) in enumerate(rows.items()):
        y = top + row * (height + _GAP)
        draw.multiline_text((_GAP, y + height / 2), name, _INK, names, anchor="lm", spacing=5)
        for column, picture in enumerate(pictures):
            image = to_image(picture).resize((cell, height), Image.Resampling.LANCZOS)
            page.paste(image, (left + column * (cell + _GAP), y))
    return page


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> int:
    return int(font.getlength(text))


def _wrap(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 3
) -> list[str]:
    """Words in lines of at most `width` pixels; what does not fit into `most` lines ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _width(font, joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + "…"]
    return lines
