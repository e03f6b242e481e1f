"""What training reads may be anything: it is refused in words, runs nothing, hangs nowhere, fills no memory.

`DITKIT_CASES=10000` draws so many damaged files of each kind; a thousand otherwise.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ditkit import registry
from ditkit.data.folder import folder_records
from ditkit.data.latents import LatentCacheError, read_manifest
from ditkit.data.pictures import open_pictures
from ditkit.data.records import PictureError, Record
from ditkit.data.webdataset import webdataset_records
from ditkit.models.convert import ConversionError
from ditkit.models.weight_files import read_weights
from ditkit.training import checkpoint as ckpt
from ditkit.training.config import ConfigError, RunConfig, load
from training.conftest import TINY_DIT

CASES = int(os.environ.get("DITKIT_CASES", "1000"))
LONGEST = 1.0  # seconds of processor time for a file of a few hundred bytes
MOST = 64 * 2**20  # bytes for all of them: far below what a header can claim
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def altered(chance: random.Random, data: bytes) -> bytes:
    """A few bytes changed, taken out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(changed)) if changed else 0
        kind = chance.randrange(4)
        if kind == 0 and changed:
            changed[place] = chance.randrange(256)
        elif kind == 1:
            del changed[place : place + chance.randint(1, 9)]
        elif kind == 2:
            changed[place:place] = changed[place : place + chance.randint(1, 9)]
        else:
            del changed[len(changed) - min(chance.randrange(30), len(changed)) :]
    return bytes(changed)


def refused(
    cases: int,
    make: Callable[[random.Random], Any],
    read: Callable[[Any], Any],
    kinds: Any,
    most: float = MOST,
) -> int:
    """Read so many cases, in little time and `most` bytes; whatever is raised is of `kinds`. How many were
    refused."""
    count, before = 0, 0
    for number in range(cases):
        case, started = make(random.Random(number)), time.process_time()
        try:
            read(case)
        except kinds:
            count += 1
        if number:  # at the first, modules are imported
            assert time.process_time() - started < LONGEST, f"case {number}: {case!r}"
        else:
            before = most_memory(anew=True)
    assert most_memory() - before < most
    return count


def most_memory(anew: bool = False) -> int:
    """The most bytes that were resident, since it was last asked for `anew`; 0 where Linux does not tell."""
    try:
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def test_safetensors_headers(tmp_path):
    """Those of a checkpoint's parts and of weights to convert."""
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.rand(3, 2), "b": torch.arange(4)}, whole)
    data, file = whole.read_bytes(), tmp_path / "case.safetensors"
    length = 8 + struct.unpack("<Q", data[:8])[0]

    def make(chance: random.Random) -> bytes:
        if chance.random() < 0.2:  # a header of another length
            return struct.pack("<Q", chance.choice([0, 1, 7, length, 2**20, 2**63])) + data[8:]
        return altered(chance, data[:length]) + data[length:]

    def read(case: bytes) -> None:
        file.write_bytes(case)
        read_weights(file, "ema")

    assert refused(CASES, make, read, ConversionError) > CASES // 2
    with pytest.raises(SafetensorError), safe_open(file, framework="pt"):  # the last one, by the library
        pass


def test_checkpoints(tmp_path):
    path = ckpt.write(tmp_path, ckpt.Checkpoint(1, {"model": {"w": torch.rand(5)}}, {"x": 1}), keep=1)
    state = (path / "state.json").read_bytes()

    def read(case: bytes) -> None:
        (path / "state.json").write_bytes(case)
        ckpt.read(path)

    count = refused(CASES, lambda chance: altered(chance, state), read, ValueError)
    assert count > 0.95 * CASES
    for record in ([], 3, None, {"sha256": 5}, {"sha256": {"../../x": "0"}, "step": 1, "state": {}}):
        with pytest.raises(ValueError):
            read(json.dumps(record).encode())
    with pytest.raises(ValueError, match="RecursionError"):
        read(b"[" * 100_000)


def test_training_files(tmp_path):
    """Characters of a good file, and values of any kind at any of its keys."""
    file, good = tmp_path / "case.yaml", {**TINY_DIT, "output": "runs/x"}
    text = yaml.safe_dump(good).encode()
    odd = [
        None,
        -1,
        0,
        10**30,
        float("nan"),
        float("inf"),
        "",
        "x" * 99,
        [],
        {},
        [[]],
        {"a": {}},
        True,
        "!!x",
        1.5,
    ]
    keys = [*RunConfig.model_fields, "output", "stages", "nonsense"]
    registry.entries("objective")  # else the first file that names one imports them all

    def make(chance: random.Random) -> bytes:
        if chance.random() < 0.5:
            return altered(chance, text)
        return yaml.safe_dump({**good, chance.choice(keys): chance.choice(odd)}).encode()

    def read(case: bytes) -> None:
        file.write_bytes(case)
        load(file)

    assert refused(CASES, make, read, ConfigError) > CASES // 3


