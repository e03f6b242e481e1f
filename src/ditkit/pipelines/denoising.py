"""What the pipelines for our models share: the denoising loop, guidance, sizes, pictures and the checks.

Dimensions: B pictures, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditkit import registry
from ditkit.models.base import ClassConditionalModel
from ditkit.models.guidance import GuidedChannels, guide, guided_channels

Network = Callable[[Tensor, Tensor], Tensor]
"""`(x, t) -> guided prediction`, in the model's own time."""
Sampler = Callable[[Network, Tensor], Tensor]
"""`(network, noise) -> latents`, instead of a scheduler."""
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""`(pipeline, step, timestep, {"latents"})`, may return new latents."""
Generators = torch.Generator | list[torch.Generator] | None
OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def scheduler_for(
    process: Literal["gaussian", "flow"], learned_variance: bool, clip: bool, shift: float = 1.0
) -> Any:
    """The scheduler that draws from what a process of ours trained.

    Args:
        process: "gaussian", 1,000 linear steps, or "flow", velocities on the linear path.
        learned_variance: whether the model predicts one.
        clip: whether predicted samples are clipped to [-1, 1]; right for pixels, wrong for latents.
        shift: of a flow's times towards noise.
    """
    if process == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)
    return DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=clip,
        variance_type="learned_range" if learned_variance else "fixed_small",
        timestep_spacing="linspace",
    )


class DenoisingPipeline(DiffusionPipeline):
    """A transformer of ours, a scheduler and perhaps an autoencoder; a subclass knows the conditions."""

    transformer: ClassConditionalModel
    scheduler: Any
    vae: Any

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """A pipeline from a folder, as diffusers does it, whatever its transformer's architecture."""
        registry.entries("model")  # diffusers loads no class whose module is not imported yet
        return super().from_pretrained(*args, **kwargs)

    def _hold(self, transformer: ClassConditionalModel, scheduler: Any, vae: Any, **more: Any) -> None:
        """Take the parts on; what a subclass's constructor calls first."""
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, **more)
        self.scale = self._pixels(vae) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.scale)

    def _pixels(self, vae: Any) -> int:
        """Pixels a side of a latent."""
        if hasattr(vae, "spatial_compression_ratio"):
            return vae.spatial_compression_ratio
        return 2 ** (len(vae.config.block_out_channels) - 1)

    def _guided(
        self,
        conditions: Mapping[str, Tensor],
        without: Mapping[str, Tensor] | None,
        guidance_scale: float,
        guidance_channels: GuidedChannels | None,
    ) -> Network:
        """The network under guidance.

        Args:
            conditions: what the model's forward takes for each picture, (B, ...).
            without: the same for the pass without them; None: no guidance, and half the work.
            guidance_scale: 1 is no guidance.
            guidance_channels: see the pipelines.
        """
        if guidance_channels is None:
            guidance_channels = self.transformer.default_guidance()
        channels = guided_channels(guidance_channels, self.transformer.in_channels)
        if without is None or guidance_scale == 1:
            return lambda state, t: self.transformer(state, t, return_dict=False, **conditions)[0]
        both = {name: torch.cat([value, without[name]]) for name, value in conditions.items()}

        def network(state: Tensor, t: Tensor) -> Tensor:
            states, times = torch.cat([state, state]), torch.cat([t, t])
            prediction = self.transformer(states, times, return_dict=False, **both)[0]
            conditional, unconditional = prediction.chunk(2)
            return guide(conditional, unconditional, guidance_scale, channels)[0]

        return network

    def _within(self, guided: Network, plain: Network, interval: tuple[float, float]) -> Network:
        """Guided where the share of noise is in the interval, else plain.

        Raises:
            ValueError: an interval that is not of [0, 1], or out of order.
        """
        first, last = interval
        if not 0 <= first <= last <= 1:
            raise ValueError(f"guidance_interval={interval}: expected two shares of noise, 0 <= a <= b <= 1")
        if (first, last) == (0, 1):
            return guided
        flow = is_flow(self.scheduler)

        def network(state: Tensor, t: Tensor) -> Tensor:
            time = float(t.flatten()[0])
            share = 1 - time if flow else time / self.scheduler.config["num_train_timesteps"]
            return (guided if first <= share <= last else plain)(state, t)

        return network

    def _noise(
        self,
        batch: int,
        height: int | None,
        width: int | None,
        generator: Generators,
        latents: Tensor | None,
    ) -> Tensor:
        """What sampling starts from, (B, C, H, W): `latents`, or noise drawn for that size in pixels."""
        channels = self.transformer.in_channels
        if latents is None:
            shape = (batch, channels, *self._latent_size(height, width))
            latents = randn_tensor(shape, generator, self._execution_device, self.transformer.dtype)
        elif latents.shape[:2] != (batch, channels):
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; expected ({batch}, {channels}, H, W)"
            )
        return latents.to(self._execution_device, self.transformer.dtype)

    def _draw(
        self,
        network: Network,
        noise: Tensor,
        sampler: Sampler | None,
        steps: int,
        generator: Generators,
        callback: Callback | None,
    ) -> Tensor:
        """Latents (B, C, H, W) from noise, by the sampler or else the scheduler."""
        if sampler is not None:
            return sampler(network, noise)
        return self._denoise(network, noise, steps, generator, callback)

    def _denoise(
        self,
        network: Network,
        latents: Tensor,
        steps: int,
        generator: Generators,
        callback: Callback | None,
    ) -> Tensor:
        """The loop over the scheduler's timesteps, from noise to latents (B, C, H, W)."""
        scheduler, flow = self.scheduler, is_flow(self.scheduler)
        if flow and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            # Even steps down to zero; the schedulers' own choice makes a last step of a thousandth.
            scheduler.set_timesteps(
                sigmas=torch.linspace(1, 1 / steps, steps).tolist(), device=latents.device
            )
        else:
            scheduler.set_timesteps(steps, device=latents.device)
        learned = _learns_variance(scheduler)
        options = (
            {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        )
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        pipe: Any = self
        for index, timestep in enumerate(pipe.progress_bar(scheduler.timesteps)):
            state = latents if flow else scheduler.scale_model_input(latents, timestep)
            t = timestep.expand(len(latents))
            with self._caches():
                if flow:  # diffusers' time runs from data (0) to noise, ours from noise to data
                    prediction = -network(state, 1 - t / scheduler.config["num_train_timesteps"])
                else:
                    prediction = network(state, t)
                    prediction = prediction if learned else prediction[:, : self.transformer.in_channels]
            latents = scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
            if callback is not None:
                latents = callback(self, index, timestep, {"latents": latents}).get("latents", latents)
        return latents

    def _caches(self) -> contextlib.AbstractContextManager[Any]:
        """Where diffusers' caches, if one is on, keep what they hold; guidance is one pass here."""
        model: Any = self.transformer
        return model.cache_context("cond") if model.is_cache_enabled else contextlib.nullcontext()

    def _output(self, latents: Tensor, output_type: OutputType, return_dict: bool) -> Any:
        """What a call returns for latents (B, C, H, W)."""
        images: Any = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, latents: Tensor, output_type: OutputType) -> Any:
        """Pictures of latents (B, C, H, W)."""
        if self.vae is not None:
            latents = latents / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0)
            latents = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(latents, output_type=output_type)

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        multiple, default = self.transformer.side_multiple, self.transformer.latent_size
        sides = []
        for name, value, usual in (("height", height, default[0]), ("width", width, default[1])):
            if value is not None and value % (self.scale * multiple):
                raise ValueError(f"{name}={value}: expected a multiple of {self.scale * multiple}")
            sides.append(usual if value is None else value // self.scale)
        return sides[0], sides[1]

    def _check(self, output_type: str, scheduler: Any) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is unknown; there are 'pil', 'np', 'pt', 'latent'")
        channels = self.transformer.in_channels
        if output_type != "latent" and self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"latents of {channels} channels are no pictures: give the pipeline a vae, or ask for "
                "output_type='latent'"
            )
        if scheduler is None:
            return
        self._check_process(self.transformer, scheduler)
        variance = self.transformer.out_channels > channels
        if _learns_variance(scheduler) and not variance:
            raise ValueError(
                f"variance_type={scheduler.config['variance_type']!r} needs a model with learn_sigma=True"
            )

    @staticmethod
    def _check_process(model: ClassConditionalModel, scheduler: Any) -> None:
        """Refuse a scheduler that is of no process of the model's."""
        flow, variance = is_flow(scheduler), model.predicted_channels > model.in_channels
        reason = "it learns a variance" if flow and variance else None
        if reason := reason or model.unfit_for("flow" if flow else "gaussian"):
            raise ValueError(
                f"{type(scheduler).__name__} does not fit a {type(model).__name__}: {reason}; what predicts "
                "velocities needs a flow-matching scheduler or a sampler, a DiT with learned variance one of "
                "the others"
            )


def is_flow(scheduler: Any) -> bool:
    """Flow-matching schedulers have no class in common, only their names."""
    return "FlowMatch" in type(scheduler).__name__


def _learns_variance(scheduler: Any) -> bool:
    """Whether a scheduler takes the model's variance; `from_config` gives the option to any other too."""
    known = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return known and str(scheduler.config.get("variance_type", "")).startswith("learned")
