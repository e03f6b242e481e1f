"""Captioned clips by index, from what a training file names."""

from __future__ import annotations

from ditkit.data.config import DataConfig
from ditkit.data.emoji_motion import EmojiMotion


def open_clips(data: DataConfig, seed: int) -> EmojiMotion:
    """The clips that a training file names.

    Raises:
        ValueError: the file names pictures.
    """
    if data.kind != "emoji-motion":
        raise ValueError(f"data.kind: this task needs clips, emoji-motion (got {data.kind!r})")
    return EmojiMotion(data.motion, data.size, seed)
