"""What a fit trains on, prepared once and kept on disk: clean latents and what the transformer is told.

N samples, B batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditkit.analysis.sampling import Sampling, call_arguments
from ditkit.files import whole_file
from ditkit.fitting.errors import FittingError
from ditkit.fitting.recording import FirstStep, first_step
from ditkit.fitting.run import PROGRESS, FitData, Progress

FILE = "samples.safetensors"


@dataclass
class Samples:
    """Clean latents and the transformer's other arguments.

    Args:
        latents: (N, ...) in the shape that the transformer takes.
        shared: arguments that are the same for every sample.
        rows: for each sample, its arguments with a batch dimension of one.
        divisor: timestep of the scheduler / timestep of the transformer.
        sign: of the transformer's output on its way to the scheduler.
    """

    latents: Tensor
    shared: dict[str, Any]
    rows: list[dict[str, Any]]
    divisor: float = 1.0
    sign: float = 1.0
    _groups: list[Any] = field(init=False, repr=False, default_factory=list)

    def __len__(self) -> int:
        return len(self.latents)

    def arguments(self, indices: Tensor) -> dict[str, Any]:
        """Keyword arguments for a batch of samples (B,), without sample and timestep.

        Raises:
            FittingError: their texts differ in length.
        """
        rows = [self.rows[i] for i in indices.tolist()]
        try:
            return self.shared | {name: _join([row[name] for row in rows]) for name in rows[0]}
        except RuntimeError as error:
            raise FittingError(f"samples whose arguments differ in shape can't be one batch ({error}); "
                               "set batch=1") from error  # fmt: skip


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, list):
        return [item for value in values for item in value]
    if isinstance(first, tuple):
        return tuple(_join(list(items)) for items in zip(*values, strict=True))
    return first


def prepare(
    pipe: Any, data: FitData, count: int, folder: Path, progress: Progress, *, steps: int = 28, seed: int = 0
) -> Samples:
    """The samples of the first `count` prompts; read from the folder of an earlier start where it has them.

    Args:
        steps: of the pipeline, when it draws its own pictures.
        seed: own picture i starts from the noise of `seed + i`.
    """
    file = folder / PROGRESS / FILE
    if file.is_file():
        return _read(file)
    prompts = [data.prompts[i % len(data.prompts)] for i in range(count)]
    # What has a row for each sample shows when there are two of them.
    one, two = first_step(pipe, prompts[:1]), first_step(pipe, [prompts[0]] * 2)
    batched = {name for name, value in one.arguments.items() if _differs(value, two.arguments[name])}
    rows = []
    for done, prompt in enumerate(prompts):
        progress("reading prompts", done, count)
        step = first_step(pipe, [prompt])
        rows.append({name: step.arguments[name] for name in batched})
    if data.source == "emoji":
        latents = encode_emoji(pipe, prompts, one.shape)
    else:
        latents = draw(pipe, prompts, one, progress, steps=steps, seed=seed)
    shared = {name: value for name, value in one.arguments.items() if name not in batched}
    samples = Samples(latents, shared, rows, one.divisor, one.sign)
    keep(folder, samples)
    return samples


def _differs(one: Any, two: Any) -> bool:
    """Has the argument a row for each sample?"""
    if isinstance(one, Tensor):
        return one.shape != two.shape
    if isinstance(one, list):
        return len(one) != len(two)
    if isinstance(one, tuple):
        return any(_differs(a, b) for a, b in zip(one, two, strict=True))
    return False


def draw(
    pipe: Any, prompts: Sequence[str], seen: FirstStep, progress: Progress, *, steps: int = 28, seed: int = 0,
    batch: int = 8,
) -> Tensor:  # fmt: skip
    """The latents (N, ...) that the pipeline draws for prompts, with its own guidance."""
    parts = []
    for first in range(0, len(prompts), batch):
        progress("drawing own samples", first, len(prompts))
        texts = list(prompts[first : first + batch])
        last: dict[str, Tensor] = {}

        def after(_: Any, index: int, time: Any, tensors: dict[str, Any], last: Any = last) -> dict[str, Any]:
            last["latents"] = tensors["latents"]
            return {}

        pipe(
            prompt=texts,
            generator=[torch.Generator("cpu").manual_seed(seed + first + i) for i in range(len(texts))],
            output_type="latent",
            callback_on_step_end=after,
            callback_on_step_end_tensor_inputs=["latents"],
            **call_arguments(pipe, Sampling(steps=steps), len(texts)),
        )
        parts.append(last["latents"].detach().cpu())
    latents = torch.cat(parts)
    if tuple(latents.shape[1:]) != seen.shape:
        drawn = tuple(latents.shape[1:])
        raise FittingError(f"{type(pipe).__name__} draws latents {drawn}, its transformer takes {seen.shape}")
    return latents


@torch.no_grad()
def encode_emoji(pipe: Any, captions: Sequence[str], shape: tuple[int, ...]) -> Tensor:
    """Latents (N, ...) of the emoji with these captions.

    Raises:
        FittingError: the pipeline's autoencoder is not one for pictures, or its latents are packed in a way
            that this does not know.
    """
    from ditkit.data.emoji import EmojiDataset

    vae, pictures = pipe.vae, EmojiDataset()
    scale = getattr(vae.config, "scaling_factor", None)
    if scale is None:
        raise FittingError(
            f"{type(vae).__name__} is no autoencoder for pictures; use the model's own samples"
        )
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    parts = []
    try:
        indices = [pictures.find(caption) for caption in captions]
    except KeyError as error:
        raise FittingError(
            f"{error.args[0]}: with emoji pictures the prompts are captions of the set"
        ) from None
    for chunk in torch.tensor(indices).split(64):
        images = pictures.images(chunk.numpy()).to(vae.device, vae.dtype)
        latents = (vae.encode(images).latent_dist.mean - shift) * scale
        if latents.shape[1:] != torch.Size(shape) and hasattr(pipe, "_pack_latents"):
            latents = pipe._pack_latents(latents, *latents.shape)
        parts.append(latents.cpu())
    found = torch.cat(parts)
    if tuple(found.shape[1:]) != shape:
        raise FittingError(
            f"the emoji pictures give latents {tuple(found.shape[1:])}, the transformer draws {shape}; "
            "use the model's own samples"
        )
    return found


# On disk: tensors by their path, everything else as JSON in the file's metadata.


def keep(folder: Path, samples: Samples) -> None:
    """Lay samples where `prepare` finds them."""
    tensors: dict[str, Tensor] = {"latents": samples.latents.contiguous()}
    facts = {
        "shared": _pack(samples.shared, "shared", tensors),
        "rows": [_pack(row, f"rows.{i}", tensors) for i, row in enumerate(samples.rows)],
        "divisor": samples.divisor,
        "sign": samples.sign,
    }
    with whole_file(folder / PROGRESS / FILE) as part:
        save_file(tensors, part, metadata={"facts": json.dumps(facts)})


def _read(file: Path) -> Samples:
    with safe_open(file, framework="pt") as source:
        facts = json.loads(source.metadata()["facts"])
        tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
    return Samples(
        tensors["latents"],
        _unpack(facts["shared"], tensors),
        [_unpack(row, tensors) for row in facts["rows"]],
        facts["divisor"],
        facts["sign"],
    )


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, f"{path}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise FittingError(f"the transformer's argument {path} is a {type(value).__name__}, which can't be kept")


def _unpack(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content.items()}
    if kind in ("tuple", "list"):
        items = [_unpack(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
