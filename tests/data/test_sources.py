"""Pictures from folders, shards and data sets: what is read, what it is called, what is refused."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.conftest import COLOURS, SHARED, encoded, picture, write_tar
from ditkit.data.config import DataConfig
from ditkit.data.emoji import is_held_out
from ditkit.data.pictures import class_labels, need_captions, open_pictures, open_records
from ditkit.data.records import PictureError, PictureSet
from ditkit.data.webdataset import shard_paths


def opened(**options) -> PictureSet:
    pictures = open_pictures(DataConfig(**{"size": 8, "split": "all", **options}))
    assert isinstance(pictures, PictureSet)
    return pictures


def colour_of(pictures: PictureSet, index: int) -> str:
    channels = pictures.images([index])[0].mean((1, 2))
    return list(COLOURS)[int(channels.argmax())]


class TestFolder:
    def test_classes_are_sub_folders_and_captions_are_names(self, tree: Path) -> None:
        pictures = opened(kind="folder", path=tree)
        labels, classes = class_labels(pictures)
        assert classes == ["blue", "green", "red"] and labels.bincount().tolist() == [4, 4, 4]
        assert pictures.captions[0] == "blue square 0"
        assert all(colour_of(pictures, i) == pictures.classes[i] for i in range(12))

    @pytest.mark.parametrize("kind", ["jsonl", "csv"])
    def test_metadata(self, tree: Path, kind: str) -> None:
        rows = [
            ("red/red_square-0.png", "a dark, red square", "warm"),
            ("blue/blue_square-1.png", "sea", "cold"),
        ]
        if kind == "jsonl":
            lines = [json.dumps({"file_name": n, "text": t, "mood": m}) for n, t, m in rows]
        else:
            lines = ["file_name,text,mood", *(f'{n},"{t}",{m}' for n, t, m in rows)]
        (tree / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
        (tree / "green" / "green_square-2.txt").write_text(" a leaf\n")
        pictures = opened(kind="folder", path=tree, label_column="mood")
        told = dict(zip(pictures.captions, pictures.classes, strict=True))
        assert told["a dark, red square"] == "warm" and told["sea"] == "cold"
        assert told["a leaf"] == "green" and told["red square 1"] == "red"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"file_name": "red/red_square-0.png"', "line 1: no JSON"),
            ('{"text": "x"}', "line 1: no file_name"),
            ("[1]", "line 1: expected an object"),
        ],
    )
    def test_bad_metadata_is_named(self, tree: Path, text: str, message: str) -> None:
        (tree / "metadata.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            opened(kind="folder", path=tree)

    def test_a_column_that_is_not_there(self, tree: Path) -> None:
        with pytest.raises(ValueError, match="label_column='mood'"):
            opened(kind="folder", path=tree, label_column="mood")
        (tree / "metadata.jsonl").write_text('{"file_name": "red/red_square-0.png", "text": "x"}')
        with pytest.raises(ValueError, match="no column 'mood'"):
            opened(kind="folder", path=tree, label_column="mood")

    def test_metadata_of_missing_files_is_told(self, tree: Path, caplog) -> None:
        (tree / "metadata.jsonl").write_text('{"file_name": "red/nowhere.png", "text": "x"}')
        assert len(opened(kind="folder", path=tree)) == 12
        assert "nowhere.png" in caplog.text

    def test_split_is_fixed_by_the_names(self, tmp_path: Path) -> None:
        folder = tmp_path / "many"
        folder.mkdir()
        for index in range(60):
            picture("red").save(folder / f"{index}.png")
        train = open_pictures(DataConfig(kind="folder", path=folder, size=8))
        heldout = open_pictures(DataConfig(kind="folder", path=folder, size=8), "heldout")
        assert len(train) + len(heldout) == 60
        assert len(heldout) == sum(is_held_out(f"{index}.png") for index in range(60)) > 0

    def test_photographs(self) -> None:
        if not (SHARED / "photos").is_dir():
            pytest.skip("the shared photographs are not here")
        pictures = opened(kind="folder", path=SHARED / "photos", size=64)
        assert sorted(pictures.captions) == ["china", "flower"] and pictures.images().shape == (2, 3, 64, 64)
        assert pictures.images().std() > 0.2


class TestDamaged:
    def spoil(self, tree: Path) -> list[str]:
        good = (tree / "red" / "red_square-0.png").read_bytes()
        (tree / "red" / "cut.png").write_bytes(good[: len(good) // 2])
        (tree / "green" / "empty.jpg").write_bytes(b"")
        (tree / "blue" / "text.webp").write_text("no picture")
        return ["red/cut.png", "green/empty.jpg", "blue/text.webp"]

    def test_damaged_pictures_are_left_out_by_name(self, tree: Path, caplog) -> None:
        names = self.spoil(tree)
        with caplog.at_level(logging.WARNING, logger="ditkit.data"):
            pictures = opened(kind="folder", path=tree)
        assert len(pictures) == 12 and len(pictures.skipped) == 3
        assert "left out 3 of 15 pictures" in caplog.text
        assert all(name in caplog.text for name in names)

    def test_or_stop_the_run(self, tree: Path) -> None:
        self.spoil(tree)
        with pytest.raises(PictureError, match=r"text\.webp.*on_error=skip"):
            opened(kind="folder", path=tree, on_error="raise")

    def test_nothing_but_damage(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"x")
        with pytest.raises(PictureError, match=r"none of 1 pictures can be read: a\.png"):
            opened(kind="folder", path=tmp_path)


class TestWebDataset:
    def write(self, folder: Path) -> Path:
        for number, colour in enumerate(COLOURS):
            members = {}
            for shade in range(2):
                key = f"sub/{colour}{shade}"
                members[f"{key}.jpg" if shade else f"{key}.png"] = encoded(colour, "JPEG" if shade else "PNG")
                members[f"{key}.txt"] = f"a {colour} square\n".encode()
                members[f"{key}.cls"] = str(10 - 4 * number).encode()
                members[f"{key}.pyd"] = b"never read"
            write_tar(folder / f"shard-{number:03d}.tar", members)
        return folder / "shard-{000..002}.tar"

    def test_shards(self, tmp_path: Path) -> None:
        pictures = opened(kind="webdataset", path=self.write(tmp_path))
        labels, classes = class_labels(pictures)
        assert classes == ["2", "6", "10"] and labels.tolist() == [2, 2, 1, 1, 0, 0]
        assert pictures.captions[::2] == [f"a {colour} square" for colour in COLOURS]
        assert [colour_of(pictures, i) for i in range(0, 6, 2)] == list(COLOURS)
        assert len(opened(kind="webdataset", path=tmp_path)) == 6
        assert len(opened(kind="webdataset", path=tmp_path / "shard-{000,002}.tar")) == 4

    def test_json_beside_the_picture(self, tmp_path: Path) -> None:
        facts = {"caption": "from json", "label": 3, "mood": "warm"}
        shard = write_tar(
            tmp_path / "a.tar", {"k.webp": encoded("red", "WEBP"), "k.json": json.dumps(facts).encode()}
        )
        (pictures,) = [opened(kind="webdataset", path=shard)]
        assert (pictures.captions, pictures.classes) == (["from json"], ["3"])
        named = opened(kind="webdataset", path=shard, label_column="mood", text_column="mood")
        assert (named.captions, named.classes) == (["warm"], ["warm"])

    def test_patterns(self) -> None:
        found = shard_paths("d{1,x}/s-{08..11}.tar")
        assert [str(path) for path in found][:3] == ["d1/s-08.tar", "d1/s-09.tar", "d1/s-10.tar"]
        assert len(found) == 8 and str(found[-1]) == "dx/s-11.tar"
        with pytest.raises(ValueError, match="counts down"):
            shard_paths("s-{4..1}.tar")
        with pytest.raises(ValueError, match="no range"):
            shard_paths("s-{a..c}.tar")

    def test_missing_damaged_and_compressed_shards_are_named(self, tmp_path: Path) -> None:
        pattern = self.write(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"shard-003\.tar"):
            opened(kind="webdataset", path=str(pattern).replace("002", "003"))
        shard = tmp_path / "shard-001.tar"
        whole = shard.read_bytes()
        flipped = bytearray(whole)
        flipped[1030] ^= 1  # in the second header, as 1300 is
        for broken in (whole[:600], whole[:1300], whole[:4700], bytes(flipped)):
            shard.write_bytes(broken)
            with pytest.raises(ValueError, match=r"shard-001\.tar is damaged"):
                opened(kind="webdataset", path=pattern)
        shard.write_bytes(gzip.compress(whole))
        with pytest.raises(ValueError, match=r"shard-001\.tar is damaged or compressed.*plain \.tar"):
            opened(kind="webdataset", path=pattern)

    def test_pictures_without_class_or_caption(self, tmp_path: Path) -> None:
        pictures = opened(kind="webdataset", path=write_tar(tmp_path / "a.tar", {"k.png": encoded("red")}))
        with pytest.raises(ValueError, match=r"1 of 1 pictures have no class.*\.cls"):
            class_labels(pictures)
        with pytest.raises(ValueError, match="no captions"):
            need_captions(pictures)

    def test_a_damaged_picture_in_a_shard(self, tmp_path: Path) -> None:
        shard = write_tar(tmp_path / "a.tar", {"bad.png": encoded("red")[:40], "good.png": encoded("blue")})
        pictures = opened(kind="webdataset", path=shard)
        assert len(pictures) == 1 and "a.tar/bad" in pictures.skipped[0]
        (tmp_path / "b.tar").write_bytes(b"")
        with pytest.raises(ValueError, match=r"b\.tar"):
            opened(kind="webdataset", path=tmp_path / "b.tar")


class TestHuggingFace:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["red", "green", "blue"]),
                "text": datasets.Value("string"),
            }
        )
        rows = {
            "image": [picture(colour) for colour in COLOURS for _ in range(2)],
            "label": [0, 0, 1, 1, 2, 2],
            "text": [f"a {colour} square" for colour in COLOURS for _ in range(2)],
        }
        datasets.disable_progress_bars()
        datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(
            tmp_path / "set"
        )
        return tmp_path / "set"

    def test_a_saved_set(self, saved: Path) -> None:
        pictures = opened(kind="huggingface", path=saved)
        labels, classes = class_labels(pictures)
        assert classes == ["red", "green", "blue"] and labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert pictures.captions[2] == "a green square"
        assert [colour_of(pictures, i) for i in (0, 2, 4)] == list(COLOURS)

    def test_columns(self, saved: Path) -> None:
        pictures = opened(kind="huggingface", path=saved, label_column="text", text_column="label")
        assert class_labels(pictures)[1] == ["a blue square", "a green square", "a red square"]
        for option in ("image_column", "label_column", "text_column"):
            with pytest.raises(ValueError, match=f"{option}: no column 'other'.*image, label, text"):
                opened(kind="huggingface", path=saved, **{option: "other"})
        with pytest.raises(ValueError, match=r"'text' of .* holds no pictures"):
            opened(kind="huggingface", path=saved, image_column="text")
        with pytest.raises(ValueError, match=r"no split 'test'.*train"):
            opened(kind="huggingface", path=saved, subset="test")

    def test_a_damaged_picture(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        images = [{"bytes": encoded("red"), "path": None}, {"bytes": b"bad", "path": None}]
        table = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
        table.save_to_disk(tmp_path / "set")
        pictures = opened(kind="huggingface", path=tmp_path / "set")
        assert len(pictures) == 1 and pictures.skipped[0].startswith("train/1")

    def test_a_folder_that_the_library_reads(self, tree: Path, tmp_path: Path, monkeypatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        pictures = opened(kind="huggingface", path=tree)
        assert len(pictures) == 12 and class_labels(pictures)[1] == ["blue", "green", "red"]

    def test_without_the_package(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(ImportError, match=r"pip install 'ditkit\[huggingface\]'"):
            opened(kind="huggingface", path=tmp_path)


def test_every_source_gives_the_same_pictures(tree: Path, tmp_path: Path) -> None:
    files = sorted(tree.rglob("*.png"))
    members = {f"{file.stem}.png": file.read_bytes() for file in files}
    members |= {f"{file.stem}.cls": file.parent.name.encode() for file in files}
    shard = write_tar(tmp_path / "a.tar", members)
    one, two = opened(kind="folder", path=tree), opened(kind="webdataset", path=shard)
    assert torch.equal(one.images(), two.images()) and one.classes == two.classes


def test_pictures_stand_upright(tmp_path: Path) -> None:
    half = np.zeros((16, 16, 3), np.uint8)
    half[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(half).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = opened(kind="folder", path=tmp_path).images()[0]
    assert image[:, :3].mean() < -0.8 and image[:, 5:].mean() > 0.8


def test_records_of_what_is_no_picture(tmp_path: Path) -> None:
    for kind in ("emoji-motion", "latents"):
        with pytest.raises(ValueError, match="needs pictures"):
            open_records(DataConfig(kind=kind, path=tmp_path))
    for kind in ("folder", "webdataset", "huggingface", "latents"):
        with pytest.raises(ValueError, match=f"{kind} needs path"):
            DataConfig(kind=kind)
