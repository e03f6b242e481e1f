"""How often micro-wan shows the object and the motion it was asked for, and how it compares with real clips.

python -m benchmarks.training.micro_wan [--count 100] [--steps 28] [--guidance G]
"""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console

import ditkit
from benchmarks.record import Claim, arguments, write
from ditkit.analysis.bench import machine
from ditkit.analysis.evaluate_motion import SEED_OF_REAL, Shares, evaluate_motion
from ditkit.data.config import MotionConfig
from ditkit.data.emoji_motion import EmojiMotion
from ditkit.training.tasks.latents import decode_video, encode_video

TARGET = 0.8


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=None)
    options = parser.parse_args()
    pipe = ditkit.load("micro-wan")
    pipe.set_progress_bar_config(disable=True)
    found = evaluate_motion(pipe, options.count, options.steps, options.guidance)
    tokens = 9 * 8 * 8
    claims = [
        Claim(
            "micro-wan",
            f"object and direction of motion are the prompted ones in {TARGET:.0%} of {options.count} clips",
            "ditkit",
            f"{found.shares.both:.0%} (object {found.shares.object:.0%}, motion {found.shares.motion:.0%}; "
            f"with the asked motion the nearest of nine {found.shares.nearest:.0%}), {options.steps} steps, "
            f"{found.seconds:.0f} s",
            found.shares.both >= TARGET,
            f"eighty emoji, {tokens} tokens; right is within 45 degrees",
        ),
        Claim(
            "micro-wan",
            "the measure finds object and motion of real clips, as they are and through the autoencoder",
            "ditkit",
            f"{_both(found.real)} as they are, {_both(found.ceiling)} through the autoencoder",
            min(found.real.both, found.ceiling.both) >= 0.98,
        ),
    ]
    decibels = restored(pipe)
    claims.append(
        Claim(
            "micro-wan",
            "clips come through the autoencoder with at least 25 dB",
            "ditkit",
            f"{decibels:.1f} dB on 40 clips of a seed that was not trained on",
            decibels >= 25,
            "most of a clip is plain white",
        )
    )
    for claim in claims:
        Console().print(claim)
    write(options.json, claims, machine(pipe), evaluation=found.as_dict())


def restored(pipe: Any) -> float:
    """PSNR of clips sent through the autoencoder and back, in decibels."""
    clips = EmojiMotion(MotionConfig(spread=0.5), seed=SEED_OF_REAL)
    errors = []
    for index in range(40):
        video = clips.clip(index).video[None]
        errors.append(float((decode_video(pipe.vae, encode_video(pipe.vae, video)) - video).square().mean()))
    return 10 * math.log10(4 / (sum(errors) / len(errors)))  # pixels span [-1, 1]


def _both(shares: Shares) -> str:
    return f"{shares.both:.0%}"


if __name__ == "__main__":
    main()
