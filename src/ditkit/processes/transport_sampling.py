"""Samplers of a `Transport`: its probability flow as an ODE, and the SDEs with the same marginals.

Source: SiT, arXiv 2401.08740, section 2.2 and appendix B; the ODE solvers are torchdiffeq's. The network is a
function `(x, t) -> prediction`, x (B, C, ...) and t (B,) from 0 (noise) to 1 (data).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from ditkit.processes.noise import normal_like
from ditkit.processes.paths import DIFFUSION_FORMS, DiffusionForm
from ditkit.processes.transport import ModelFunction, Transport

LastStep = Literal["mean", "euler", "tweedie"]


@torch.no_grad()
def sample_ode(
    transport: Transport,
    model: ModelFunction,
    start: Tensor,
    *,
    method: str = "dopri5",
    points: int = 50,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    until: float | None = None,
    reverse: bool = False,
) -> Tensor:
    """Integrate the probability flow.

    Args:
        start: standard normal noise, or data when `reverse`, (B, C, ...).
        method: a torchdiffeq solver; "dopri5" chooses its own steps, "euler", "heun3", "rk4" and the other
            fixed ones take `points - 1`.
        points: times at which the state is returned, evenly spread over the interval, then shifted.
        atol: absolute error allowed to adaptive solvers.
        rtol: relative error allowed to adaptive solvers.
        until: where the interval ends at the data, before the shift; None: where the transport's does.
        reverse: from data to noise.

    Returns:
        The states, (points, B, C, ...); the first is `start`, the last the sample.

    Raises:
        ValueError: for fewer than two points, or a method that torchdiffeq does not know.
    """
    if points < 2:
        raise ValueError(f"points={points}: a trajectory has at least two")
    first, last = transport.ode_interval()
    last = last if until is None else until
    if reverse:
        first, last = last, first

    def drift(t: Tensor, state: Tensor) -> Tensor:
        times = t.expand(state.shape[0])
        return transport.velocity(model(state, times), state, times)

    times = transport.moved(torch.linspace(first, last, points, device=start.device))
    states: Any = odeint(drift, start, times, method=method, atol=atol, rtol=rtol)
    return states


@torch.no_grad()
def sample_heun(
    transport: Transport, model_from: Callable[[float], ModelFunction], start: Tensor, *, steps: int
) -> Tensor:
    """Integrate the probability flow by Heun's method in equal steps, then shifted, the last one Euler's.

    Karras et al., arXiv 2206.00364, algorithm 1, on the times of a flow. `sample_ode` corrects every step.

    Args:
        model_from: gives the network for a step that begins at a time in [0, 1]; see `guided_within`.
        start: standard normal noise, (B, C, ...).
        steps: how many.

    Returns:
        The sample, (B, C, ...), in the precision of `start`.

    Raises:
        ValueError: for no step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: expected one or more")
    first, last = transport.ode_interval()
    times = transport.moved(torch.linspace(first, last, steps + 1, dtype=torch.float64)).tolist()
    state = start
    for index, (now, then) in enumerate(itertools.pairwise(times)):
        model = model_from(now)

        def slope(x: Tensor, time: float, model: ModelFunction = model) -> Tensor:
            t = torch.full(x.shape[:1], time, device=x.device, dtype=x.dtype)
            return transport.velocity(model(x, t), x, t)

        here = slope(state, now)
        moved = state + (then - now) * here
        if index < steps - 1:
            moved = state + (then - now) * (here + slope(moved, then)) / 2
        state = moved
    return state


def guided_within(
    guided: ModelFunction, plain: ModelFunction, first: float, last: float
) -> Callable[[float], ModelFunction]:
    """For a step that begins at t: the guided network where `first` <= t <= `last`, else the plain one.

    Guidance in a limited interval: Kynkäänniemi et al., arXiv 2404.07724.
    """
    return lambda t: guided if first <= t <= last else plain


class SdeStates(NamedTuple):
    """What an SDE sampler ends with; both (B, C, ...)."""

    before_last: Tensor
    sample: Tensor


