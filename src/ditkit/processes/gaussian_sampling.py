"""Steps and loops that draw samples from a `GaussianDiffusion`, one function for each algorithm.

Sources: DDPM, arXiv 2006.11239, algorithm 2; DDIM, arXiv 2010.02502, equations 12 (step) and 14 (reverse).
All steps take `(process, output, state, t)`: the network's output (B, 2 C or C, ...) at x_t `state`
(B, C, ...) and t (B,), steps of the process's own schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ditkit.processes.gaussian import GaussianDiffusion, ModelFunction
from ditkit.processes.noise import normal_like


def ddpm_step(
    process: GaussianDiffusion, output: Tensor, state: Tensor, t: Tensor, noise: Tensor, *, clip: bool = False
) -> Tensor:
    """x_(t-1) drawn from the network's Gaussian; no noise is added at t = 0."""
    moments = process.p_mean_variance(output, state, t, clip=clip)
    return moments.mean + _unless_last(t, state) * (0.5 * moments.log_variance).exp() * noise


def ddim_step(
    process: GaussianDiffusion,
    output: Tensor,
    state: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    eta: float = 0.0,
    clip: bool = False,
) -> Tensor:
    """x_(t-1) by DDIM; eta 0 is deterministic, 1 as noisy as the posterior."""
    sample = process.p_mean_variance(output, state, t, clip=clip).sample
    epsilon = process.noise_from_sample(state, t, sample)  # differs from the output where x_0 was clipped
    abar = process.at(process.abar, t, state)
    previous = process.at(process.abar_previous, t, state)
    sigma = eta * ((1 - previous) / (1 - abar)).sqrt() * (1 - abar / previous).sqrt()
    mean = sample * previous.sqrt() + (1 - previous - sigma**2).sqrt() * epsilon
    return mean + _unless_last(t, state) * sigma * noise


def ddim_reverse_step(
    process: GaussianDiffusion, output: Tensor, state: Tensor, t: Tensor, *, clip: bool = False
) -> Tensor:
    """x_(t+1) by the deterministic DDIM equation run backwards, from data to noise."""
    sample = process.p_mean_variance(output, state, t, clip=clip).sample
    epsilon = process.noise_from_sample(state, t, sample)
    following = process.at(process.abar_next, t, state)
    return sample * following.sqrt() + (1 - following).sqrt() * epsilon


@torch.no_grad()
def trajectory(
    process: GaussianDiffusion,
    model: ModelFunction,
    start: Tensor,
    *,
    method: Literal["ddpm", "ddim"] = "ddpm",
    eta: float = 0.0,
    clip: bool = False,
    noises: Sequence[Tensor] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The states after every step of the whole schedule, from noise to data; the last is the sample.

    Args:
        model: `(x, timestep) -> output`, called once a step with the full schedule's timesteps.
        start: standard normal noise, (B, C, ...).
        noises: the noise of each step in order; drawn when None. DDIM draws it even at eta = 0, so that a
            seed gives the same pictures at every eta as the authors' loop does.
        generator: for the noises drawn here.

    Raises:
        ValueError: for an unknown method, or fewer noises than steps.
    """
    if method not in ("ddpm", "ddim"):
        raise ValueError(f"method={method!r} is unknown; there are 'ddpm' and 'ddim'")
    if noises is not None and len(noises) != process.num_steps:
        raise ValueError(f"{len(noises)} noises for {process.num_steps} steps; give one for each")
    state = start
    for index, step in enumerate(reversed(range(process.num_steps))):
        t = torch.full(state.shape[:1], step, device=state.device)
        output = model(state, process.model_timestep(t))
        noise = noises[index] if noises is not None else normal_like(state, generator)
        if method == "ddpm":
            state = ddpm_step(process, output, state, t, noise, clip=clip)
        else:
            state = ddim_step(process, output, state, t, noise, eta=eta, clip=clip)
        yield state


def _unless_last(t: Tensor, like: Tensor) -> Tensor:
    """1 where t > 0, else 0, (B, 1, ...)."""
    return (t != 0).to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
