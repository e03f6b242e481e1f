"""Latents that an autoencoder gave once, read instead of pictures; `latent_cache` writes them.

A folder of them holds `manifest.json`, and for each shard `latents-00000.safetensors` with its latents and
`latents-00000.json` with their names, captions and classes; `autoencoder/` is the autoencoder they came from.

N pictures, B batch, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors

from ditkit.data.config import DataConfig
from ditkit.data.emoji import Split, is_held_out
from ditkit.data.pictures import Pictures, open_pictures, open_records
from ditkit.data.records import Records

MANIFEST = "manifest.json"
AUTOENCODER = "autoencoder"
FORMAT = 1


class LatentCacheError(ValueError):
    """A folder of latents that is damaged, unfinished, or of something else; the message says what to do."""


class LatentSet:
    """Latents in memory, with what is known of their pictures.

    Args:
        folder: what `ditkit data cache-latents` wrote.
        split: nineteen twentieths (`"train"`), the rest (`"heldout"`) or all, as of the pictures.

    Attributes:
        captions: (N,) texts.
        classes: (N,) names, None where the data had no classes.
        class_names: the classes in the order of their labels; None where the data had no classes.
        samples: (N, C, H, W) float32, scaled as the autoencoder's config says.

    Raises:
        FileNotFoundError: no such folder, or nothing of that split in it.
        LatentCacheError: a shard that is not the one that was written, by its name.
    """

    def __init__(self, folder: Path, split: Split = "all") -> None:
        self.folder = folder
        self.facts = read_manifest(folder)
        self.class_names: list[str] | None = self.facts["class_names"]
        self.captions: list[str] = []
        self.classes: list[str | None] = []
        parts = []
        for shard in self.facts["shards"]:
            latents, rows = read_shard(folder, shard)
            keep = [
                place
                for place, name in enumerate(rows["names"])
                if split == "all" or is_held_out(name) == (split == "heldout")
            ]
            if keep:
                parts.append(latents[keep].float())
            self.captions += [rows["captions"][place] for place in keep]
            self.classes += [rows["classes"][place] for place in keep]
        if not self.captions:
            raise FileNotFoundError(f"no latents of the {split} split in {folder}")
        self.samples = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.captions)

    def are_of(self, data: DataConfig) -> bool:
        """Whether these pictures, by their names, are those that they came from.

        Raises:
            FileNotFoundError, ValueError: see `ditkit.data.pictures.open_records`.
        """
        there, here = self.facts["pictures"], facts_of(data, open_records(data))
        return all(there[name] == here[name] for name in ("count", "names_sha256"))

    def latents(self, indices: Any = slice(None)) -> torch.Tensor:
        """Latents (B, C, H, W), float32."""
        return self.samples[indices]

    @property
    def autoencoder(self) -> Path:
        """The folder of the autoencoder that they came from."""
        return self.folder / AUTOENCODER


def open_samples(data: DataConfig, split: Split | None = None) -> Pictures | LatentSet:
    """What a task that can train on latents trains on: cached ones, or pictures.

    Raises:
        FileNotFoundError, ValueError: see `LatentSet` and `open_pictures`.
    """
    if data.kind == "latents" and data.path is not None:
        return LatentSet(data.path, split or data.split)
    return open_pictures(data, split)


def facts_of(data: DataConfig, records: Records) -> dict[str, Any]:
    """What a manifest tells of the pictures, without a path of the machine on which they lay."""
    names = "\n".join(row.name for row in records.rows)
    return {
        "kind": data.kind,
        "size": data.size,
        "count": len(records),
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts on a finished folder of latents.

    Raises:
        FileNotFoundError: no such folder.
        LatentCacheError: not finished, damaged, or of another version.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of latents at {folder}")
    file = folder / MANIFEST
    if not file.is_file():
        raise LatentCacheError(
            f"{folder} has no {MANIFEST}: `ditkit data cache-latents` did not come to its end; run it again, "
            "it goes on where it stopped"
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        known = facts["format"] == FORMAT and isinstance(facts["shards"], list)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise LatentCacheError(
            f"{file} is damaged ({error!r}): run `ditkit data cache-latents` again"
        ) from error
    if not known:
        raise LatentCacheError(f"{file} is of format {facts['format']!r}, this version reads {FORMAT}")
    return facts


def read_shard(folder: Path, shard: dict[str, Any]) -> tuple[torch.Tensor, dict[str, list[Any]]]:
    """Latents (n, C, H, W) of one shard and their names, captions and classes.

    Args:
        folder: of the latents.
        shard: its entry in the manifest.

    Raises:
        LatentCacheError: it is missing, cut short or altered.
    """
    contents = []
    for suffix, digest in ((".safetensors", shard["sha256"]), (".json", shard["json_sha256"])):
        file = folder / f"{shard['name']}{suffix}"
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != digest:
            state = f"of {len(content)} bytes is not the one that was written" if content else "is missing"
            raise LatentCacheError(
                f"shard {file} {state}: run the same `ditkit data cache-latents` again, which makes that "
                "shard anew and keeps the others"
            )
        contents.append(content)
    return safetensors.load(contents[0])["latents"], json.loads(contents[1])["rows"]
