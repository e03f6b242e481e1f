from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ditkit.analysis import pictures


def test_values_are_clipped_and_rounded() -> None:
    image = pictures.to_image(np.array([[[-1.0, 0.5, 2.0]]]))
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_sheet_has_a_row_per_name_and_a_column_per_caption(tmp_path) -> None:
    red = np.zeros((3, 16, 16, 3))
    red[..., 0] = 1
    blue = np.zeros((3, 16, 16, 3))
    blue[..., 2] = 1
    page = pictures.sheet(
        {"dense": red, "a method\nwith options": blue}, ["one", "two words", "x " * 60], cell=40
    )
    assert {(255, 0, 0), (0, 0, 255)} <= {color for _, color in page.getcolors(maxcolors=10**6)}
    path = pictures.save(page, tmp_path / "deep" / "sheet.png")
    with Image.open(path) as image:
        assert image.size == page.size
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_wide_pictures_keep_their_shape() -> None:
    page = pictures.sheet({"": np.ones((1, 8, 32, 3))}, cell=80)
    assert page.size == (80 + 20, 20 + 20)


def test_no_pictures() -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        pictures.sheet({})
