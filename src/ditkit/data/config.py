"""Which data a run uses, as validated sections of a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Keys of a file; one that is not known is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DataConfig(Section):
    """Which pictures. `every: {tone: 4}` shows a quarter of that group in each epoch, in turn."""

    kind: Literal["emoji", "folder"] = "emoji"
    path: Path | None = None
    size: int = Field(default=64, ge=8)
    split: Literal["all", "train", "heldout"] = "train"
    groups: list[str] | None = None
    every: dict[str, int] = {}

    @model_validator(mode="after")
    def _folder_has_path(self) -> DataConfig:
        if self.kind == "folder" and self.path is None:
            raise ValueError("kind: folder needs path")
        return self
