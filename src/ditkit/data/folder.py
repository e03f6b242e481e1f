"""A folder of picture files: classes from sub-folders, captions from a metadata file or from text files.

The metadata file is that of Hugging Face's imagefolder: `metadata.jsonl` or `metadata.csv` with the column
`file_name`, relative to where it lies, and columns for the text and the class.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ditkit.data.records import SUFFIXES, Record, Records, log, name_as_text

METADATA = ("metadata.jsonl", "metadata.csv")


def folder_records(folder: Path, text_column: str | None = None, label_column: str | None = None) -> Records:
    """All pictures under a folder, sorted by path.

    A picture's caption is that of its metadata row, else the text of the `.txt` file beside it, else its file
    name. Its class is that of its metadata row where `label_column` names one, else the folder it lies in.

    Args:
        folder: where to look, at any depth.
        text_column: of the metadata; None: "text".
        label_column: of the metadata; None: the class is the folder.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
        ValueError: a metadata file that can't be read, with the line.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of pictures at {folder}")
    files = list(tqdm(_files(str(folder)), desc="listing pictures", unit="picture", delay=2))
    if not files:
        raise FileNotFoundError(f"no pictures ({', '.join(SUFFIXES)}) under {folder}")
    rows = _metadata(folder, label_column)
    if rows and (missing := sorted(set(rows) - set(files))):
        log.warning("metadata names %d files that are not there: %s", len(missing), "; ".join(missing[:5]))
    return Records([_record(file, folder, rows.get(file, {}), text_column, label_column) for file in files])


def _files(folder: str) -> Iterator[str]:
    """The paths of the pictures under a folder in order; texts, of which a hundred thousand take little."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
            yield entry.path


def _record(
    file: str, folder: Path, row: dict[str, Any], text_column: str | None, label_column: str | None
) -> Record:
    path = Path(file)
    caption = row.get(text_column or "text")
    if caption is None:
        beside = path.with_suffix(".txt")
        caption = _text(beside) if beside.is_file() else name_as_text(path.name)
    label = row.get(label_column) if label_column else None
    name = path.relative_to(folder).as_posix()
    return Record(
        name,
        str(caption).strip(),
        sys.intern(path.parent.name) if label is None else str(label),
        partial(open, file, "rb"),
    )


def _metadata(folder: Path, label_column: str | None) -> dict[str, dict[str, Any]]:
    """The rows of all metadata files, by the picture they tell of."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(path for name in METADATA for path in folder.rglob(name)):
        read = _read_jsonl if file.suffix == ".jsonl" else _read_csv
        for line, row in read(file):
            if not row.get("file_name"):
                raise ValueError(
                    f"{file}, line {line}: no file_name; it has {', '.join(map(str, row)) or 'nothing'}"
                )
            if label_column and label_column not in row:
                raise ValueError(
                    f"{file}, line {line}: no column {label_column!r} (data.label_column); "
                    f"it has {', '.join(map(str, row))}"
                )
            found[str(file.parent / str(row["file_name"]))] = row
    if label_column and not found:
        raise ValueError(
            f"data.label_column={label_column!r}: there is no {' or '.join(METADATA)} under {folder}; "
            "without it classes are the sub-folders"
        )
    return found


def _text(file: Path, encoding: str = "utf-8") -> str:
    try:
        return file.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text in UTF-8: {error}") from error


def _read_jsonl(file: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: expected an object, got {type(row).__name__}")
        rows.append((number, row))
    return rows


def _read_csv(file: Path) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(file, "utf-8-sig"), newline=""))
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: no CSV: {error}") from error
