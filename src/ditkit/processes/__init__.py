"""Diffusion processes: how data is noised, what the network is asked for, and how samples are drawn.

A process knows no network: it is given a function `(x, t) -> prediction`. Training takes its losses from
here and pipelines their steps, so the two can't disagree on a schedule.
"""

from __future__ import annotations

from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.transport import Transport

__all__ = ["GaussianDiffusion", "Transport"]
