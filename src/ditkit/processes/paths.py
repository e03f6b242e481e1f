"""Paths between noise and data, and what a network's prediction along one of them stands for.

Source: SiT, arXiv 2401.08740, sections 2.1 to 2.3 and appendix A. x_t = alpha(t) x_1 + sigma(t) x_0 with data
x_1 at t = 1 and standard normal noise x_0 at t = 0; the velocity is u = alpha' x_1 + sigma' x_0. (diffusers'
flow-matching schedulers run the other way: their sigma is 1 - t and their velocity has the other sign.)

x is (B, C, ...); times are given as t (B, 1, ...), see `Path.time`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

PathName = Literal["linear", "gvp", "vp"]
DiffusionForm = Literal["sigma", "sbdm", "constant", "linear", "decreasing", "increasing-decreasing"]

DIFFUSION_FORMS: tuple[DiffusionForm, ...] = (
    "sigma",
    "sbdm",
    "constant",
    "linear",
    "decreasing",
    "increasing-decreasing",
)


@dataclass(frozen=True)
class Path(ABC):
    """The coefficients of one interpolant, each as a function of t."""

    name: ClassVar[PathName]

    @staticmethod
    def time(t: Tensor, like: Tensor) -> Tensor:
        """Times (B,) as (B, 1, ...), to be multiplied with `like` (B, ...)."""
        return t.reshape(-1, *[1] * (like.ndim - 1))

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    @abstractmethod
    def alpha_rate(self, t: Tensor) -> Tensor:
        """alpha'."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise."""

    @abstractmethod
    def sigma_rate(self, t: Tensor) -> Tensor:
        """sigma'."""

    @abstractmethod
    def log_alpha_rate(self, t: Tensor) -> Tensor:
        """alpha'/alpha, in the form that stays exact where alpha is small."""

    def score_rate(self, t: Tensor) -> Tensor:
        """k in v = (alpha'/alpha) x + k score: (alpha'/alpha) sigma^2 - sigma sigma'."""
        sigma = self.sigma(t)
        return self.log_alpha_rate(t) * sigma**2 - sigma * self.sigma_rate(t)

    # --- conversions ----------------------------------------------------------------------------------

    def interpolate(self, noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        return self.alpha(t) * data + self.sigma(t) * noise

    def velocity(self, noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """u = alpha' x_1 + sigma' x_0."""
        return self.alpha_rate(t) * data + self.sigma_rate(t) * noise

    def score_from_velocity(self, velocity: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """The score (gradient of the log density) at x_t `state`."""
        ratio, sigma = self._ratio(t), self.sigma(t)
        return (ratio * velocity - state) / (sigma**2 - ratio * self.sigma_rate(t) * sigma)

    def noise_from_velocity(self, velocity: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """The expected x_0 at x_t `state`."""
        ratio = self._ratio(t)
        return (ratio * velocity - state) / (ratio * self.sigma_rate(t) - self.sigma(t))

    def velocity_from_score(self, score: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """The velocity at x_t `state`."""
        return self.score_rate(t) * score + self.log_alpha_rate(t) * state

    def velocity_from_noise(self, noise: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """The velocity at x_t `state`."""
        return self.velocity_from_score(self.score_from_noise(noise, t), state, t)

    def score_from_noise(self, noise: Tensor, t: Tensor) -> Tensor:
        return noise / -self.sigma(t)

    def _ratio(self, t: Tensor) -> Tensor:
        return self.alpha(t) / self.alpha_rate(t)

    # --- the diffusion of the reverse process ---------------------------------------------------------

    def diffusion(self, t: Tensor, form: DiffusionForm = "sigma", norm: float = 1.0) -> Tensor:
        """w(t), how much noise the SDE sampler adds; any w >= 0 has the same marginals.

        Args:
            form: "sigma": norm sigma(t); "sbdm": norm k(t), the forward process's own, which divides by
                alpha and so is infinite at t = 0; "constant": norm; "linear": norm (1 - t);
                "decreasing": (norm cos(pi t) + 1)^2 / 4; "increasing-decreasing": norm sin(pi t)^2.
            norm: its size.

        Raises:
            ValueError: for an unknown form.
        """
        if form == "sigma":
            return norm * self.sigma(t)
        if form == "sbdm":
            return norm * self.score_rate(t)
        if form == "constant":
            return torch.full_like(t, norm)
        if form == "linear":
            return norm * (1 - t)
        if form == "decreasing":
            return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2
        if form == "increasing-decreasing":
            return norm * torch.sin(math.pi * t) ** 2
        raise ValueError(f"form={form!r} is unknown; there are {', '.join(DIFFUSION_FORMS)}")


@dataclass(frozen=True)
class Linear(Path):
    """alpha = t, sigma = 1 - t: rectified flow."""

    name = "linear"

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def alpha_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma_rate(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        return 1 / t


@dataclass(frozen=True)
class GVP(Path):
    """Generalised variance preserving: alpha = sin(pi t/2), sigma = cos(pi t/2)."""

    name = "gvp"

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(t * math.pi / 2)

    def alpha_rate(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(t * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.cos(t * math.pi / 2)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(t * math.pi / 2)

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        return math.pi / (2 * torch.tan(t * math.pi / 2))


@dataclass(frozen=True)
class VP(Path):
    """Variance preserving diffusion, arXiv 2011.13456: beta goes from 0.1 (data) to 20 (noise).

    alpha = exp(L) with L = -(1-t)^2 (20 - 0.1)/4 - (1-t) 0.1/2, and sigma = sqrt(1 - alpha^2).
    """

    name = "vp"
    beta_data: float = 0.1
    beta_noise: float = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (1 - t) ** 2 * (self.beta_noise - self.beta_data) - 0.5 * (1 - t) * self.beta_data

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_data + (1 - t) * (self.beta_noise - self.beta_data)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def alpha_rate(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.log_alpha_rate(t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(1 - torch.exp(2 * self._log_alpha(t)))

    def sigma_rate(self, t: Tensor) -> Tensor:
        return -torch.exp(2 * self._log_alpha(t)) * self.log_alpha_rate(t) / self.sigma(t)

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        return 0.5 * self._beta(t)

    def score_rate(self, t: Tensor) -> Tensor:
        return 0.5 * self._beta(t)  # what the general form comes to, without its cancellation


PATHS: dict[str, type[Path]] = {path.name: path for path in (Linear, GVP, VP)}
