"""Training under either process, by the same words: times, what the network sees, its losses.

Dimensions: B samples; samples are (B, C, ...), or (B, ...) in whatever form the network takes them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.transport import Transport

Process = GaussianDiffusion | Transport


def drawn_times(process: Process, uniform: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) to steps of the process, or to times of a flow as it draws them; (B,)."""
    if isinstance(process, GaussianDiffusion):
        return (uniform * process.num_steps).long()
    return process.draw_times(uniform)


def noised(process: Process, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Samples at some times (B,), and what the network is given as time, (B,)."""
    if isinstance(process, GaussianDiffusion):
        return process.q_sample(clean, times, noise), process.model_timestep(times)
    return process.plan.interpolate(noise, clean, process.plan.time(times, clean)), times


def training_losses(
    process: Process,
    network: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    noise: Tensor,
    times: Tensor,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Losses of each sample, (B,): "loss", and its parts where it has them.

    Args:
        network: called once, with the noised samples and the times that it is given; gives its prediction.
        clean, noise: samples and standard normal numbers of their shape.
        times: as of `drawn_times`, (B,).
        weight: what each element counts in the means, broadcast to the samples; None: all alike.
    """
    if isinstance(process, GaussianDiffusion):
        return process.training_losses(network, clean, times, noise, weight)
    return process.training_losses(network, clean, noise, times, weight)
