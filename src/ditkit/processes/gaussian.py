"""Gaussian diffusion in discrete steps with a learned variance, as DiT trains and samples it.

Sources: Ho et al., arXiv 2006.11239 (process, posterior: equations 4, 6, 7); Nichol and Dhariwal, arXiv
2102.09672 (variance between two bounds: equation 15; respaced steps: section 4; hybrid loss: equation 16);
used unchanged by DiT, arXiv 2212.09748, section 3.1. Samplers are in `gaussian_sampling`.

Tables are float64 on the CPU and become float32 when indexed. Dimensions: B batch, C channels, T steps of
the (respaced) schedule; `abar` is the cumulative product of 1 - beta. x is (B, C, ...) and t (B,) everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ditkit.processes.schedules import BetaSchedule, betas, respace

ModelFunction = Callable[[Tensor, Tensor], Tensor]
"""`(x_t, timestep) -> prediction`; the timestep is that of the full schedule, 0..999."""


class Moments(NamedTuple):
    """A Gaussian over x_(t-1), and the x_0 it was made from; all (B, C, ...)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    sample: Tensor


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """A schedule, what the network predicts, and the loss it is trained with. Build it with `create`.

    Args:
        betas: variances of the kept steps, (T,), float64.
        timesteps: the full schedule's index of each kept step, which the network is given.
        prediction: what the first C channels are: the noise or the clean sample.
        variance: "learned_range": C more channels interpolate between the bounds; else one of the bounds.
        loss: "mse", plus the variational bound for the variance when that is learned; "rescaled_mse": with
            the bound times T/1000; "kl": the bound alone; "rescaled_kl": times T.
    """

    betas: Tensor
    timesteps: tuple[int, ...]
    prediction: Literal["epsilon", "sample"] = "epsilon"
    variance: Literal["learned_range", "fixed_small", "fixed_large"] = "learned_range"
    loss: Literal["mse", "rescaled_mse", "kl", "rescaled_kl"] = "mse"

    @classmethod
    def create(
        cls,
        steps: int = 1000,
        respacing: str | Sequence[int] = "",
        *,
        schedule: BetaSchedule = "linear",
        prediction: Literal["epsilon", "sample"] = "epsilon",
        variance: Literal["learned_range", "fixed_small", "fixed_large"] = "learned_range",
        loss: Literal["mse", "rescaled_mse", "kl", "rescaled_kl"] = "mse",
    ) -> GaussianDiffusion:
        """The process with `steps` steps, or a few of them as `schedules.respace` reads `respacing`.

        Raises:
            ValueError: for a schedule, a respacing or an option that does not exist.
        """
        for name, value, known in (
            ("prediction", prediction, ("epsilon", "sample")),
            ("variance", variance, ("learned_range", "fixed_small", "fixed_large")),
            ("loss", loss, ("mse", "rescaled_mse", "kl", "rescaled_kl")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; there are {', '.join(known)}")
        kept = respace(steps, respacing)
        abar = (1 - betas(schedule, steps)).cumprod(0)[kept]
        # Beta of a kept step: what the steps since the last kept one add up to.
        kept_betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        return cls(kept_betas, tuple(kept), prediction, variance, loss)

    # --- tables, (T,) ---------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def abar(self) -> Tensor:
        return (1 - self.betas).cumprod(0)

    @cached_property
    def abar_previous(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.abar[:-1]])

    @cached_property
    def abar_next(self) -> Tensor:
        return torch.cat([self.abar[1:], torch.zeros(1, dtype=torch.float64)])

    @cached_property
    def posterior_variance(self) -> Tensor:
        return self.betas * (1 - self.abar_previous) / (1 - self.abar)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """Its first entry would be -infinity (x_0 is certain there) and repeats the second."""
        if self.num_steps == 1:
            return self.betas.log()
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def posterior_mean_sample(self) -> Tensor:
        """Weight of x_0 in the posterior's mean."""
        return self.betas * self.abar_previous.sqrt() / (1 - self.abar)

    @cached_property
    def posterior_mean_state(self) -> Tensor:
        """Weight of x_t in the posterior's mean."""
        return (1 - self.abar_previous) * (1 - self.betas).sqrt() / (1 - self.abar)

    @cached_property
    def large_variance(self) -> Tensor:
        """Beta, with the first entry as small as the posterior's second: "fixed_large"."""
        return torch.cat([self.posterior_variance[1:2], self.betas[1:]]) if self.num_steps > 1 else self.betas

    @staticmethod
    def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Entries t (B,) of a table as float32, (B, 1, ...), on the device of `like` (B, ...)."""
        entries = table.float().to(like.device)[t]  # cast on the CPU: some devices have no float64
        return entries.reshape(-1, *[1] * (like.ndim - 1))

    def model_timestep(self, t: Tensor) -> Tensor:
        """The full schedule's index of steps t, (B,), which the network was trained on."""
        return torch.tensor(self.timesteps, device=t.device)[t]

    # --- the process ----------------------------------------------------------------------------------

    def q_sample(self, sample: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise."""
        signal = self.at(self.abar.sqrt(), t, sample)
        return signal * sample + self.at((1 - self.abar).sqrt(), t, sample) * noise

    def q_posterior(self, sample: Tensor, state: Tensor, t: Tensor) -> Moments:
        """The Gaussian q(x_(t-1) | x_t, x_0) for x_0 `sample` and x_t `state`."""
        mean = (
            self.at(self.posterior_mean_sample, t, state) * sample
            + self.at(self.posterior_mean_state, t, state) * state
        )
        variance = self.at(self.posterior_variance, t, state).expand_as(state)
        return Moments(
            mean, variance, self.at(self.posterior_log_variance, t, state).expand_as(state), sample
        )

    def sample_from_noise(self, state: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The x_0 that x_t and its noise stand for."""
        scale = self.at((1 / self.abar).sqrt(), t, state)
        return scale * state - self.at((1 / self.abar - 1).sqrt(), t, state) * noise

    def noise_from_sample(self, state: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        """The noise that x_t and x_0 stand for."""
        scale = self.at((1 / self.abar).sqrt(), t, state)
        return (scale * state - sample) / self.at((1 / self.abar - 1).sqrt(), t, state)

    def split(self, output: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output as prediction (B, C, ...) and variance channels (B, C, ...) or None.

        Raises:
            ValueError: if its channels are not those of the process, C or 2 C.
        """
        channels = state.shape[1]
        learned = self.variance == "learned_range"
        if output.shape[1] != channels * (1 + learned):
            raise ValueError(
                f"the network returned {output.shape[1]} channels for {channels}; variance={self.variance!r} "
                f"needs {channels * (1 + learned)}: a DiT with learn_sigma={learned}"
            )
        return (output[:, :channels], output[:, channels:]) if learned else (output, None)

    def p_mean_variance(self, output: Tensor, state: Tensor, t: Tensor, *, clip: bool = False) -> Moments:
        """The Gaussian p(x_(t-1) | x_t) that the network's output stands for.

        Args:
            output: (B, 2 C, ...) with a learned variance, else (B, C, ...).
            clip: whether the predicted x_0 is clipped to [-1, 1]; right for pixels, wrong for latents.
        """
        prediction, between = self.split(output, state)
        if between is not None:
            lowest = self.at(self.posterior_log_variance, t, state)
            fraction = (between + 1) / 2
            log_variance = fraction * self.at(self.betas.log(), t, state) + (1 - fraction) * lowest
            variance = log_variance.exp()
        else:
            large = self.variance == "fixed_large"
            logs = self.large_variance.log() if large else self.posterior_log_variance
            variance = self.at(self.large_variance if large else self.posterior_variance, t, state)
            variance, log_variance = variance.expand_as(state), self.at(logs, t, state).expand_as(state)
        sample = prediction
        if self.prediction == "epsilon":
            sample = self.sample_from_noise(state, t, prediction)
        if clip:
            sample = sample.clamp(-1, 1)
        return Moments(self.q_posterior(sample, state, t).mean, variance, log_variance, sample)

    # --- training -------------------------------------------------------------------------------------

    def training_losses(
        self,
        model: ModelFunction,
        sample: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of each sample, (B,): "loss", and its parts "mse" and "vb" where it has them.

        Args:
            model: called once, with x_t and the full schedule's timesteps.
            sample: x_0, (B, C, ...).
            t: steps of this schedule, (B,), 0..T-1.
            noise: standard normal of the sample's shape; drawn when None.
            weight: what each element counts in the means, broadcast to the sample; None: all alike.
        """
        noise = torch.randn_like(sample) if noise is None else noise
        state = self.q_sample(sample, t, noise)
        output = model(state, self.model_timestep(t))
        if self.loss in ("kl", "rescaled_kl"):
            bound = self.bound(output, sample, state, t, weight=weight)
            return {"loss": bound * self.num_steps if self.loss == "rescaled_kl" else bound, "vb": bound}
        prediction, between = self.split(output, state)
        target = noise if self.prediction == "epsilon" else sample
        mse = mean_flat((target - prediction) ** 2, weight)
        if between is None:
            return {"loss": mse, "mse": mse}
        # Detached, so that the bound trains the variance only.
        output = torch.cat([prediction.detach(), between], dim=1)
        bound = self.bound(output, sample, state, t, weight=weight)
        if self.loss == "rescaled_mse":
            bound = bound * (self.num_steps / 1000)
        return {"loss": mse + bound, "mse": mse, "vb": bound}

    def bound(
        self,
        output: Tensor,
        sample: Tensor,
        state: Tensor,
        t: Tensor,
        *,
        clip: bool = False,
        weight: Tensor | None = None,
    ) -> Tensor:
        """One term of the variational bound in bits per dimension, (B,): KL, or at t = 0 the likelihood."""
        true = self.q_posterior(sample, state, t)
        model = self.p_mean_variance(output, state, t, clip=clip)
        divergence = normal_kl(true.mean, true.log_variance, model.mean, model.log_variance)
        likelihood = discretized_log_likelihood(sample, model.mean, 0.5 * model.log_variance)
        divergence, likelihood = mean_flat(divergence, weight), mean_flat(likelihood, weight)
        return torch.where(t == 0, -likelihood, divergence) / math.log(2.0)


def mean_flat(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over all but the batch, (B, ...) -> (B,), weighted where there is a weight to broadcast."""
    if weight is None:
        return values.flatten(1).mean(1)
    weight = weight.to(values.dtype).expand_as(values)
    return (values * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of independent normals, in nats, elementwise."""
    ratio = (log_variance1 - log_variance2).exp()
    distance = (mean1 - mean2) ** 2 * (-log_variance2).exp()
    return 0.5 * (-1.0 + log_variance2 - log_variance1 + ratio + distance)


def discretized_log_likelihood(sample: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log likelihood (nats, elementwise) of 8-bit values scaled to [-1, 1] under a binned normal.

    A bin reaches 1/255 to both sides; the outermost ones are open. arXiv 2006.11239, equation 13, with the
    tanh approximation of the normal's distribution function.
    """
    inverse = (-log_scale).exp()
    upper = _normal_cdf(inverse * (sample - mean + 1 / 255))
    lower = _normal_cdf(inverse * (sample - mean - 1 / 255))
    probability = torch.where(sample < -0.999, upper, torch.where(sample > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
