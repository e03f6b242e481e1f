"""Gaussian diffusion: schedules, posterior, learned variance, losses, DDPM and DDIM."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditkit.processes import GaussianDiffusion
from ditkit.processes.gaussian import discretized_log_likelihood, normal_kl
from ditkit.processes.gaussian_sampling import ddim_reverse_step, ddim_step, ddpm_step, trajectory
from ditkit.processes.schedules import betas, respace

FULL = GaussianDiffusion.create(1000)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Oracle:
    """A network that knows the data: the noise that leads from `sample` to x_t, and a variance fraction."""

    def __init__(self, process: GaussianDiffusion, sample: Tensor, fraction: float = -1.0) -> None:
        self.process, self.sample, self.fraction = process, sample, fraction
        self.asked: list[int] = []

    def __call__(self, state: Tensor, timestep: Tensor) -> Tensor:
        self.asked.append(int(timestep[0]))
        t = torch.tensor([self.process.timesteps.index(int(step)) for step in timestep])
        noise = self.process.noise_from_sample(state, t, self.sample)
        return torch.cat([noise, torch.full_like(noise, self.fraction)], dim=1)


class TestSchedules:
    def test_linear(self) -> None:
        table = betas("linear", 1000)
        assert table.dtype == torch.float64 and len(table) == 1000
        assert table[[0, -1]].tolist() == pytest.approx([1e-4, 0.02], rel=1e-12)
        assert betas("linear", 500)[[0, -1]].tolist() == pytest.approx([2e-4, 0.04], rel=1e-12)

    def test_cosine(self) -> None:
        abar = (1 - betas("cosine", 1000)).cumprod(0)
        middle = (
            math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        )
        assert abar[499].item() == pytest.approx(middle, rel=1e-9)
        assert betas("cosine", 1000).max() == 0.999

    @given(steps=st.integers(2, 1500), data=st.data())
    def test_evenly_respaced(self, steps: int, data: st.DataObject) -> None:
        count = data.draw(st.integers(2, steps))
        kept = respace(steps, str(count))
        assert len(kept) == count and kept[0] == 0 and kept[-1] == steps - 1
        gaps = {b - a for a, b in itertools.pairwise(kept)}
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1

    @given(steps=st.integers(2, 1500), stride=st.integers(1, 400))
    def test_strided(self, steps: int, stride: int) -> None:
        count = len(range(0, steps, min(stride, steps - 1)))
        kept = respace(steps, f"ddim{count}")
        assert len(kept) == count and kept[0] == 0
        assert len({b - a for a, b in itertools.pairwise(kept)}) <= 1

    def test_sections(self) -> None:
        assert respace(10, "2,3") == [0, 4, 5, 7, 9]
        assert respace(11, [1, 1]) == [0, 6]  # the first section takes the odd step
        assert respace(7, "") == list(range(7))

    @pytest.mark.parametrize(
        ("steps", "respacing", "message"),
        [
            (10, "11", "can't keep 11"),
            (10, "0", "can't keep 0"),
            (10, "x", "not of the form"),
            (10, "ddim7", "7"),
        ],
    )
    def test_errors(self, steps: int, respacing: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            respace(steps, respacing)

    def test_more_errors(self) -> None:
        with pytest.raises(ValueError, match="more than 20"):
            betas("linear", 20)
        with pytest.raises(ValueError, match="'quadratic'"):
            betas("quadratic", 100)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="prediction='v'"):
            GaussianDiffusion.create(prediction="v")  # pyright: ignore[reportArgumentType]


class TestProcess:
    @pytest.mark.parametrize("respacing", ["", "250", "20", "2", "1", "ddim50", "10,15,25"])
    def test_respaced_steps_keep_their_noise_levels(self, respacing: str) -> None:
        process = GaussianDiffusion.create(1000, respacing)
        torch.testing.assert_close(process.abar, FULL.abar[list(process.timesteps)], rtol=1e-9, atol=0)
        t = torch.arange(process.num_steps)
        assert torch.equal(process.model_timestep(t), torch.tensor(process.timesteps))

    def test_posterior_is_bayes_rule(self) -> None:
        """q(x_(t-1) | x_t, x_0) from the product of the two normals it consists of."""
        process = GaussianDiffusion.create(1000, "50")
        t = torch.arange(1, 50)
        x0, state = draw(49, 3), draw(49, 3, seed=1)
        posterior = process.q_posterior(x0, state, t)
        beta, previous = process.betas[1:, None], process.abar_previous[1:, None]
        precision = (1 - beta) / beta + 1 / (1 - previous)
        mean = ((1 - beta).sqrt() * state / beta + previous.sqrt() * x0 / (1 - previous)) / precision
        torch.testing.assert_close(
            posterior.variance.double(), (1 / precision).expand(49, 3), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(posterior.mean.double(), mean, rtol=1e-4, atol=1e-5)

    def test_first_posterior_is_certain_and_its_log_finite(self) -> None:
        assert FULL.posterior_variance[0] == 0
        assert FULL.posterior_log_variance[0] == FULL.posterior_log_variance[1]

    def test_noise_and_sample_stand_for_each_other(self) -> None:
        x0, noise = draw(10, 2, 4, 4), draw(10, 2, 4, 4, seed=1)
        t = torch.arange(0, 400, 40)
        state = FULL.q_sample(x0, t, noise)
        assert state.dtype == torch.float32
        torch.testing.assert_close(FULL.sample_from_noise(state, t, noise), x0, atol=1e-4, rtol=0)
        torch.testing.assert_close(FULL.noise_from_sample(state, t, x0), noise, atol=1e-3, rtol=0)

    def test_learned_variance_lies_between_its_bounds(self) -> None:
        t, state = torch.tensor([0, 500, 999]), draw(3, 2, 4, 4)
        for fraction, bound in ((-1.0, FULL.posterior_log_variance), (1.0, FULL.betas.log())):
            output = torch.cat([state, torch.full_like(state, fraction)], dim=1)
            found = FULL.p_mean_variance(output, state, t).log_variance[:, 0, 0, 0]
            torch.testing.assert_close(found, bound[t].float())

    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
    def test_fixed_variances(self, variance: Any) -> None:
        process = GaussianDiffusion.create(1000, variance=variance)
        t, state = torch.tensor([0, 1, 500]), draw(3, 2, 4, 4)
        moments = process.p_mean_variance(state, state, t)
        small = process.posterior_variance
        expected = (
            small[t] if variance == "fixed_small" else torch.stack([small[1], *process.betas[[1, 500]]])
        )
        torch.testing.assert_close(moments.variance[:, 0, 0, 0], expected.float())
        assert moments.variance.shape == moments.log_variance.shape == state.shape

    def test_clipping(self) -> None:
        state, output = draw(2, 3, 4, 4), draw(2, 6, 4, 4, seed=1)
        t = torch.tensor([900, 900])
        assert FULL.p_mean_variance(output, state, t).sample.abs().max() > 1
        assert FULL.p_mean_variance(output, state, t, clip=True).sample.abs().max() <= 1

    def test_wrong_channels_are_explained(self) -> None:
        with pytest.raises(ValueError, match="learn_sigma=True"):
            FULL.p_mean_variance(draw(1, 3, 4, 4), draw(1, 3, 4, 4), torch.tensor([3]))


class TestLosses:
    t = torch.tensor([1, 10, 400, 999])

    def test_oracle_has_none(self) -> None:
        x0 = draw(4, 2, 4, 4)
        losses = FULL.training_losses(Oracle(FULL, x0), x0, self.t, draw(4, 2, 4, 4, seed=1))
        assert losses["mse"].max() < 1e-6
        assert losses["vb"].abs().max() < 1e-5  # the posterior itself: no divergence
        torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])

    def test_bound_trains_the_variance_only(self) -> None:
        x0, output = draw(4, 2, 4, 4), draw(4, 4, 4, 4, seed=1).requires_grad_()
        losses = FULL.training_losses(lambda x, t: output, x0, torch.tensor([0, 10, 400, 999]))
        (gradient,) = torch.autograd.grad(losses["vb"].sum(), output)
        assert gradient[:, :2].abs().max() == 0
        assert (gradient[:, 2:].abs().amax((1, 2, 3)) > 0).all()

    @pytest.mark.parametrize("loss", ["mse", "kl"])
    def test_weighted_elements_count_as_often_as_they_say(self, loss: Any) -> None:
        """Columns of weight 1 and 3 are a picture in which the second column is there three times."""
        process = GaussianDiffusion.create(1000, "20", loss=loss)
        x0, noise, output = draw(4, 2, 3, 2), draw(4, 2, 3, 2, seed=1), draw(4, 4, 3, 2, seed=2)
        t = torch.tensor([0, 3, 10, 19])
        weighted = process.training_losses(lambda x, t: output, x0, t, noise, torch.tensor([1.0, 3.0]))
        often = torch.tensor([0, 1, 1, 1])
        repeated = process.training_losses(
            lambda x, t: output[..., often], x0[..., often], t, noise[..., often]
        )
        assert set(weighted) == set(repeated)
        for name, value in weighted.items():
            torch.testing.assert_close(value, repeated[name])

    def test_predicting_the_sample(self) -> None:
        process = GaussianDiffusion.create(1000, prediction="sample", variance="fixed_small")
        x0 = draw(4, 2, 4, 4)
        losses = process.training_losses(lambda x, t: x0 + 0.5, x0, self.t)
        torch.testing.assert_close(losses["loss"], torch.full((4,), 0.25))
        assert set(losses) == {"loss", "mse"}

    def test_forms(self) -> None:
        x0, noise, output = draw(4, 2, 4, 4), draw(4, 2, 4, 4, seed=1), draw(4, 4, 4, 4, seed=2)
        t = torch.tensor([0, 5, 10, 19])
        losses = {
            form: GaussianDiffusion.create(1000, "20", loss=form).training_losses(
                lambda x, t: output, x0, t, noise
            )
            for form in ("mse", "rescaled_mse", "kl", "rescaled_kl")
        }
        torch.testing.assert_close(losses["rescaled_mse"]["vb"], losses["mse"]["vb"] * 20 / 1000)
        torch.testing.assert_close(losses["kl"]["loss"], losses["mse"]["vb"])
        torch.testing.assert_close(losses["rescaled_kl"]["loss"], losses["kl"]["loss"] * 20)

    def test_divergence(self) -> None:
        mean1, log1, mean2, log2 = (draw(50, seed=seed).double() for seed in range(4))
        one = torch.distributions.Normal(mean1, (0.5 * log1).exp())
        two = torch.distributions.Normal(mean2, (0.5 * log2).exp())
        torch.testing.assert_close(
            normal_kl(mean1, log1, mean2, log2), torch.distributions.kl_divergence(one, two)
        )

    @given(mean=st.floats(-1.2, 1.2), log_scale=st.floats(-3, 0.5))
    def test_likelihoods_of_all_values_sum_to_one(self, mean: float, log_scale: float) -> None:
        values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
        logs = discretized_log_likelihood(
            values, torch.full_like(values, mean), torch.full_like(values, log_scale)
        )
        assert logs.exp().sum().item() == pytest.approx(1, abs=1e-6)


class TestSampling:
    @pytest.mark.parametrize(("method", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
    @pytest.mark.parametrize("respacing", ["20", "ddim50", "1"])
    def test_oracle_leads_to_the_data(self, method: Any, eta: float, respacing: str) -> None:
        process = GaussianDiffusion.create(1000, respacing)
        x0 = draw(2, 3, 4, 4)
        oracle = Oracle(process, x0)
        states = list(trajectory(process, oracle, draw(2, 3, 4, 4, seed=1), method=method, eta=eta))
        assert oracle.asked == list(reversed(process.timesteps))
        torch.testing.assert_close(states[-1], x0, atol=1e-4, rtol=0)

    def test_ddim_with_eta_one_is_as_noisy_as_the_posterior(self) -> None:
        process = GaussianDiffusion.create(1000, "50")
        state, output, t = draw(4, 2, 4, 4), draw(4, 4, 4, 4, seed=1), torch.tensor([1, 5, 20, 49])
        noise = torch.ones_like(state)
        still = ddim_step(process, output, state, t, torch.zeros_like(state), eta=1.0)
        moved = ddim_step(process, output, state, t, noise, eta=1.0) - still
        torch.testing.assert_close(
            moved[:, 0, 0, 0], process.posterior_variance[t].sqrt().float(), atol=1e-5, rtol=0
        )
        posterior_mean = process.p_mean_variance(output, state, t).mean
        torch.testing.assert_close(still, posterior_mean, atol=1e-4, rtol=1e-4)

    def test_last_step_is_without_noise(self) -> None:
        state, output, t = draw(2, 2, 4, 4), draw(2, 4, 4, 4, seed=1), torch.tensor([0, 1])
        for step in (ddpm_step, lambda *arguments: ddim_step(*arguments, eta=1.0)):
            still, moved = (step(FULL, output, state, t, noise * torch.ones_like(state)) for noise in (0, 1))
            assert torch.equal(still[0], moved[0])
            assert not torch.equal(still[1], moved[1])

    def test_reverse_step_undoes_a_step(self) -> None:
        process = GaussianDiffusion.create(1000, "50")
        x0, noise = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
        t = torch.tensor([0, 10, 30])
        oracle = torch.cat([noise, noise], dim=1)
        ahead = ddim_reverse_step(process, oracle, process.q_sample(x0, t, noise), t)
        torch.testing.assert_close(ahead, process.q_sample(x0, t + 1, noise), atol=1e-4, rtol=0)
        back = ddim_step(process, oracle, ahead, t + 1, torch.zeros_like(ahead))
        torch.testing.assert_close(back, process.q_sample(x0, t, noise), atol=1e-4, rtol=0)

    def test_seeded(self) -> None:
        process = GaussianDiffusion.create(1000, "10")
        oracle, start = Oracle(process, draw(1, 2, 4, 4)), draw(1, 2, 4, 4, seed=1)

        def sample(seed: int) -> Tensor:
            states = trajectory(process, oracle, start, generator=torch.Generator().manual_seed(seed))
            return torch.stack(list(states))

        assert torch.equal(sample(1), sample(1))
        assert not torch.equal(sample(1)[0], sample(2)[0])

    def test_errors(self) -> None:
        start = draw(1, 2, 4, 4)
        with pytest.raises(ValueError, match="'euler'"):
            list(trajectory(FULL, Oracle(FULL, start), start, method="euler"))  # pyright: ignore
        with pytest.raises(ValueError, match="3 noises for 1000 steps"):
            list(trajectory(FULL, Oracle(FULL, start), start, noises=draw(3, 1, 2, 4, 4)))
