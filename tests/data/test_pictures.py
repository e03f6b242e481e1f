import numpy as np
import pytest
import torch
from PIL import Image

from ditkit.data.config import DataConfig
from ditkit.data.emoji import GROUPS, EmojiDataset, is_held_out, preview
from ditkit.data.pictures import class_labels, grid, open_pictures, periods


def test_the_set_is_whole():
    dataset = EmojiDataset()
    assert len(dataset) == 3779 == len(set(dataset.captions))
    assert dataset.pictures.shape == (3779, 64, 64, 3)
    assert all(caption == caption.lower().strip() for caption in dataset.captions)
    assert {row.group for row in dataset.rows} == set(GROUPS)
    assert len({picture.tobytes() for picture in dataset.pictures}) == len(dataset)
    red_apple = dataset.images([dataset.find("red apple")])[0]
    red, green, _ = red_apple[:, 24:48, 24:40].mean((1, 2))
    assert red > 0.3 and red > green + 0.5


def test_captions_are_unicode_names():
    import unicodedata

    rows = {row.emoji: row.caption for row in EmojiDataset().rows}
    assert rows["\U0001f34e"] == unicodedata.name("\U0001f34e").lower() == "red apple"
    assert rows["\U0001f44d\U0001f3fd"] == "thumbs up sign: medium skin tone"
    assert rows["\U0001f1ef\U0001f1f5"] == "flag of japan"


def test_split_is_fixed_and_disjoint():
    train, heldout = EmojiDataset("train"), EmojiDataset("heldout")
    assert not set(train.captions) & set(heldout.captions)
    assert len(train) + len(heldout) == 3779 and len(heldout) == 166
    assert all(map(is_held_out, heldout.captions))


def test_items_and_errors():
    dataset = EmojiDataset(groups=["keycap"])
    item = dataset[0]
    assert item["image"].shape == (3, 64, 64) and item["image"].dtype == torch.float32
    assert item["image"].min() >= -1 and item["image"].max() <= 1 and item["label"] == GROUPS.index("keycap")
    with pytest.raises(ValueError, match="split="):
        EmojiDataset("validation")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown"):
        EmojiDataset(groups=["fruit"])
    with pytest.raises(KeyError, match="no emoji"):
        dataset.find("purple apple")


def test_preview(tmp_path):
    preview(tmp_path / "sheet.png", count=9)
    assert Image.open(tmp_path / "sheet.png").size == (192, 192)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_folder(tmp_path):
    (tmp_path / "cats").mkdir()
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 255
    Image.fromarray(wide).save(tmp_path / "cats" / "a_white-cat.png")
    (tmp_path / "b.jpg").write_bytes(b"")
    Image.fromarray(wide).save(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text("A caption\n")
    dataset = open_pictures(DataConfig(kind="folder", path=tmp_path, size=16, split="all"))
    assert sorted(dataset.captions) == ["A caption", "a white cat"]
    assert dataset.images().shape == (2, 3, 16, 16)
    assert dataset.images()[:, :, 8, 8].min() > 0.9  # the crop is the centre
    labels, classes = class_labels(dataset)
    assert sorted(classes) == sorted({"cats", tmp_path.name}) and labels.shape == (2,)


def test_open_pictures_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_pictures(DataConfig(kind="folder", path=tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no pictures"):
        open_pictures(DataConfig(kind="folder", path=tmp_path))
    with pytest.raises(ValueError, match="64"):
        open_pictures(DataConfig(size=32))
    with pytest.raises(ValueError, match="needs pictures"):
        open_pictures(DataConfig(kind="emoji-motion"))
    emoji = open_pictures(DataConfig(groups=["keycap"]))
    with pytest.raises(ValueError, match="tone"):
        periods(DataConfig(every={"tone": 4}), emoji)


def test_grid():
    images = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    sheet = np.asarray(grid(images, columns=2))
    assert sheet.shape == (8, 8, 3)
    assert sheet[0, 0, 0] == 0 and sheet[0, 4, 0] == 128 and sheet[4, 0, 0] == 255 and sheet[4, 4, 0] == 255
