"""Encode pictures once, so that training in latents needs neither them nor the encoder.

Shard i holds the pictures i S to (i + 1) S - 1 of the data, S the shard's size, less those that can't be
read. A shard is done when its JSON file is there, which is written last; what is done is kept when the work
stops and starts again. The format is told in `latents`.

B batch, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ditkit.data.config import DataConfig
from ditkit.data.latents import AUTOENCODER, FORMAT, MANIFEST, LatentCacheError, facts_of
from ditkit.data.pictures import classes_of, open_records
from ditkit.data.records import Records, Unreadable, to_tensor
from ditkit.files import whole_file, write_text
from ditkit.models import autoencoder_class
from ditkit.training.tasks.latents import encode_pictures

PLAN = "plan.json"
AUTOENCODERS = ("AutoencoderKL", "RepresentationAutoencoder")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class CacheOptions:
    """How latents are kept.

    Args:
        shard_size: pictures of a shard.
        batch: pictures that are encoded together.
        dtype: of the stored latents.

    Raises:
        ValueError: a size below 1, or another dtype.
    """

    shard_size: int = 1024
    batch: int = 16
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value in (("shard_size", self.shard_size), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 is needed")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: one of {', '.join(DTYPES)}")


def cache_latents(
    data: DataConfig, autoencoder: Path, out: Path, options: CacheOptions | None = None
) -> Path:
    """Encode all pictures of a data set, whatever its split; training chooses the split.

    Args:
        data: which pictures.
        autoencoder: folder of one of `AUTOENCODERS`; a copy of it is kept beside the latents.
        out: where to; the same call goes on where an earlier one stopped, and mends damaged shards.
        options: how latents are kept.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: no pictures, or no autoencoder.
        LatentCacheError: `out` holds latents of something else.
        PictureError: a picture can't be read and `data.on_error` is "raise", or none can.
    """
    options = options or CacheOptions()
    records = open_records(data)
    network = _open(autoencoder)
    plan = _plan(data, records, network, options)
    _same_plan(out, plan)
    write_text(out / PLAN, json.dumps(plan, indent=1) + "\n")
    network.save_pretrained(out / AUTOENCODER)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    shards, unreadable = [], Unreadable(data.on_error)
    with tqdm(total=len(records), desc="encoding", unit="picture") as bar:
        for start in range(0, len(records), options.shard_size):
            rows = records.rows[start : start + options.shard_size]
            name = f"latents-{len(shards):05d}"
            if (done := _finished(out, name)) is None:
                done = _encode_shard(out, name, Records(rows), network, data.size, options, unreadable)
            shards.append(done)
            bar.update(len(rows))
    unreadable.report(len(records))
    classes = [label for shard in shards for label in shard.pop("classes")]
    manifest = {
        **plan,
        "count": sum(shard["count"] for shard in shards),
        "class_names": None if None in classes else records.class_names or classes_of(classes),
        "shards": shards,
    }
    write_text(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return out


def _open(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no autoencoder at {folder}: it has no config.json")
    try:
        cls = autoencoder_class(folder)
    except ValueError as error:
        raise LatentCacheError(str(error)) from error
    if cls.__name__ not in AUTOENCODERS:
        raise LatentCacheError(
            f"{folder} is a {cls.__name__}; latents of pictures need an {' or '.join(AUTOENCODERS)}"
        )
    network: Any = cls.from_pretrained(folder, use_safetensors=True)
    network.register_to_config(_name_or_path="")  # no folder of a machine in the copy
    return network.eval().requires_grad_(False)


def _plan(data: DataConfig, records: Records, network: Any, options: CacheOptions) -> dict[str, Any]:
    """What the latents depend on; equal plans give equal shards."""
    config = {key: value for key, value in sorted(network.config.items()) if not key.startswith("_")}
    return {
        "format": FORMAT,
        "pictures": facts_of(data, records),
        "autoencoder": {
            "class": type(network).__name__,
            "config_sha256": _digest(json.dumps(config, default=str).encode()),
            "weights_sha256": weights_digest(network),
            "scaling_factor": network.config.scaling_factor,
            "shift_factor": network.config.shift_factor,
        },
        "dtype": options.dtype,
        "shard_size": options.shard_size,
    }


def weights_digest(network: Any) -> str:
    """The SHA-256 of an autoencoder's weights and their names."""
    weights = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.float().cpu().contiguous().numpy().tobytes())
    return weights.hexdigest()


def _same_plan(out: Path, plan: dict[str, Any]) -> None:
    """Refuse a folder that holds other latents."""
    if not (out / PLAN).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise LatentCacheError(f"{out} holds other files: choose another --out")
        return
    try:
        found = json.loads((out / PLAN).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LatentCacheError(f"{out / PLAN} is damaged ({error}): choose another --out") from error
    unlike = [name for name in plan if found.get(name) != plan[name]]
    if unlike:
        there, here = ({name: facts.get(name) for name in unlike} for facts in (found, plan))
        raise LatentCacheError(f"{out} holds other latents ({there}, now {here}): choose another --out")


def _encode_shard(
    out: Path,
    name: str,
    records: Records,
    network: Any,
    size: int,
    options: CacheOptions,
    unreadable: Unreadable,
) -> dict[str, Any]:
    """Write one shard; its entry in the manifest, with the classes of its pictures."""
    found = list(unreadable.read(records.rows, size))
    parts = []
    for start in range(0, len(found), options.batch):
        pixels = np.stack([picture for _, picture in found[start : start + options.batch]])
        parts.append(encode_pictures(network, to_tensor(pixels).to(network.device)).cpu())
    latents = torch.cat(parts) if parts else torch.empty(0, 1, 1, 1)
    latents = latents.to(getattr(torch, options.dtype)).contiguous()
    with whole_file(out / f"{name}.safetensors") as part:
        save_file({"latents": latents}, part)
        digest = _digest(part.read_bytes())
    rows = {
        "names": [row.name for row, _ in found],
        "captions": [row.caption for row, _ in found],
        "classes": [row.label for row, _ in found],
    }
    facts = {"sha256": digest, "rows_sha256": _digest(json.dumps(rows).encode()), "rows": rows}
    write_text(out / f"{name}.json", json.dumps(facts) + "\n")
    done = _finished(out, name)
    if done is None:
        raise OSError(f"shard {out / name} is not what was written to it: check the disk")
    return done


def _finished(out: Path, name: str) -> dict[str, Any] | None:
    """The manifest's entry of a shard that is done and whole."""
    try:
        content = (out / f"{name}.json").read_bytes()
        facts = json.loads(content)
        rows, digest = facts["rows"], _digest((out / f"{name}.safetensors").read_bytes())
        if facts["sha256"] != digest or facts["rows_sha256"] != _digest(json.dumps(rows).encode()):
            return None
        return {
            "name": name,
            "count": len(rows["names"]),
            "sha256": digest,
            "json_sha256": _digest(content),
            "classes": rows["classes"],
        }
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
