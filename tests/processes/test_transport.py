"""SiT's transport: paths, conversions, losses, intervals and samplers, against data with a known answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditkit.processes import Transport
from ditkit.processes.paths import DIFFUSION_FORMS, PATHS, Path
from ditkit.processes.transport_sampling import sample_ode, sample_sde

TIMES = st.floats(0.02, 0.98)
plans = pytest.mark.parametrize("plan", [path() for path in PATHS.values()], ids=list(PATHS))
predictions = pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])

MEAN, DEVIATION = 1.5, 0.5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Known:
    """The best possible network for normal data N(MEAN, DEVIATION^2), whose score is known at every time."""

    def __init__(self, plan: Path, prediction: str = "velocity") -> None:
        self.plan, self.prediction, self.calls = plan, prediction, 0

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return getattr(self, self.prediction)(state, self.plan.time(t, state))

    def score(self, state: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.plan.alpha(t), self.plan.sigma(t)
        return (alpha * MEAN - state) / (alpha**2 * DEVIATION**2 + sigma**2)

    def noise(self, state: Tensor, t: Tensor) -> Tensor:
        return -self.plan.sigma(t) * self.score(state, t)

    def velocity(self, state: Tensor, t: Tensor) -> Tensor:
        """alpha' E[x_1 | x_t] + sigma' E[x_0 | x_t]."""
        alpha, sigma = self.plan.alpha(t), self.plan.sigma(t)
        offset = state - alpha * MEAN
        data = MEAN + alpha * DEVIATION**2 * offset / (alpha**2 * DEVIATION**2 + sigma**2)
        return self.plan.alpha_rate(t) * data + self.plan.sigma_rate(t) * self.noise(state, t)


class TestPaths:
    @plans
    @given(t=TIMES)
    def test_rates_are_derivatives(self, plan: Path, t: float) -> None:
        time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        (alpha_rate,) = torch.autograd.grad(plan.alpha(time), time)
        (sigma_rate,) = torch.autograd.grad(plan.sigma(time), time)
        torch.testing.assert_close(plan.alpha_rate(time), alpha_rate, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(plan.sigma_rate(time), sigma_rate, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            plan.log_alpha_rate(time), alpha_rate / plan.alpha(time), rtol=1e-9, atol=0
        )

    @plans
    def test_ends(self, plan: Path) -> None:
        noise, data = draw(2, 3), draw(2, 3, seed=1)
        start = plan.interpolate(noise, data, torch.zeros(2, 1))
        torch.testing.assert_close(start, noise, atol=0.03, rtol=0)  # VP keeps alpha = 0.0066
        torch.testing.assert_close(plan.interpolate(noise, data, torch.ones(2, 1)), data, atol=1e-6, rtol=0)

    @given(t=TIMES)
    def test_vp_and_gvp_preserve_variance(self, t: float) -> None:
        time = torch.tensor(t, dtype=torch.float64)
        for name in ("vp", "gvp"):
            plan = PATHS[name]()
            assert (plan.alpha(time) ** 2 + plan.sigma(time) ** 2).item() == pytest.approx(1, abs=1e-9)

    @given(t=TIMES)
    def test_vp_short_form_of_the_score_rate(self, t: float) -> None:
        time, plan = torch.tensor(t, dtype=torch.float64), PATHS["vp"]()
        torch.testing.assert_close(plan.score_rate(time), Path.score_rate(plan, time), rtol=1e-6, atol=0)

    @plans
    @given(t=TIMES, x=st.floats(-5, 5))
    def test_conversions_on_known_data(self, plan: Path, t: float, x: float) -> None:
        time, state = torch.tensor([[t]], dtype=torch.float64), torch.tensor([[x]], dtype=torch.float64)
        known = Known(plan)
        velocity, score, noise = (
            getattr(known, name)(state, time) for name in ("velocity", "score", "noise")
        )
        close = {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(plan.score_from_velocity(velocity, state, time), score, **close)
        torch.testing.assert_close(plan.noise_from_velocity(velocity, state, time), noise, **close)
        torch.testing.assert_close(plan.velocity_from_score(score, state, time), velocity, **close)
        torch.testing.assert_close(plan.velocity_from_noise(noise, state, time), velocity, **close)

    @plans
    @pytest.mark.parametrize("form", DIFFUSION_FORMS)
    def test_diffusions_are_never_negative(self, plan: Path, form: Any) -> None:
        t = torch.linspace(0.01, 0.99, 50)
        diffusion = plan.diffusion(t, form, 1.0)
        assert diffusion.shape == t.shape and (diffusion >= 0).all() and diffusion.isfinite().all()

    def test_unknown_diffusion(self) -> None:
        with pytest.raises(ValueError, match="increasing-decreasing"):
            PATHS["linear"]().diffusion(torch.ones(1), "inccreasing-decreasing")  # pyright: ignore


class TestLosses:
    @plans
    @predictions
    @pytest.mark.parametrize("weight", [None, "velocity", "likelihood"])
    def test_targets(self, plan: Path, prediction: Any, weight: Any) -> None:
        """A network that returns the target has no loss."""
        x0, x1, t = draw(6, 2, 4, 4), draw(6, 2, 4, 4, seed=1), torch.linspace(0.1, 0.9, 6)
        time = plan.time(t, x1)
        target = {"velocity": plan.velocity(x0, x1, time), "noise": x0, "score": -x0 / plan.sigma(time)}[
            prediction
        ]
        losses = Transport(plan.name, prediction, weight=weight).training_losses(
            lambda x, t: target, x1, x0, t
        )
        assert losses["loss"].shape == (6,)
        assert losses["loss"].max() < 1e-8

    @plans
    @pytest.mark.parametrize("prediction", ["noise", "score"])
    def test_velocity_weight_gives_the_velocity_loss(self, plan: Path, prediction: Any) -> None:
        x0, x1, t = draw(6, 2, 4, 4), draw(6, 2, 4, 4, seed=1), torch.linspace(0.1, 0.9, 6)
        output = draw(6, 2, 4, 4, seed=2)
        transport = Transport(plan.name, prediction, weight="velocity")
        weighted = transport.training_losses(lambda x, t: output, x1, x0, t)["loss"]
        as_velocity = transport.velocity(output, plan.interpolate(x0, x1, plan.time(t, x1)), t)
        plain = Transport(plan.name).training_losses(lambda x, t: as_velocity, x1, x0, t)["loss"]
        torch.testing.assert_close(weighted, plain, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("prediction", ["velocity", "noise"])
    def test_weighted_elements_count_as_often_as_they_say(self, prediction: Any) -> None:
        transport, often = Transport("linear", prediction), torch.tensor([0, 1, 1, 1])
        x0, x1, t = draw(3, 2, 4, 2), draw(3, 2, 4, 2, seed=1), torch.rand(3)
        weight = torch.tensor([1.0, 3.0])
        weighted = transport.training_losses(lambda x, t: 0.5 * x, x1, x0, t, weight)["loss"]
        repeated = transport.training_losses(lambda x, t: 0.5 * x, x1[..., often], x0[..., often], t)["loss"]
        torch.testing.assert_close(weighted, repeated)

    def test_draws_what_it_is_not_given(self) -> None:
        seen = []
        transport = Transport("linear", "noise", train_eps=0.2)
        transport.training_losses(lambda x, t: seen.append((x, t)) or x, torch.zeros(4000, 1, 1, 1))
        state, t = seen[0]
        assert 0.2 <= t.min() < 0.21 and 0.79 < t.max() <= 0.8
        noise = state[:, 0, 0, 0] / (1 - t)
        assert noise.std().item() == pytest.approx(1, abs=0.06)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="path='cosine'"):
            Transport("cosine")  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"train_eps=0\.5"):
            Transport(train_eps=0.5)
        with pytest.raises(ValueError, match="learn_sigma=False"):
            Transport().training_losses(lambda x, t: torch.cat([x, x], 1), draw(2, 4, 4, 4))


class TestIntervals:
    def test_of_the_authors(self) -> None:
        assert Transport().train_interval() == Transport().ode_interval() == (0, 1)
        assert Transport().sde_interval() == (0, 0.96)
        assert Transport("vp").train_interval() == (0, 1 - 1e-5)
        assert Transport("gvp", "score").ode_interval() == (1e-3, 1 - 1e-3)

    def test_chosen(self) -> None:
        transport = Transport(sample_eps=0.01)
        assert transport.ode_interval() == (0.01, 0.99)
        assert transport.sde_interval("sbdm", 0.1) == (0.01, 0.9)
        assert transport.sde_interval("sigma", 0) == (0, 0.99)


class TestSamplers:
    @plans
    @predictions
    def test_flow_maps_noise_to_the_data(self, plan: Path, prediction: Any) -> None:
        """The probability flow between two normals is linear: x_1 = MEAN + DEVIATION x_0."""
        transport = Transport(plan.name, prediction)
        start = torch.linspace(-2, 2, 9).reshape(9, 1)
        points = sample_ode(transport, Known(plan, prediction), start, points=3, atol=1e-5, rtol=1e-4)
        assert points.shape == (3, 9, 1) and torch.equal(points[0], start)
        torch.testing.assert_close(points[-1], MEAN + DEVIATION * start, atol=0.02, rtol=0)

    def test_order_of_the_solvers(self) -> None:
        transport, start = Transport(), torch.linspace(-2, 2, 9).reshape(9, 1)
        exact = MEAN + DEVIATION * start

        def error(method: str, points: int) -> float:
            network = Known(transport.plan)
            final = sample_ode(transport, network, start, method=method, points=points)[-1]
            assert network.calls == (points - 1) * {"euler": 1, "midpoint": 2, "heun3": 3}[method]
            return (final - exact).abs().max().item()

        assert 1.8 < error("euler", 41) / error("euler", 81) < 2.2
        assert error("midpoint", 11) / error("midpoint", 21) > 3.5
        assert error("heun3", 11) < error("midpoint", 11) < error("euler", 11)

    @plans
    def test_flow_back_to_the_noise(self, plan: Path) -> None:
        transport, start = Transport(plan.name), torch.linspace(-2, 2, 9).reshape(9, 1)
        data = sample_ode(transport, Known(plan), start, points=2, atol=1e-5, rtol=1e-4)[-1]
        back = sample_ode(transport, Known(plan), data, points=2, atol=1e-5, rtol=1e-4, reverse=True)[-1]
        torch.testing.assert_close(back, start, atol=0.02, rtol=0)

    @plans
    @pytest.mark.parametrize("form", DIFFUSION_FORMS)
    @pytest.mark.parametrize("method", ["euler", "heun"])
    def test_every_sde_ends_in_the_data(self, plan: Path, form: Any, method: Any) -> None:
        """Whatever the diffusion, the samples have the data's mean and deviation."""
        transport = Transport(plan.name, sample_eps=1e-3)
        self.check_sde(transport, Known(plan), form=form, method=method)

    @plans
    @predictions
    def test_every_prediction_samples_the_data(self, plan: Path, prediction: Any) -> None:
        self.check_sde(Transport(plan.name, prediction), Known(plan, prediction), form="sigma")

    @staticmethod
    def check_sde(transport: Transport, network: Known, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(10_000, 1, generator=generator)  # standard errors of both figures: 0.005
        # A short last step: it adds no noise, so a long one narrows the samples.
        options |= {"points": 150, "last_step_size": 0.005, "generator": generator}
        samples = sample_sde(transport, network, start, **options).sample
        assert samples.mean().item() == pytest.approx(MEAN, abs=0.06)
        assert samples.std().item() == pytest.approx(DEVIATION, abs=0.06)

    @pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie", None])
    def test_last_steps(self, last_step: Any) -> None:
        transport = Transport()
        states = sample_sde(transport, Known(transport.plan), draw(64, 1), last_step=last_step, points=30)
        assert torch.equal(states.before_last, states.sample) == (last_step is None)
        if last_step is not None:
            assert (states.sample - states.before_last).abs().max() < 1

    def test_tweedie_of_the_known_data(self) -> None:
        transport, start = Transport(), draw(64, 1)
        states = sample_sde(transport, Known(transport.plan), start, last_step="tweedie", last_step_size=0.5)
        t = torch.full((64, 1), 0.5)
        score = Known(transport.plan).score(states.before_last, t)
        torch.testing.assert_close(states.sample, (states.before_last + 0.25 * score) / 0.5)

    def test_seeded(self) -> None:
        transport = Transport()

        def sample(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return sample_sde(
                transport, Known(transport.plan), draw(4, 1), points=9, generator=generator
            ).sample

        assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))

    @pytest.mark.parametrize("path", ["linear", "gvp"])
    def test_infinite_diffusion_is_refused(self, path: Any) -> None:
        transport = Transport(path)
        with pytest.raises(ValueError, match="sample_eps"):
            sample_sde(transport, Known(transport.plan), draw(4, 1), form="sbdm")

    def test_errors(self) -> None:
        transport, start = Transport(), draw(4, 1)
        network = Known(transport.plan)
        for options, message in (
            ({"method": "milstein"}, "'milstein'"),
            ({"form": "huge"}, "'huge'"),
            ({"last_step": "jump"}, "'jump'"),
            ({"points": 1}, "points=1"),
            ({"last_step_size": 1.0}, r"last_step_size=1\.0"),
            ({"noises": draw(3, 4, 1)}, "3 noises for 249 steps"),
        ):
            with pytest.raises(ValueError, match=message):
                sample_sde(transport, network, start, **options)
        with pytest.raises(ValueError, match="points=1"):
            sample_ode(transport, network, start, points=1)
        assert network.calls == 0
