"""How often a text-to-video pipeline shows what it was asked for: the object, and where it moves.

Object and motion are found by `motion_judge`, among the whole vocabulary. A motion is right within 45
degrees of the asked direction, or below `STILL_BELOW` pixels for an object that was to stay still. The
measure itself is measured with every result: on real clips of the same prompts, as they are (`real`) and
through the autoencoder and back (`ceiling`: no transformer can do better).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ditkit.analysis.motion_judge import MotionJudge, Seen
from ditkit.analysis.sampling import Sampling, sample
from ditkit.data.config import MotionConfig
from ditkit.data.emoji_motion import EmojiMotion, Moving

SEED_OF_REAL = 1_000_003  # not a seed of the training


@dataclass(frozen=True)
class Shares:
    """Shares of the prompts: object right, motion right, both right; `nearest`: the object right and the
    asked motion the nearest of the nine."""

    object: float
    motion: float
    both: float
    nearest: float


@dataclass
class MotionEvaluation:
    """What was seen in the clips of some prompts.

    Args:
        shares: of the generated clips; `real` and `ceiling` of the real ones.
        wrong: (prompt, what was seen instead).
        explained: mean share of the clips' ink that the found emoji accounts for.
        seconds: of all generations together.
        clips: (B, F, H, W, 3) in [0, 1], in the order of `prompts`.
    """

    shares: Shares
    ceiling: Shares
    real: Shares
    prompts: list[str]
    wrong: list[tuple[str, str]]
    explained: float
    steps: int
    guidance: float | None
    seconds: float
    clips: np.ndarray = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        shares = {name: vars(getattr(self, name)) for name in ("shares", "ceiling", "real")}
        return {**{k: v for k, v in vars(self).items() if k != "clips"}, **shares}


def scenes(count: int, seed: int = 0, config: MotionConfig | None = None) -> list[Moving]:
    """`count` objects and motions, in which all objects and all directions come about equally often."""
    motion = EmojiMotion(config)
    rng = np.random.default_rng(seed)
    names, directions = rng.permutation(motion.names), rng.permutation(motion.config.directions)
    return [  # an object that comes again goes on to the next direction
        Moving(
            str(names[i % len(names)]), str(directions[(i % len(names) + i // len(names)) % len(directions)])
        )
        for i in range(count)
    ]


def evaluate_motion(
    model: Any = "micro-wan",
    count: int = 100,
    steps: int = 28,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 10,
    config: MotionConfig | None = None,
) -> MotionEvaluation:
    """Draw `count` clips, of an object and a direction each, and count how many show both.

    Args:
        model: a text-to-video pipeline or what `ditkit.load` takes.
        steps, guidance: of the sampling; guidance None is the pipeline's own.
        batch: clips in one call.
        config: what the pipeline was trained on; the prompts' objects and directions are drawn from it.

    Raises:
        ValueError: count or steps below 1.
    """
    if count < 1:
        raise ValueError(f"count={count}: at least 1 prompt is needed")
    sampling = Sampling(steps=steps, guidance=guidance, seed=seed)
    if isinstance(model, str):
        from ditkit.hub import load

        model = load(model)
    config = config or MotionConfig(spread=0.5)
    asked = scenes(count, seed, config)
    judge = MotionJudge(config.objects or None, config.object_size)
    clips, seconds = _draw(model, [str(item) for item in asked], sampling, batch)
    seen = _look(judge, clips)
    frames = clips.shape[1]
    real = [
        EmojiMotion(config.model_copy(update={"frames": frames}), clips.shape[2], SEED_OF_REAL + i).make(
            [item]
        )
        for i, item in enumerate(asked)
    ]
    through = _through_autoencoder(model, [clip.video for clip in real])
    return MotionEvaluation(
        shares=shares(asked, seen),
        ceiling=shares(asked, [judge.look(video) for video in through]),
        real=shares(asked, [judge.look(clip.video) for clip in real]),
        prompts=[str(item) for item in asked],
        wrong=[
            (str(a), f"{s.name} {s.direction}")
            for a, s in zip(asked, seen, strict=True)
            if not (s.name == a.name and s.moves(a.direction))
        ],
        explained=float(np.mean([s.explained for s in seen])),
        steps=steps,
        guidance=guidance,
        seconds=seconds,
        clips=clips,
    )


def shares(asked: Sequence[Moving], seen: Sequence[Seen]) -> Shares:
    """How often what was seen is what was asked for."""

    def share(right: Callable[[Moving, Seen], bool]) -> float:
        return float(np.mean([right(a, s) for a, s in zip(asked, seen, strict=True)]))

    return Shares(
        object=share(lambda a, s: s.name == a.name),
        motion=share(lambda a, s: s.moves(a.direction)),
        both=share(lambda a, s: s.name == a.name and s.moves(a.direction)),
        nearest=share(lambda a, s: s.name == a.name and s.direction == a.direction),
    )


def _look(judge: MotionJudge, clips: np.ndarray) -> list[Seen]:
    videos = torch.from_numpy(clips).permute(0, 4, 1, 2, 3) * 2 - 1  # (B, 3, F, H, W)
    return [judge.look(video) for video in tqdm(videos, desc="looking", unit="clip", delay=5)]


def _draw(pipe: Any, prompts: list[str], sampling: Sampling, batch: int) -> tuple[np.ndarray, float]:
    parts, seconds = [], 0.0
    for start in tqdm(range(0, len(prompts), batch), desc="drawing", unit="batch", delay=2):
        settings = Sampling(sampling.steps, sampling.guidance, seed=sampling.seed + start)
        drawn = sample(pipe, prompts[start : start + batch], settings, batch=batch)
        if drawn.clips is None:
            raise TypeError(f"{type(pipe).__name__} draws pictures; a text-to-video pipeline is needed")
        parts.append(drawn.clips)
        seconds += drawn.seconds
    return np.concatenate(parts), seconds


@torch.no_grad()
def _through_autoencoder(pipe: Any, videos: list[torch.Tensor]) -> list[torch.Tensor]:
    coder = pipe.vae
    return [
        coder.decode(coder.encode(video[None].to(coder.device, coder.dtype)).latent_dist.mean).sample[0].cpu()
        for video in videos
    ]
