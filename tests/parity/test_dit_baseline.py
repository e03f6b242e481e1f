"""DiT and SiT against the authors' code: network, guidance, schedules, steps, losses, loops, samplers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.models.dit import DiT, SiT
from ditkit.processes import GaussianDiffusion, Transport
from ditkit.processes.gaussian_sampling import ddim_reverse_step, ddim_step, ddpm_step, trajectory
from ditkit.processes.paths import PATHS
from ditkit.processes.transport_sampling import sample_ode, sample_sde
from golden import cases, read

SYSTEM = "dit-baseline"
Tensors = dict[str, Tensor]


def part(tensors: Tensors, name: str) -> Tensors:
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def network(cls: type[DiT], case: dict[str, Any], tensors: Tensors) -> DiT:
    model = cls(**case["ctor"])
    model.load_state_dict(part(tensors, "weights"))
    return model.eval().requires_grad_(False)


def process(respacing: str, case: dict[str, Any]) -> GaussianDiffusion:
    """The authors' `create_diffusion` options in ours."""
    options = dict(case.get("create_diffusion_kwargs", {}))
    learned, small = options.pop("learn_sigma", True), options.pop("sigma_small", False)
    kl, rescaled = options.pop("use_kl", False), options.pop("rescale_learned_sigmas", False)
    created = GaussianDiffusion.create(
        options.pop("diffusion_steps", 1000),
        respacing or "",
        schedule={"linear": "linear", "squaredcos_cap_v2": "cosine"}[options.pop("noise_schedule", "linear")],
        prediction="sample" if options.pop("predict_xstart", False) else "epsilon",
        variance="learned_range" if learned else "fixed_small" if small else "fixed_large",
        loss="rescaled_kl" if kl else "rescaled_mse" if rescaled else "mse",
    )
    assert not options, f"options of the case that this test does not know: {sorted(options)}"
    return created


def network_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    """DiT: outputs and every intermediate."""
    model, inputs = network(DiT, case, tensors), part(tensors, "inputs")
    seen: Tensors = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: seen.__setitem__(name, output.clone())

    modules = {
        name: getattr(model, name) for name in ("x_embedder", "t_embedder", "y_embedder", "final_layer")
    }
    for index, block in enumerate(model.blocks):
        modules |= {f"block{index}": block, f"block{index}_attn": block.attn, f"block{index}_mlp": block.mlp}
    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    seen["out"] = model(inputs["x"], inputs["t"], inputs["y"]).sample
    for hook in hooks:
        hook.remove()
    if "t_fractional" in inputs:
        seen["out_fractional_t"] = model(inputs["x"], inputs["t_fractional"], inputs["y"]).sample
    if "x_cfg" in inputs:
        arguments = (inputs["x_cfg"], inputs["t_cfg"], inputs["y_cfg"], case["cfg_scale"])
        seen["out_with_cfg"] = model.forward_with_cfg(*arguments)
    if "force_drop_ids" in inputs:
        seen["y_embedding_dropped"] = model.y_embedder.train()(inputs["y"], inputs["force_drop_ids"])
    return seen


