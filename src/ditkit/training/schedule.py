"""The learning rate over a run: a function of the step alone, so that there is no state to save."""

from __future__ import annotations

import math

from ditkit.training.config import RunConfig


def learning_rate_factor(run: RunConfig, step: int) -> float:
    """Factor on the learning rate for the update after `step` updates."""
    schedule = run.schedule
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    last = schedule.final_factor
    if schedule.kind == "cosine":
        share = min(1.0, (step - schedule.warmup_steps) / max(1, run.steps - schedule.warmup_steps))
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * share))
    if schedule.decay_steps:
        share = min(1.0, max(0.0, (step - (run.steps - schedule.decay_steps)) / schedule.decay_steps))
        return 1 - (1 - last) * share
    return 1.0