def test_yaml_that_grows_is_not_unfolded(tmp_path):
    """Nine references to nine references, nine deep: a billion where someone copies them."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="no such key"):
        load(file)


@pytest.mark.parametrize(
    "line",
    [
        "!!python/object/apply:os.mkdir ['CANARY']",
        "!!python/object/new:os.mkdir ['CANARY']",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['CANARY']]",
    ],
)
def test_yaml_tags_run_nothing(tmp_path, line):
    canary, file = tmp_path / "canary", tmp_path / "evil.yaml"
    file.write_text(line.replace("CANARY", str(canary)))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(file)
    with pytest.raises(ConfigError):
        load(write_good(tmp_path), [f"seed={line.partition(': ')[2] or line}".replace("CANARY", str(canary))])
    assert not canary.exists()


def write_good(folder: Path) -> Path:
    file = folder / "good.yaml"
    file.write_text(yaml.safe_dump({**TINY_DIT, "output": "runs/x"}))
    return file


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", ["pt", "ckpt", "pth", "bin", "npy", "joblib", "safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_run_nothing(tmp_path, suffix, zipped):
    """Wherever weights, pictures or latents are read."""
    canary, file = tmp_path / "canary", tmp_path / f"evil.{suffix}"
    if suffix == "npy":
        np.save(file, np.array([Touch(canary)], dtype=object))
    else:
        torch.save({"model": Touch(canary)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError):
        read_weights(file, "ema")
    picture = tmp_path / "pictures" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(file.read_bytes())
    with pytest.raises(PictureError):
        folder_records(picture.parent).rows[0].pixels(8)
    (tmp_path / "manifest.json").write_bytes(file.read_bytes())
    with pytest.raises(LatentCacheError):
        read_manifest(tmp_path)
    assert not canary.exists()
    call, arguments = Touch(canary).__reduce__()
    call(*arguments)
    assert canary.exists()  # had anything unpickled it


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "BMP"])
def test_pictures(kind):
    """One that can't be read is named; nothing else is raised."""
    data = encoded(kind)

    def read(case: bytes) -> None:
        pixels = Record("some.png", "", None, lambda: io.BytesIO(case)).pixels(8)
        assert pixels.shape == (8, 8, 3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A picture unfolds to what its header says, up to the number at which Pillow refuses it.
        most = 2 * 4 * 2 * (Image.MAX_IMAGE_PIXELS or 0)
        assert refused(CASES, lambda chance: altered(chance, data), read, PictureError, most) > CASES // 20


def test_a_picture_that_claims_to_be_huge():
    """60,000 x 60,000 pixels in 80 bytes: 10 GB unfolded."""
    chunk = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", chunk), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b""))
    )
    with pytest.raises(PictureError, match=r"some\.png: DecompressionBomb"):
        Record("some.png", "", None, lambda: io.BytesIO(data)).pixels(8)


def picture_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded("PNG"))
    return folder


TABLES = {
    "jsonl": json.dumps({"file_name": "a.png", "text": "a sheep", "kind": "animal"}),
    "csv": 'file_name,text,kind\na.png,"a sheep, shorn",animal\nb.png,"a ""b""",none\n',
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_beside_pictures(tmp_path, kind):
    folder = picture_folder(tmp_path / "pictures")

    def read(case: bytes) -> None:
        (folder / f"metadata.{kind}").write_bytes(case)
        folder_records(folder, label_column="kind")

    read(f"{TABLES[kind]}\n".replace("sheep", "\u2028sheep").encode())  # no end of a line
    good = TABLES[kind].encode()
    assert refused(CASES, lambda chance: altered(chance, good), read, ValueError) > CASES // 4
    for odd in (b"[" * 100_000, b"\0", b'"' + b"x" * 200_000, b"\xff", b"file_name\n" * 3 + b'"'):
        with pytest.raises(ValueError, match=rf"metadata\.{kind}"):
            read(odd)


def test_manifests_of_latents(tmp_path):
    manifest = json.dumps({"format": 1, "shards": [{"name": "latents-00000", "sha256": "0"}]}).encode()

    def read(case: bytes) -> None:
        (tmp_path / "manifest.json").write_bytes(case)
        read_manifest(tmp_path)

    assert refused(CASES, lambda chance: altered(chance, manifest), read, LatentCacheError) > CASES // 4
    with pytest.raises(LatentCacheError, match="damaged"):
        read(b"[" * 100_000)


def test_shards(tmp_path):
    """A .tar of two pictures with a text and a JSON beside them; mostly its headers are altered."""
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        for name, data in {
            "a.png": encoded("PNG"),
            "a.txt": b"a sheep",
            "b.png": encoded("PNG"),
            "b.json": b'{"text": "b"}',
        }.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(data)
            archive.addfile(facts, io.BytesIO(data))
    whole = shard.read_bytes()[: 10 * 512]
    headers = [place for place in range(0, len(whole), 512) if whole[place + 257 : place + 262] == b"ustar"]

    def make(chance: random.Random) -> bytes:
        if chance.random() < 0.3:
            return altered(chance, whole)
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            changed[chance.choice(headers) + chance.randrange(512)] = chance.randrange(256)
        return bytes(changed)

    def read(case: bytes) -> None:
        shard.write_bytes(case)
        for record in webdataset_records(shard).rows:
            record.pixels(8)

    kinds = (ValueError, FileNotFoundError)  # the latter: no picture is left
    assert refused(CASES, make, read, kinds) > CASES // 4


def test_a_few_damaged_pictures_among_thousands(tmp_path, caplog):
    """They are left out, counted and named."""
    from ditkit.data.config import DataConfig

    good = encoded("PNG")
    for number in range(3000):
        (tmp_path / f"{number:04d}.png").write_bytes(good)
    bad = {"0007.png": good[:40], "1500.png": b"", "2999.png": b"no picture at all"}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    pictures: Any = open_pictures(DataConfig(kind="folder", path=tmp_path, size=8, split="all"))
    assert len(pictures) == 2997
    assert "left out 3 of 3000 pictures" in caplog.text and all(name in caplog.text for name in bad)
    assert [reason.partition(":")[0] for reason in pictures.skipped] == list(bad)