def diffusion_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    """The diffusion alone, with a given network output."""
    diffusion, inputs = process(case["timestep_respacing"], case), part(tensors, "inputs")
    clip = case["clip_denoised"]
    x0, noise, state, t = (inputs[name] for name in ("x_start", "noise", "x_t", "t"))
    output = inputs["model_output"].requires_grad_()
    noised = diffusion.q_sample(x0, t, noise)
    posterior = diffusion.q_posterior(x0, noised, t)
    moments = diffusion.p_mean_variance(output, state, t, clip=clip)
    asked: list[Tensor] = []

    def given(x: Tensor, timestep: Tensor) -> Tensor:
        asked.append(timestep)
        return output

    losses = diffusion.training_losses(given, x0, t, noise)
    (gradient,) = torch.autograd.grad(losses["loss"].mean(), output)
    draw = inputs["step_noise"]
    computed = {
        "x_t": noised,
        "posterior_mean": posterior.mean,
        "posterior_variance": posterior.variance,
        "posterior_log_variance_clipped": posterior.log_variance,
        "p_mean": moments.mean,
        "p_variance": moments.variance,
        "p_log_variance": moments.log_variance,
        "p_pred_xstart": moments.sample,
        "p_sample": ddpm_step(diffusion, output, state, t, draw, clip=clip),
        "ddim_reverse": ddim_reverse_step(diffusion, output, state, inputs["t_reverse"], clip=clip),
        "train_grad_wrt_model_output": gradient,
        "schedule_betas": diffusion.betas,
        "schedule_alphas_cumprod": diffusion.abar,
        "schedule_posterior_variance": diffusion.posterior_variance,
        "schedule_posterior_log_variance_clipped": diffusion.posterior_log_variance,
        "schedule_posterior_mean_coef1": diffusion.posterior_mean_sample,
        "schedule_posterior_mean_coef2": diffusion.posterior_mean_state,
        "schedule_sqrt_recip_alphas_cumprod": (1 / diffusion.abar).sqrt(),
        "schedule_sqrt_recipm1_alphas_cumprod": (1 / diffusion.abar - 1).sqrt(),
        "timestep_map": torch.tensor(diffusion.timesteps),
        "model_timesteps": asked[0],
        **{f"train_{name}": value for name, value in losses.items()},
    }
    for name in part(tensors, "outputs"):
        if match := re.fullmatch(r"ddim_eta([\d.]+)", name):
            eta = float(match[1])
            computed[name] = ddim_step(diffusion, output, state, t, draw, eta=eta, clip=clip)
    return computed


def loop_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    """The whole sampling loop with guidance."""
    model, inputs = network(DiT, case, tensors), part(tensors, "inputs")
    diffusion = process(case["respacing"], case)
    method, _, options = case["sampler"].partition(" ")
    eta = float(options.removeprefix("eta=")) if options else 0.0

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return model.forward_with_cfg(x, t, inputs["y"], case["cfg_scale"])

    states = trajectory(
        diffusion,
        guided,
        inputs["z"],
        method=method,
        eta=eta,
        clip=case["clip_denoised"],
        noises=inputs["step_noises"],
    )
    return {"trajectory": torch.stack(list(states)), "timestep_map": torch.tensor(diffusion.timesteps)}


def sit_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    """SiT: the network and every sampler whose result the file holds."""
    model, inputs = network(SiT, case, tensors), part(tensors, "inputs")
    path, prediction = case["transport"].lower().split("/")
    transport = Transport(path=path, prediction=prediction)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return model.forward_with_cfg(x, t, inputs["y_cfg"], case["cfg_scale"])

    computed = {"out": model(inputs["x"], inputs["t"], inputs["y"]).sample}
    twice, times = inputs["x"].repeat(2, 1, 1, 1), inputs["t"].repeat(2)
    computed["out_with_cfg"] = guided(twice, times)
    names = part(tensors, "outputs")
    atol, rtol = case.get("ode_atol_rtol", (1e-6, 1e-3))
    for name, expected in names.items():
        if match := re.fullmatch(r"ode_(\w+)", name):
            points = sample_ode(
                transport,
                guided,
                inputs["z"],
                method=match[1],
                points=case["ode_num_steps"],
                atol=atol,
                rtol=rtol,
            )
            computed[name] = points if expected.ndim == points.ndim else points[-1]
        elif match := re.fullmatch(r"sde_([A-Za-z]+)_([A-Za-z-]+)_([A-Za-z]+)_final", name):
            states = sample_sde(
                transport,
                guided,
                inputs["z"],
                method=match[1].lower(),
                form=diffusion_form(match[2]),
                last_step=None if match[3] == "None" else match[3].lower(),
                norm=case["diffusion_norm"],
                points=case["sde_num_steps"],
                last_step_size=case["last_step_size"],
                noises=inputs["sde_noises"],
            )
            computed[name] = states.sample
            computed[name.removesuffix("final") + "before_last"] = states.before_last
    return computed


