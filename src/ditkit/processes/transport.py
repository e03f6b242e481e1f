"""Training and sampling drifts of SiT: a path, what the network predicts, and how the loss is weighted.

Source: SiT, arXiv 2401.08740: losses (equations 5, 6 and appendix A), drifts (2, 4). Samplers are in
`transport_sampling`. Time runs from noise (0) to data (1) and the network is given it as it is.

Dimensions: x is (B, C, ...), t is (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ditkit.processes.gaussian import mean_flat
from ditkit.processes.paths import PATHS, DiffusionForm, Path, PathName
from ditkit.processes.times import TIME_DISTRIBUTIONS, TimeDistribution, logit_normal, shifted

ModelFunction = Callable[[Tensor, Tensor], Tensor]
"""`(x_t, t) -> prediction`, both (B, C, ...), t in [0, 1]."""


@dataclass(frozen=True)
class Transport:
    """How SiT trains a network.

    Args:
        path: "linear", "gvp" or "vp".
        prediction: what the network returns: the velocity, the noise x_0, or the score.
        weight: of the noise and score losses: None is 1; "velocity" (k/sigma)^2, with which they equal the
            velocity's loss; "likelihood" k/sigma^2. The velocity's own loss has weight 1 always.
        train_eps: distance kept from the ends of [0, 1] in training; None is the authors': 1e-5 for "vp",
            0 for velocities on the other paths, 1e-3 for noise and score on them.
        sample_eps: the same in sampling; None is the authors': 1e-3, or 0 for velocities on other paths.
        times: how often training draws each time: all alike, or with a normal logit.
        times_mean, times_std: of that logit, of the share of noise.
        shift: moves the times of training and of ODE samplers towards noise, see `times.shifted`; 1 does not.

    Raises:
        ValueError: for an option that does not exist, a distance outside [0, 0.5), or a deviation or shift
            that is not positive.
    """

    path: PathName = "linear"
    prediction: Literal["velocity", "noise", "score"] = "velocity"
    weight: Literal["velocity", "likelihood"] | None = None
    train_eps: float | None = None
    sample_eps: float | None = None
    times: TimeDistribution = "uniform"
    times_mean: float = 0.0
    times_std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("path", self.path, tuple(PATHS)),
            ("prediction", self.prediction, ("velocity", "noise", "score")),
            ("weight", self.weight, (None, "velocity", "likelihood")),
            ("times", self.times, TIME_DISTRIBUTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; there are {', '.join(map(str, known))}")
        for name, value in (("train_eps", self.train_eps), ("sample_eps", self.sample_eps)):
            if value is not None and not 0 <= value < 0.5:
                raise ValueError(f"{name}={value}: expected a distance from the ends of [0, 1], in [0, 0.5)")
        for name, value in (("times_std", self.times_std), ("shift", self.shift)):
            if value <= 0:
                raise ValueError(f"{name}={value}: expected a number above 0")

    @cached_property
    def plan(self) -> Path:
        """The path's coefficients."""
        return PATHS[self.path]()

    # --- training -------------------------------------------------------------------------------------

    def training_losses(
        self,
        model: ModelFunction,
        x1: Tensor,
        x0: Tensor | None = None,
        t: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each sample, {"loss": (B,)}.

        Args:
            model: called once, with x_t and t.
            x1: data, (B, C, ...).
            x0: standard normal noise; drawn when None.
            t: times, (B,); drawn by `draw_times`, from `train_interval` where they are uniform, when None.
            weight: what each element counts in the mean, broadcast to the data; None: all alike.
        """
        x0 = torch.randn_like(x1) if x0 is None else x0
        if t is None:
            start, stop = self.train_interval()
            uniform = torch.rand(x1.shape[:1], device=x1.device, dtype=x1.dtype)
            t = self.draw_times(uniform * (stop - start) + start)
        time = self.plan.time(t, x1)
        output = model(self.plan.interpolate(x0, x1, time), t)
        if output.shape != x1.shape:
            raise ValueError(
                f"the network returned {tuple(output.shape)} for {tuple(x1.shape)}; a transport has no "
                "learned variance: use a SiT, or a DiT with learn_sigma=False"
            )
        if self.prediction == "velocity":
            return {"loss": mean_flat((output - self.plan.velocity(x0, x1, time)) ** 2, weight)}
        # Both errors are those of a noise: the score is -x0/sigma.
        error = output - x0 if self.prediction == "noise" else output * self.plan.sigma(time) + x0
        return {"loss": mean_flat(self._weight(time) * error**2, weight)}

    def _weight(self, time: Tensor) -> Tensor | float:
        if self.weight is None:
            return 1.0
        sigma = self.plan.sigma(time)
        if self.weight == "velocity":
            return (self.plan.score_rate(time) / sigma) ** 2
        return self.plan.score_rate(time) / sigma**2

    # --- times ----------------------------------------------------------------------------------------

    def draw_times(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) to times as training draws them, of the same shape."""
        if self.times == "logit-normal":
            return 1 - shifted(logit_normal(uniform, self.times_mean, self.times_std), self.shift)
        return self.moved(uniform)

    def moved(self, t: Tensor) -> Tensor:
        """Times under the shift."""
        return t if self.shift == 1 else 1 - shifted(1 - t, self.shift)

    # --- intervals ------------------------------------------------------------------------------------

    def train_interval(self) -> tuple[float, float]:
        """The times that training draws from."""
        return self._interval(self._eps(self.train_eps, vp=1e-5))

    def ode_interval(self) -> tuple[float, float]:
        """The times that an ODE sampler runs through, from noise to data."""
        return self._interval(self._eps(self.sample_eps, vp=1e-3))

    def sde_interval(
        self, form: DiffusionForm = "sigma", last_step_size: float = 0.04
    ) -> tuple[float, float]:
        """The times that an SDE sampler runs through before its last step, which is `last_step_size` long.

        Only "sbdm" and the noise and score predictions divide by alpha and keep away from t = 0.
        """
        eps = self._eps(self.sample_eps, vp=1e-3)
        guarded = self.path != "vp" and (form == "sbdm" or self.prediction != "velocity")
        return (eps if guarded else 0.0), 1 - (last_step_size or eps)

    def _eps(self, chosen: float | None, *, vp: float) -> float:
        if chosen is not None:
            return chosen
        if self.path == "vp":
            return vp
        return 0.0 if self.prediction == "velocity" else 1e-3

    def _interval(self, eps: float) -> tuple[float, float]:
        # VP has no singularity at the noise end: its sigma is 1 there and alpha is not 0.
        return (0.0 if self.path == "vp" else eps), 1 - eps

    # --- drifts ---------------------------------------------------------------------------------------

    def velocity(self, output: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """The probability flow's drift that the network's output at x_t `state` stands for."""
        time = self.plan.time(t, state)
        if self.prediction == "velocity":
            return output
        if self.prediction == "noise":
            return self.plan.velocity_from_noise(output, state, time)
        return self.plan.velocity_from_score(output, state, time)

    def score(self, output: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """The score that the network's output at x_t `state` stands for."""
        time = self.plan.time(t, state)
        if self.prediction == "velocity":
            return self.plan.score_from_velocity(output, state, time)
        if self.prediction == "noise":
            return self.plan.score_from_noise(output, time)
        return output
