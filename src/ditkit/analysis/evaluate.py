"""How often the bundled pipeline draws what it was asked for.

Pictures are compared as 24 x 24 RGB pixels (area average, Euclidean distance). The measure suits a closed
set of drawings on white: it sees colour and layout and not the fine texture that the autoencoder loses. How
well it tells the set apart is measured with every result: `ceiling` is the share of the same captions whose
true picture, sent through the autoencoder and back, is still nearest to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from ditkit.analysis.drawing import resized
from ditkit.analysis.sampling import Sampling, sample
from ditkit.data.emoji import GROUPS, EmojiDataset
from ditkit.data.pictures import grid

FEATURE_SIZE = 24
UNSEEN = (
    "red dog", "blue apple", "green heart with arrow", "purple cat face", "yellow car", "black star",
    "white rabbit", "orange butterfly", "blue rose", "green apple with face", "cat astronaut",
    "dog with party hat", "flag of the moon", "smiling sun with sunglasses", "woman robot", "snow dragon",
)  # fmt: skip
"""Captions that are not in the set, of words that are."""


def features(images: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in any range -> (B, 3 * 24 * 24)."""
    return F.interpolate(images.float(), size=FEATURE_SIZE, mode="area").flatten(1)


class Judge:
    """Finds the picture of the set that is nearest to a drawn one.

    Calling it as `judge(pictures, prompts)` gives the share of pictures (B, H, W, 3) in [0, 1] whose nearest
    one has the prompted caption; prompts that are no caption of the set are left out (nan when all are).
    """

    def __init__(self, dataset: EmojiDataset | None = None) -> None:
        self.dataset = dataset or EmojiDataset()
        chunks = np.array_split(np.arange(len(self.dataset)), max(1, len(self.dataset) // 256))
        self._known = torch.cat([features(self.dataset.images(chunk)) for chunk in chunks])  # (N, F)

    def nearest(self, images: torch.Tensor) -> torch.Tensor:
        """Index in the set of the nearest picture: images (B, 3, H, W) in [-1, 1] -> (B,)."""
        return torch.cdist(features(images), self._known).argmin(1)

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str]) -> float:
        images = torch.from_numpy(np.asarray(pictures)).permute(0, 3, 1, 2) * 2 - 1
        found = [self.dataset.captions[i] for i in self.nearest(images)]
        known = set(self.dataset.captions)
        scored = [a == b.lower() for a, b in zip(found, prompts, strict=True) if b.lower() in known]
        return float(np.mean(scored)) if scored else float("nan")


@dataclass
class Evaluation:
    """What was drawn for captions of the set.

    Args:
        accuracy: share of captions whose picture is nearest to the prompted one.
        ceiling: the same for the true pictures after the autoencoder, or at the size that is drawn where
            there is none: no transformer can do better.
        by_group: group -> (right, asked).
        wrong: (caption, caption of the nearest picture) of the others.
        seconds: of all generations together.
        pictures: what was drawn, in the order of `captions`; `unseen` for the captions of `UNSEEN`.
    """

    accuracy: float
    ceiling: float
    captions: list[str]
    by_group: dict[str, tuple[int, int]]
    wrong: list[tuple[str, str]]
    steps: int
    guidance: float | None
    seconds: float
    pictures: Image.Image | None = field(default=None, repr=False)
    unseen: Image.Image | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        skip = ("pictures", "unseen")
        return {key: value for key, value in vars(self).items() if key not in skip}


def evaluate(
    model: Any = "micro-flux",
    count: int = 200,
    steps: int = 28,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 20,
    unseen: bool = True,
) -> Evaluation:
    """Draw `count` captions of the emoji set and count how many are recognised.

    Args:
        model: a text-to-image pipeline or what `ditkit.load` takes.
        count: captions, drawn without replacement from the whole set by `seed`.
        steps, guidance: of the sampling; guidance None is the pipeline's own.
        batch: pictures in one call.
        unseen: draw the captions of `UNSEEN` too; they are shown, not scored.

    Raises:
        ValueError: count or steps out of range.
    """
    judge = Judge()
    if not 1 <= count <= len(judge.dataset):
        raise ValueError(f"count={count}: between 1 and {len(judge.dataset)} captions can be asked for")
    if isinstance(model, str):
        from ditkit.hub import load

        model = load(model)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(judge.dataset))[:count])
    captions = [judge.dataset.captions[i] for i in chosen]
    images, seconds = draw(model, captions, steps, guidance, seed, batch)
    found = judge.nearest(images).numpy()
    right = found == chosen
    groups = np.array([judge.dataset.rows[i].group for i in chosen])
    return Evaluation(
        accuracy=float(right.mean()),
        ceiling=float((_through_autoencoder(model, judge, chosen) == chosen).mean()),
        captions=captions,
        by_group={
            g: (int(right[groups == g].sum()), int((groups == g).sum()))
            for g in GROUPS
            if (groups == g).any()
        },
        wrong=[
            (c, judge.dataset.captions[f]) for c, f, ok in zip(captions, found, right, strict=True) if not ok
        ],
        steps=steps,
        guidance=guidance,
        seconds=seconds,
        pictures=grid(images, columns=20),
        unseen=grid(draw(model, list(UNSEEN), steps, guidance, seed, batch)[0], columns=8)
        if unseen
        else None,
    )


def draw(
    pipe: Any, captions: list[str], steps: int, guidance: float | None, seed: int, batch: int
) -> tuple[torch.Tensor, float]:
    """Pictures (B, 3, H, W) in [-1, 1] of captions or classes, and the seconds they took."""
    parts, seconds = [], 0.0
    for start in tqdm(range(0, len(captions), batch), desc="drawing", unit="batch", delay=2):
        sampling = Sampling(steps=steps, guidance=guidance, seed=seed + start)
        drawn = sample(pipe, captions[start : start + batch], sampling)
        parts.append(torch.from_numpy(drawn.pictures).permute(0, 3, 1, 2) * 2 - 1)
        seconds += drawn.seconds
    return torch.cat(parts), seconds


@torch.no_grad()
def _through_autoencoder(pipe: Any, judge: Judge, chosen: np.ndarray) -> np.ndarray:
    found = []
    for rows in np.array_split(chosen, max(1, len(chosen) // 50)):
        images = judge.dataset.images(rows)
        if pipe.vae is None:  # it draws pixels, of a size of its own
            restored = resized(images, pipe.transformer.latent_size)
        else:
            images = images.to(pipe.vae.device, pipe.vae.dtype)
            restored = pipe.vae.decode(pipe.vae.encode(images).latent_dist.mean).sample
        found.append(judge.nearest(restored.float().cpu()).numpy())
    return np.concatenate(found)
