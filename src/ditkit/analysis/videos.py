"""Clips to files: H.264 through PyAV, GIF through Pillow."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from ditkit.analysis.pictures import to_image
from ditkit.files import whole_file

CLIPS = (".mp4", ".gif")
RATE = 8
"""Frames a second."""


def save_clip(clip: np.ndarray, path: str | os.PathLike[str], rate: int = RATE) -> Path:
    """Write a clip (F, H, W, 3) in [0, 1], whole or not at all; the suffix chooses the format.

    Raises:
        ValueError: a suffix that is not in `CLIPS`.
        ImportError: MP4 without PyAV.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in CLIPS:
        raise ValueError(f"{path}: a clip's name has to end in {' or '.join(CLIPS)}")
    with whole_file(path) as part:
        if suffix == ".gif":
            part.write_bytes(gif(clip, rate))
        else:
            _mp4(clip, part, rate)
    return Path(path)


def gif(clip: np.ndarray, rate: int = RATE) -> bytes:
    """A clip (F, H, W, 3) in [0, 1] as a GIF that repeats for ever."""
    stream = io.BytesIO()
    first, *others = [to_image(frame) for frame in clip]
    first.save(stream, format="GIF", save_all=True, append_images=others, duration=1000 // rate, loop=0)
    return stream.getvalue()


def wall(clips: np.ndarray, columns: int = 10) -> np.ndarray:
    """Clips (B, F, H, W, 3) beside and below each other as one clip, white where there is none."""
    count, frames, height, width, _ = clips.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    page = np.ones((frames, rows * height, columns * width, 3), clips.dtype)
    for place, clip in enumerate(clips):
        y, x = divmod(place, columns)
        page[:, y * height : (y + 1) * height, x * width : (x + 1) * width] = clip
    return page


def _mp4(clip: np.ndarray, path: Path, rate: int) -> None:
    try:
        import av
    except ImportError:
        raise ImportError("MP4 files need PyAV: pip install av, or write a .gif") from None
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"crf": "16"})
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in clip:
            picture = av.VideoFrame.from_image(to_image(frame))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