@torch.no_grad()
def sde_trajectory(
    transport: Transport,
    model: ModelFunction,
    start: Tensor,
    *,
    method: Literal["euler", "heun"] = "euler",
    form: DiffusionForm = "sigma",
    norm: float = 1.0,
    points: int = 250,
    last_step_size: float = 0.04,
    noises: Sequence[Tensor] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The states after each of the `points - 1` noisy steps of dx = (v + w score) dt + sqrt(2 w) dW.

    The last step, which adds no noise, is apart: see `sample_sde`.

    Args:
        start: standard normal noise, (B, C, ...).
        method: "euler" (Euler-Maruyama) or "heun" (the noise first, then two evaluations of the drift).
        form: w(t), see `Path.diffusion`.
        norm: its size.
        points: times from 0 to 1 - `last_step_size`, evenly spread.
        noises: the standard normal of each step; drawn when None.
        generator: for the noises drawn here.

    Raises:
        ValueError: for an unknown method or form, a step size outside [0, 1), or fewer noises than steps.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"method={method!r} is unknown; there are 'euler' and 'heun'")
    if form not in DIFFUSION_FORMS:
        raise ValueError(f"form={form!r} is unknown; there are {', '.join(DIFFUSION_FORMS)}")
    if points < 2 or not 0 <= last_step_size < 1:
        raise ValueError(
            f"points={points}, last_step_size={last_step_size}: expected two points or more, "
            "and a step in [0, 1)"
        )
    if noises is not None and len(noises) != points - 1:
        raise ValueError(f"{len(noises)} noises for {points - 1} steps; give one for each")
    drift = _sde_drift(transport, model, form, norm)
    first, last = transport.sde_interval(form, last_step_size)
    if form == "sbdm" and transport.path != "vp" and first == 0:
        raise ValueError(
            f"form='sbdm' is infinite at t = 0 on the {transport.path} path: give "
            "Transport(sample_eps=1e-3), or use form='sigma'"
        )
    times = torch.linspace(first, last, points, device=start.device)
    step = times[1] - times[0]
    state = start
    for index, time in enumerate(times[:-1]):
        t = time.expand(state.shape[0])
        noise = noises[index] if noises is not None else normal_like(state, generator)
        diffusion = transport.plan.diffusion(transport.plan.time(t, state), form, norm)
        kick = (2 * diffusion).sqrt() * noise * step.sqrt()
        if method == "euler":
            state = state + drift(state, t) * step + kick
        else:
            kicked = state + kick
            slope = drift(kicked, t)
            state = kicked + 0.5 * step * (slope + drift(kicked + step * slope, t + step))
        yield state


@torch.no_grad()
def sample_sde(
    transport: Transport,
    model: ModelFunction,
    start: Tensor,
    *,
    last_step: LastStep | None = "mean",
    method: Literal["euler", "heun"] = "euler",
    form: DiffusionForm = "sigma",
    norm: float = 1.0,
    points: int = 250,
    last_step_size: float = 0.04,
    noises: Sequence[Tensor] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SdeStates:
    """Draw samples by the SDE, with one last noiseless step from t1 = 1 - `last_step_size`.

    Args:
        last_step: "mean": x + (v + w score) h; "euler": x + v h; "tweedie": the expected data,
            (x + sigma^2 score)/alpha; None: stop at t1.

    Other arguments and errors: see `sde_trajectory`.

    Raises:
        ValueError: also for an unknown last step.
    """
    if last_step not in (None, "mean", "euler", "tweedie"):
        raise ValueError(f"last_step={last_step!r} is unknown; there are 'mean', 'euler', 'tweedie' and None")
    state = start
    for state in sde_trajectory(  # noqa: B007  only the last one is wanted
        transport,
        model,
        start,
        method=method,
        form=form,
        norm=norm,
        points=points,
        last_step_size=last_step_size,
        noises=noises,
        generator=generator,
    ):
        pass
    before_last = state
    t = torch.full(state.shape[:1], transport.sde_interval(form, last_step_size)[1], device=state.device)
    if last_step == "mean":
        state = state + _sde_drift(transport, model, form, norm)(state, t) * last_step_size
    elif last_step == "euler":
        state = state + transport.velocity(model(state, t), state, t) * last_step_size
    elif last_step == "tweedie":
        time = transport.plan.time(t, state)
        alpha, sigma = transport.plan.alpha(time), transport.plan.sigma(time)
        state = state / alpha + sigma**2 / alpha * transport.score(model(state, t), state, t)
    return SdeStates(before_last, state)


def _sde_drift(
    transport: Transport, model: ModelFunction, form: DiffusionForm, norm: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """v + w score, from one evaluation of the network."""

    def drift(state: Tensor, t: Tensor) -> Tensor:
        output = model(state, t)
        diffusion = transport.plan.diffusion(transport.plan.time(t, state), form, norm)
        return transport.velocity(output, state, t) + diffusion * transport.score(output, state, t)

    return drift
