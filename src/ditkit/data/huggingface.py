"""Pictures of a data set of Hugging Face's `datasets`: saved on disk, or of the hub."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

from ditkit.data.records import Record, Records


def huggingface_records(
    path: str | Path,
    subset: str = "train",
    image_column: str = "image",
    text_column: str | None = None,
    label_column: str | None = None,
) -> Records:
    """The pictures of a data set, in its order. No code of a repository is run.

    Args:
        path: a folder that `save_to_disk` wrote, a folder that `load_dataset` reads, or `owner/name`.
        subset: which of its splits.
        image_column: where the pictures are.
        text_column: where the captions are; None: "text" or "caption" where there is one.
        label_column: where the classes are; None: "label" where there is one.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: no such data set.
        ValueError: no such split, no such column, or a column without pictures.
    """
    table = _open(path, subset)
    columns = table.column_names
    for option, column in (
        ("image_column", image_column),
        ("text_column", text_column),
        ("label_column", label_column),
    ):
        if column is not None and column not in columns:
            raise ValueError(f"data.{option}: no column {column!r} in {path}; it has {', '.join(columns)}")
    text_column = text_column or next((name for name in ("text", "caption") if name in columns), None)
    label_column = label_column or ("label" if "label" in columns else None)

    from datasets import Image

    if not isinstance(table.features[image_column], Image):
        kind = type(table.features[image_column]).__name__
        raise ValueError(f"data.image_column: {image_column!r} of {path} holds no pictures, it is a {kind}")
    names = getattr(table.features[label_column], "names", None) if label_column else None
    captions = list(table[text_column]) if text_column else None
    labels = list(table[label_column]) if label_column else None
    pictures = table.select_columns([image_column]).cast_column(image_column, Image(decode=False))

    def label(index: int) -> str | None:
        if labels is None or labels[index] is None:
            return None
        return names[labels[index]] if names and isinstance(labels[index], int) else str(labels[index])

    rows = [
        Record(
            f"{subset}/{index}",
            "" if captions is None or captions[index] is None else str(captions[index]).strip(),
            label(index),
            partial(_bytes, pictures, index, image_column),
        )
        for index in range(len(table))
    ]
    return Records(rows, list(names) if names else None)


def _open(path: str | Path, subset: str) -> Any:
    """One split of the data set, a `datasets.Dataset`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "data.kind: huggingface needs the package datasets: pip install 'ditkit[huggingface]'"
        ) from error
    folder = Path(path)
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    found: Any = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(folder.as_posix())
    if isinstance(found, datasets.Dataset):
        return found
    if subset not in found:
        raise ValueError(f"data.subset: no split {subset!r} in {path}; there are {', '.join(found)}")
    return found[subset]


def _bytes(pictures: Any, index: int, column: str) -> Any:
    picture = pictures[index][column]
    return io.BytesIO(picture["bytes"]) if picture["bytes"] is not None else Path(picture["path"]).open("rb")
