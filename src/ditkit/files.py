"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it on success: a reader never sees half a file.

    The temporary name keeps the suffix, by which Pillow and others choose the format. The folder of `path`
    is made when it is not there; when the body raises, `path` is as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=".ditkit-"))
    try:
        part = folder / path.name
        yield part
        os.replace(part, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)