def diffusion_form(name: str) -> Any:
    """The authors' name of a diffusion form, one of which they misspell, in ours."""
    return name.lower().replace("inccreasing", "increasing")


def transport_outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    """SiT's paths: losses, drifts, intervals, conversions, diffusions, coefficients."""
    inputs, output = part(tensors, "inputs"), part(tensors, "inputs")["model_output"]
    x0, x1, conv_t = inputs["x0"], inputs["x1"], inputs["conv_t"]
    computed: Tensors = {}
    for name in part(tensors, "outputs"):
        kind, *rest = name.split("_")
        if kind == "loss":
            path, prediction, weight = rest
            weighted = Transport(path.lower(), prediction, weight=None if weight == "none" else weight)
            t = inputs[f"t_{path}_{prediction}"]
            computed[name] = weighted.training_losses(lambda x, t: output, x1, x0, t)["loss"]
        elif kind in ("xt", "ut", "drift", "score"):
            path, prediction = rest
            transport = Transport(path.lower(), prediction)
            t = inputs[f"t_{path}_{prediction}"]
            time = transport.plan.time(t, x1)
            state = transport.plan.interpolate(x0, x1, time)
            computed[name] = {
                "xt": state,
                "ut": transport.plan.velocity(x0, x1, time),
                "drift": transport.velocity(output, state, t),
                "score": transport.score(output, state, t),
            }[kind]
        elif kind == "interval":
            solver, *form, path, prediction = rest
            transport = Transport(path.lower(), prediction)
            interval = transport.ode_interval()
            if solver == "sde":
                interval = transport.sde_interval(diffusion_form(form[0]), case.get("last_step_size", 0.04))
            computed[name] = torch.tensor(interval)
        elif kind == "conv":
            path = rest[-1]
            plan, velocity, state = PATHS[path.lower()](), inputs[f"conv_v_{path}"], inputs[f"conv_x_{path}"]
            time = plan.time(conv_t, state)
            score = plan.score_from_velocity(velocity, state, time)
            computed[name] = {
                "score": score,
                "noise": plan.noise_from_velocity(velocity, state, time),
                "v_from_score": plan.velocity_from_score(score, state, time),
            }["_".join(rest[:-1])]
        elif kind == "diffusion":
            form, path = rest
            plan = PATHS[path.lower()]()
            computed[name] = plan.diffusion(
                plan.time(conv_t, x1), diffusion_form(form), case["diffusion_norm"]
            )
        elif kind in ("alpha", "dalpha", "sigma", "dsigma"):
            plan = PATHS[rest[0].lower()]()
            function = kind[1:] + "_rate" if kind.startswith("d") else kind
            computed[name] = getattr(plan, function)(conv_t)
    return computed


def interpret(case: dict[str, Any]) -> Callable[[dict[str, Any], Tensors], Tensors]:
    """What a file holds, from its metadata."""
    if case.get("class") == "DiT":
        return network_outputs
    if case.get("class") == "SiT":
        return sit_outputs
    if "sampler" in case:
        return loop_outputs
    if "timestep_respacing" in case:
        return diffusion_outputs
    if case.get("function", "").startswith("create_transport"):
        return transport_outputs
    raise AssertionError(f"this test can't interpret the case {case}")


@pytest.mark.parametrize("path", cases(SYSTEM))
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    computed = interpret(case)(case, tensors)
    expected = part(tensors, "outputs")
    assert expected
    assert not set(expected) - set(computed), "outputs that this test can't interpret"
    for name, value in expected.items():
        # Float32 resolves 1e-5 up to about 100 only; trajectories of a random network reach 500.
        atol = 1e-5 * max(1.0, value.abs().max().item())
        actual = computed[name].detach().to(value.dtype)
        torch.testing.assert_close(actual, value, atol=atol, rtol=0.0, msg=lambda m, n=name: f"{n}: {m}")
