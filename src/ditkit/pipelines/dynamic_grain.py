"""Pictures of a class in two grains: first a map of where there is detail, then the picture on it.

A grain transformer draws which regions are fine, the content transformer denoises a latent whose coarse
regions hold one code each, copied to their cells, and the autoencoder of two grains decodes it. Schedulers
and samplers know nothing of regions and may disturb each cell by its own noise; the network reads one cell
of a coarse region, and so does the decoder, so that the region has one noise at every step.

Dimensions: B pictures, C latent channels, h x w regions, 2h x 2w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from ditkit.models.d2it import D2iT, GrainTransformer
from ditkit.models.d2it_autoencoder import DualGrainAutoencoder, multi_grained_noise
from ditkit.models.guidance import GuidedChannels
from ditkit.pipelines.class_conditional import ClassConditionalPipeline, Sampler


@dataclass
class DynamicGrainOutput(ImagePipelineOutput):
    """Pictures, and the maps (B, h, w) that they were drawn on, True where a region is fine."""

    grain: Tensor


class DynamicGrainPipeline(ClassConditionalPipeline):
    """Draws pictures of given classes on maps of fine and coarse regions.

    Args:
        transformer: a `D2iT`.
        scheduler: as `ClassConditionalPipeline`'s.
        vae: a `DualGrainAutoencoder`; without one ask for `output_type="latent"`.
        grain_transformer: a `GrainTransformer`; without one every call needs `grain`.
        fine_ratio: the share of fine regions in the training pictures, for random maps.
        class_names, guiding_transformer: as `ClassConditionalPipeline`'s.

    Raises:
        ValueError: a share outside [0, 1].
    """

    model_cpu_offload_seq = "grain_transformer->guiding_transformer->transformer->vae"
    _optional_components = ["vae", "grain_transformer", "guiding_transformer"]

    def __init__(
        self,
        transformer: D2iT,
        scheduler: Any,
        vae: DualGrainAutoencoder | None = None,
        grain_transformer: GrainTransformer | None = None,
        fine_ratio: float = 0.5,
        class_names: Sequence[str] | None = None,
        guiding_transformer: D2iT | None = None,
    ) -> None:
        if not 0 <= fine_ratio <= 1:
            raise ValueError(f"fine_ratio={fine_ratio}: expected a share, 0 to 1")
        super().__init__(transformer, scheduler, vae, class_names, guiding_transformer)
        self.register_modules(grain_transformer=grain_transformer)
        self.grain_transformer = grain_transformer
        self.register_to_config(fine_ratio=fine_ratio)

    def _pixels(self, vae: Any) -> int:
        return vae.cell

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        guidance_scale: float | None = None,
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
        grain: Tensor | Literal["random"] | None = None,
        num_grain_steps: int = 16,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> DynamicGrainOutput | tuple[Any]:
        """Draw pictures.

        Args:
            class_labels: as in `ClassConditionalPipeline`, and so all that is not named here. Guidance
                concerns the content; maps are drawn from the class alone.
            generator: for noise and maps that are the same again; the noise is drawn first, so that it does
                not depend on where the maps come from.
            grain: 1 or True where a region is fine, (h, w) or (B, h, w); "random": each region by itself,
                with the pipeline's `fine_ratio`; None: drawn by the grain transformer.
            num_grain_steps: in how many rounds the grain transformer fills a map.
            return_dict: whether to return an object with `.images` and `.grain`, or a tuple of the first.

        Raises:
            ValueError: for labels, sizes, channels, maps or a scheduler that do not fit the models.
        """
        labels = self._labels(class_labels, num_images_per_label)
        self._check(output_type, None if sampler else self.scheduler)
        noise = self._noise(len(labels), height, width, generator, latents)
        size = (noise.shape[2] // 2, noise.shape[3] // 2)
        regions = self._regions(labels, size, grain, num_grain_steps, generator)
        scale = self._scale(guidance_scale, class_labels is not None)
        guided = self._network(labels, scale, guidance_channels, guidance_interval, grain=regions)

        def network(state: Tensor, t: Tensor) -> Tensor:
            return guided(multi_grained_noise(state, regions), t)

        noise = multi_grained_noise(noise, regions)
        drawn = self._draw(network, noise, sampler, num_inference_steps, generator, callback_on_step_end)
        drawn = multi_grained_noise(drawn, regions)
        images: Any = drawn if output_type == "latent" else self._decode(drawn, output_type)
        self.maybe_free_model_hooks()
        return DynamicGrainOutput(images=images, grain=regions) if return_dict else (images,)

    def _regions(
        self,
        labels: Tensor,
        size: tuple[int, int],
        grain: Tensor | str | None,
        num_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """A map (B, h, w) for each of labels (B,), bool, on the model's device."""
        shape = (len(labels), *size)
        if isinstance(grain, Tensor):
            if tuple(grain.shape) not in (size, shape):
                raise ValueError(
                    f"grain has shape {tuple(grain.shape)}; expected one for each region, {size} or {shape}"
                )
            return grain.to(self._execution_device).bool().expand(shape)
        if isinstance(grain, str) and grain != "random":
            raise ValueError(f"grain={grain!r} is unknown: give a map, 'random' or None")
        if isinstance(generator, list):  # each picture's map by its own, so that none depends on the others
            if len(generator) != len(labels):
                raise ValueError(f"{len(generator)} generators for {len(labels)} pictures; give one for each")
            parts = zip(labels.split(1), generator, strict=True)
            return torch.cat([self._regions(label, size, grain, num_steps, one) for label, one in parts])
        if grain == "random":
            ratio: Any = self.config["fine_ratio"]
            device = "cpu" if generator is None else generator.device
            drawn = torch.rand(shape, generator=generator, device=device) < ratio
            return drawn.to(self._execution_device)
        if self.grain_transformer is None:
            raise ValueError("grain=None: the pipeline has no grain_transformer; give a map, or 'random'")
        if self.grain_transformer.grid != size:
            raise ValueError(
                f"grain=None: the grain transformer draws maps of {self.grain_transformer.grid} regions, "
                f"this latent has {size}; give a map, or the size it was trained for"
            )
        return self.grain_transformer.sample(labels, num_steps=num_steps, generator=generator)
