"""Pictures in WebDataset shards: .tar files whose members `key.jpg`, `key.txt`, `key.cls`, `key.json` belong
together.

Read in place: only the archives' headers and small texts are read ahead, nothing is unpacked, and members
other than these are left alone (some of the format's usual kinds can run code when read).
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

from ditkit.data.records import SUFFIXES, Record, Records

_BRACES = re.compile(r"\{([^{}]*)\}")
TEXTS = (".txt", ".cls", ".json")


def webdataset_records(
    path: str | Path, text_column: str | None = None, label_column: str | None = None
) -> Records:
    """All pictures of some shards, in their order.

    Args:
        path: a shard, a folder of shards, or a pattern such as `shard-{000..004}.tar` or `{a,b}.tar`.
        text_column: of `key.json`, for the caption where there is no `key.txt`; None: "text" or "caption".
        label_column: likewise for the class where there is no `key.cls`; None: "label" or "class".

    Raises:
        FileNotFoundError: a shard is not there, or there is no picture.
        ValueError: a shard that is damaged or compressed, or a text that can't be read; with its name.
    """
    shards = shard_paths(path)
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise FileNotFoundError(f"no shard at {', '.join(missing[:3]) or path}")
    rows = [record for shard in shards for record in _shard(shard, text_column, label_column)]
    if not rows:
        raise FileNotFoundError(f"no pictures ({', '.join(SUFFIXES)}) in {path}")
    return Records(rows)


def shard_paths(path: str | Path) -> list[Path]:
    """The shards that a path, a folder or a pattern with braces stands for.

    Raises:
        ValueError: a range that counts down or is no range.
    """
    if Path(path).is_dir():
        return sorted(Path(path).glob("*.tar"))
    text = str(path)
    choices = [_choices(match[1], text) for match in _BRACES.finditer(text)]
    fixed = _BRACES.split(text)[::2]
    return [
        Path("".join(itertools.chain(*zip(fixed, (*chosen, ""), strict=True))))
        for chosen in itertools.product(*choices)
    ]


def _choices(inside: str, pattern: str) -> list[str]:
    """What stands in one pair of braces: `000..004` counts with leading zeros, `a,b` lists."""
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if ends is None:
        if ".." in inside:
            raise ValueError(f"{pattern}: {{{inside}}} is no range of whole numbers, such as {{000..004}}")
        return inside.split(",")
    first, last = int(ends[1]), int(ends[2])
    if first > last:
        raise ValueError(f"{pattern}: {{{inside}}} counts down")
    return [f"{number:0{len(ends[1])}d}" for number in range(first, last + 1)]


def _shard(shard: Path, text_column: str | None, label_column: str | None) -> list[Record]:
    pictures: dict[str, tuple[int, int]] = {}  # key -> where its bytes begin, how many there are
    texts: dict[tuple[str, str], str] = {}  # key and suffix -> text
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                key, suffix = _split(member.name)
                if not member.isreg() or member.issparse():
                    continue
                if suffix in SUFFIXES:
                    pictures.setdefault(key, (member.offset_data, member.size))
                elif suffix in TEXTS and (stream := archive.extractfile(member)) is not None:
                    texts[key, suffix] = stream.read().decode("utf-8")
            _check_end(shard, archive.offset)
    except tarfile.ReadError as error:
        raise ValueError(
            f"shard {shard} is damaged or compressed ({error}): fetch it again, or unpack it to a plain .tar"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"shard {shard}: a text that is not UTF-8: {error}") from error
    return [_record(shard, key, place, texts, text_column, label_column) for key, place in pictures.items()]


def _check_end(shard: Path, end: int) -> None:
    """At a header that is cut short or altered tarfile stops as if the archive ended: it ends with zeros."""
    with shard.open("rb") as stream:
        stream.seek(end)
        rest = stream.read(tarfile.BLOCKSIZE)
    if any(rest) or (rest and len(rest) < tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header at byte {end}")


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: the file's name is cut at its first dot, as the format has it."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _record(
    shard: Path,
    key: str,
    place: tuple[int, int],
    texts: dict[tuple[str, str], str],
    text_column: str | None,
    label_column: str | None,
) -> Record:
    name = f"{shard.name}/{key}"
    facts: dict[str, Any] = {}
    if (key, ".json") in texts:
        try:
            facts = json.loads(texts[key, ".json"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}.json: no JSON: {error}") from error
        if not isinstance(facts, dict):
            raise ValueError(f"{name}.json: expected an object, got {type(facts).__name__}")
    caption = texts.get((key, ".txt"), _first(facts, text_column, "text", "caption"))
    label = texts.get((key, ".cls"), _first(facts, label_column, "label", "class"))
    caption = "" if caption is None else str(caption).strip()
    label = None if label is None else str(label).strip()
    return Record(name, caption, label, partial(_bytes, shard, *place))


def _first(facts: dict[str, Any], named: str | None, *usual: str) -> Any:
    return next((facts[key] for key in ((named,) if named else usual) if key in facts), None)


def _bytes(shard: Path, start: int, count: int) -> io.BytesIO:
    with shard.open("rb") as stream:
        stream.seek(start)
        return io.BytesIO(stream.read(count))
