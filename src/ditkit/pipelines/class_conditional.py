"""Pictures of a class, from any class-conditional architecture of `ditkit.models`.

diffusers' own DiTPipeline is bound to ImageNet's null label and to latents of one size; here the null label
is the model's, guidance covers the channels one asks for, and the sampler may be a diffusers scheduler or any
function, such as those of `ditkit.processes`.

Dimensions: B pictures, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditkit.models.base import ClassConditionalModel
from ditkit.models.dit import SiT
from ditkit.models.guidance import GuidedChannels, guide, guided_channels

Sampler = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor], Tensor]
"""`(network, noise) -> latents`; the network is `(x, t) -> guided prediction`, in the model's own time."""


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws pictures of given classes.

    Args:
        transformer: a `ClassConditionalModel`, such as a `DiT` or `SiT`.
        scheduler: a diffusers scheduler: DDPM (with `variance_type="learned_range"` for the learned
            variance), DDIM, DPM-Solver and the like for a DiT; a flow-matching one for a SiT, or a DiT
            without variance, that was trained on velocities of the linear path from noise (t = 0) to data
            (diffusers' reversed time and sign are converted here).
        vae: an `AutoencoderKL`; without one the latents are the pictures, and have 1 or 3 channels, or are
            asked for with `output_type="latent"`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(self, transformer: ClassConditionalModel, scheduler: Any, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.transformer, self.scheduler, self.vae = transformer, scheduler, vae
        self.scale = self._pixels(vae) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.scale)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 4.0,
        guidance_channels: GuidedChannels | None = None,
        num_inference_steps: int = 50,
        num_images_per_label: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        sampler: Sampler | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures.

        Args:
            class_labels: one label or several, 0..num_classes-1; None draws without a class.
            guidance_scale: 1 is no guidance, and costs half.
            guidance_channels: how many leading channels are guided, or "all", as diffusers does. None: as the
                model's authors, 3 for a DiT or SiT (all where there are fewer).
            num_inference_steps: steps of the scheduler; a sampler has its own.
            num_images_per_label: pictures of each label.
            height: of the pictures in pixels; by default what the model was built for.
            width: likewise.
            generator: for noise that is the same again.
            latents: starting noise, (B, C, H, W); drawn when None.
            sampler: used instead of the scheduler.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent".
            return_dict: whether to return an object with `.images`, or a tuple.
            callback_on_step_end: `(pipeline, step, timestep, {"latents"})`, may return new latents; with the
                scheduler only.

        Raises:
            ValueError: for labels, sizes, channels or a scheduler that do not fit the model.
        """
        labels = self._labels(class_labels, num_images_per_label)
        scale = 1.0 if class_labels is None else guidance_scale
        network = self._network(labels, scale, guidance_channels)
        self._check(output_type, None if sampler else self.scheduler)
        noise = self._noise(len(labels), height, width, generator, latents)
        if sampler is not None:
            drawn = sampler(network, noise)
        else:
            drawn = self._denoise(network, noise, num_inference_steps, generator, callback_on_step_end)
        images: Any = drawn if output_type == "latent" else self._decode(drawn, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _pixels(self, vae: Any) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(vae.config.block_out_channels) - 1)

    def _network(
        self,
        labels: Tensor,
        guidance_scale: float,
        guidance_channels: GuidedChannels | None,
        **conditions: Tensor,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`(x, t) -> guided prediction` for labels (B,) and what else the model's forward takes for each."""
        if guidance_channels is None:
            guidance_channels = self.transformer.default_guidance()
        channels = guided_channels(guidance_channels, self.transformer.in_channels)
        if guidance_scale == 1:
            return lambda state, t: self.transformer(state, t, labels, return_dict=False, **conditions)[0]
        both = torch.cat([labels, torch.full_like(labels, self.transformer.y_embedder.null_label)])
        twice = {name: torch.cat([value, value]) for name, value in conditions.items()}

        def network(state: Tensor, t: Tensor) -> Tensor:
            states, times = torch.cat([state, state]), torch.cat([t, t])
            prediction = self.transformer(states, times, both, return_dict=False, **twice)[0]
            conditional, unconditional = prediction.chunk(2)
            return guide(conditional, unconditional, guidance_scale, channels)[0]

        return network

    def _noise(
        self,
        batch: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
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

    def _denoise(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        latents: Tensor,
        steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None,
    ) -> Tensor:
        """The loop over the scheduler's timesteps, from noise to latents (B, C, H, W)."""
        scheduler, flow = self.scheduler, _is_flow(self.scheduler)
        if flow and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            # Even steps down to zero; the schedulers' own choice makes a last step of a thousandth.
            scheduler.set_timesteps(
                sigmas=torch.linspace(1, 1 / steps, steps).tolist(), device=latents.device
            )
        else:
            scheduler.set_timesteps(steps, device=latents.device)
        learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
        options = (
            {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        )
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        progress_bar: Any = self.progress_bar
        for index, timestep in enumerate(progress_bar(scheduler.timesteps)):
            state = latents if flow else scheduler.scale_model_input(latents, timestep)
            t = timestep.expand(len(latents))
            if flow:  # diffusers' time runs from data (0) to noise, ours from noise to data
                prediction = -network(state, 1 - t / scheduler.config["num_train_timesteps"])
            else:
                prediction = network(state, t)
                prediction = prediction if learned else prediction[:, : self.transformer.in_channels]
            latents = scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
            if callback is not None:
                latents = callback(self, index, timestep, {"latents": latents}).get("latents", latents)
        return latents

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Pictures of latents (B, C, H, W)."""
        if self.vae is not None:
            latents = latents / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0)
            latents = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(latents, output_type=output_type)

    def _labels(self, class_labels: int | Sequence[int] | Tensor | None, repeats: int) -> Tensor:
        """Labels (B,) on the model's device."""
        if repeats < 1:
            raise ValueError(f"num_images_per_label={repeats}: expected 1 or more")
        classes = self.transformer.y_embedder.num_classes
        if class_labels is None:
            class_labels = [self.transformer.y_embedder.null_label]
        elif isinstance(class_labels, int):
            class_labels = [class_labels]
        labels = torch.as_tensor(class_labels, device=self._execution_device).flatten()
        if labels.numel() == 0 or labels.is_floating_point():
            raise ValueError(f"class_labels={class_labels!r}: expected whole numbers")
        limit = self.transformer.y_embedder.num_rows
        if labels.min() < 0 or labels.max() >= limit:
            raise ValueError(f"class_labels={labels.tolist()}: the model's classes are 0 to {classes - 1}")
        return labels.repeat_interleave(repeats)

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        multiple, default = self.transformer.side_multiple, self.transformer.latent_size
        sides = []
        for name, value, usual in (("height", height, default[0]), ("width", width, default[1])):
            if value is not None and value % (self.scale * multiple):
                raise ValueError(f"{name}={value}: expected a multiple of {self.scale * multiple}")
            sides.append(usual if value is None else value // self.scale)
        return sides[0], sides[1]

    def _check(self, output_type: str, scheduler: Any) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown; there are 'pil', 'np', 'pt', 'latent'")
        channels = self.transformer.in_channels
        if output_type != "latent" and self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"latents of {channels} channels are no pictures: give the pipeline a vae, or ask for "
                "output_type='latent'"
            )
        if scheduler is None:
            return
        sit, variance = isinstance(self.transformer, SiT), self.transformer.out_channels > channels
        if (variance and not sit) if _is_flow(scheduler) else sit:
            raise ValueError(
                f"{type(scheduler).__name__} does not fit a {type(self.transformer).__name__}: a SiT needs a "
                "flow-matching scheduler or a sampler, a DiT with learned variance one of the others"
            )
        learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
        if learned and not variance:
            raise ValueError(
                f"variance_type={scheduler.config['variance_type']!r} needs a model with learn_sigma=True"
            )


def _is_flow(scheduler: Any) -> bool:
    """Flow-matching schedulers have no class in common, only their names."""
    return "FlowMatch" in type(scheduler).__name__
