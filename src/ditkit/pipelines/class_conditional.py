"""Pictures of a class, from any class-conditional architecture of `ditkit.models`.

diffusers' own DiTPipeline is bound to ImageNet's null label and to latents of one size; here the null label
is the model's, guidance covers the channels one asks for, and the sampler may be a diffusers scheduler or any
function, such as those of `ditkit.processes`.

Dimensions: B pictures, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from ditkit.models.base import ClassConditionalModel
from ditkit.models.guidance import GuidedChannels, guide, guided_channels
from ditkit.pipelines.denoising import (
    Callback,
    DenoisingPipeline,
    Generators,
    Network,
    OutputType,
    Sampler,
)

GUIDANCE_SCALE = 4.0
AUTOGUIDANCE_SCALE = 1.42  # of arXiv 2510.11690 for pictures of 256 x 256

__all__ = ["ClassConditionalPipeline", "Sampler", "find_class"]


class ClassConditionalPipeline(DenoisingPipeline):
    """Draws pictures of given classes.

    Args:
        transformer: a `ClassConditionalModel`, such as a `DiT` or `SiT`.
        scheduler: a diffusers scheduler: DDPM (with `variance_type="learned_range"` for the learned
            variance), DDIM, DPM-Solver and the like for a DiT; a flow-matching one for a SiT, or a DiT
            without variance, that was trained on velocities of the linear path from noise (t = 0) to data
            (diffusers' reversed time and sign are converted here).
        vae: an `AutoencoderKL`; without one the latents are the pictures, and have 1 or 3 channels, or are
            asked for with `output_type="latent"`.
        class_names: in the order of their labels; None: classes are known by number only.
        guiding_transformer: see `guide_by`.

    Raises:
        ValueError: names in another number than the model's classes; a guiding model of other samples.
    """

    model_cpu_offload_seq = "guiding_transformer->transformer->vae"
    _optional_components = ["vae", "guiding_transformer"]
    guiding_transformer: ClassConditionalModel | None

    def __init__(
        self,
        transformer: ClassConditionalModel,
        scheduler: Any,
        vae: Any = None,
        class_names: Sequence[str] | None = None,
        guiding_transformer: ClassConditionalModel | None = None,
    ) -> None:
        super().__init__()
        self._hold(transformer, scheduler, vae)
        self.guide_by(guiding_transformer)
        classes = transformer.y_embedder.num_classes
        if class_names is not None and len(class_names) != classes:
            raise ValueError(f"class_names: {len(class_names)} names for a model of {classes} classes")
        self.class_names = None if class_names is None else list(class_names)
        self.register_to_config(class_names=self.class_names)

    def guide_by(self, model: ClassConditionalModel | None) -> None:
        """Guide by another model instead of by leaving out the class; None: by leaving out the class.

        AutoGuidance, Karras et al., arXiv 2406.02507: the prediction is pushed away from that of a weaker
        model, smaller or less trained, of the same samples, `v = v_weak + guidance_scale (v - v_weak)`.
        Models of any two of our architectures go together.

        Raises:
            ValueError: a model of other channels or classes.
        """
        if model is not None:
            for name, theirs, ours in (
                ("channels", model.in_channels, self.transformer.in_channels),
                ("classes", model.y_embedder.num_classes, self.transformer.y_embedder.num_classes),
            ):
                if theirs != ours:
                    raise ValueError(
                        f"guiding_transformer: a {type(model).__name__} of {theirs} {name} can't guide a "
                        f"{type(self.transformer).__name__} of {ours}"
                    )
        self.register_modules(guiding_transformer=model)

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
        generator: Generators = None,
        latents: Tensor | None = None,
        sampler: Sampler | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures.

        Args:
            class_labels: one class or several, by label, 0..num_classes-1, or by name; None draws without a
                class.
            guidance_scale: 1 is no guidance, and costs half. None: 4, or 1.42 with a guiding model.
            guidance_channels: how many leading channels are guided, or "all", as diffusers does. None: as the
                model's authors, 3 for a DiT or SiT (all where there are fewer); all with a guiding model.
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
            guidance_interval: shares of noise, 0 for the data and 1 for the noise, between which it guides.

        Raises:
            ValueError: for labels, sizes, channels or a scheduler that do not fit the model.
        """
        labels = self._labels(class_labels, num_images_per_label)
        scale = self._scale(guidance_scale, class_labels is not None)
        network = self._network(labels, scale, guidance_channels, guidance_interval)
        self._check(output_type, None if sampler else self.scheduler)
        noise = self._noise(len(labels), height, width, generator, latents)
        drawn = self._draw(network, noise, sampler, num_inference_steps, generator, callback_on_step_end)
        return self._output(drawn, output_type, return_dict)

    def find(self, asked: str) -> int:
        """The label of a class by its name, whatever the case, or by its number.

        Raises:
            ValueError: no such class; the nearest names.
        """
        return find_class(self._names, asked, self.transformer.y_embedder.num_classes)

    @property
    def classes(self) -> list[str]:
        """What `find` knows the classes by, in the order of their labels: names, or else numbers."""
        return list(self._names or map(str, range(self.transformer.y_embedder.num_classes)))

    @property
    def _names(self) -> list[str] | None:
        """Of the classes; an adapter may have put classes of its own in."""
        return self.transformer.y_embedder.class_names or self.class_names

    def _network(
        self,
        labels: Tensor,
        guidance_scale: float,
        guidance_channels: GuidedChannels | None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        **conditions: Tensor,
    ) -> Network:
        """`(x, t) -> guided prediction` for labels (B,) and what else the model's forward takes for each."""
        given = {"class_labels": labels, **conditions}
        plain = self._guided(given, None, 1.0, guidance_channels)
        if guidance_scale == 1:
            return plain
        if self.guiding_transformer is None:
            null = torch.full_like(labels, self.transformer.y_embedder.null_label)
            without = {"class_labels": null, **conditions}
            guided = self._guided(given, without, guidance_scale, guidance_channels)
        else:
            guided = self._guided_away(given, guidance_scale, guidance_channels or "all")
        return self._within(guided, plain, guidance_interval)

    def _guided_away(self, conditions: dict[str, Tensor], scale: float, asked: GuidedChannels) -> Network:
        """The network, guided by the other model."""
        channels, weaker = guided_channels(asked, self.transformer.in_channels), self.guiding_transformer
        assert weaker is not None

        def network(state: Tensor, t: Tensor) -> Tensor:
            strong = self.transformer(state, t, return_dict=False, **conditions)[0]
            weak = weaker(state, t, return_dict=False, **conditions)[0]
            return guide(strong, weak, scale, channels)[0]

        return network

    def _scale(self, asked: float | None, labelled: bool) -> float:
        """The guidance scale of a call; without labels there is no class to leave out."""
        if self.guiding_transformer is not None:
            return AUTOGUIDANCE_SCALE if asked is None else asked
        return (GUIDANCE_SCALE if asked is None else asked) if labelled else 1.0

    def _check(self, output_type: str, scheduler: Any) -> None:
        super()._check(output_type, scheduler)
        if self.guiding_transformer is not None and scheduler is not None:
            self._check_process(self.guiding_transformer, scheduler)

    def _labels(self, class_labels: Any, repeats: int) -> Tensor:
        """Labels (B,) on the model's device."""
        if repeats < 1:
            raise ValueError(f"num_images_per_label={repeats}: expected 1 or more")
        classes = self.transformer.y_embedder.num_classes
        if class_labels is None:
            class_labels = [self.transformer.y_embedder.null_label]
        elif isinstance(class_labels, int | str):
            class_labels = [class_labels]
        if not isinstance(class_labels, Tensor):
            class_labels = [self.find(one) if isinstance(one, str) else one for one in class_labels]
        labels = torch.as_tensor(class_labels, device=self._execution_device).flatten()
        if labels.numel() == 0 or labels.is_floating_point():
            raise ValueError(f"class_labels={class_labels!r}: expected whole numbers")
        limit = self.transformer.y_embedder.num_rows
        if labels.min() < 0 or labels.max() >= limit:
            raise ValueError(f"class_labels={labels.tolist()}: the model's classes are 0 to {classes - 1}")
        return labels.repeat_interleave(repeats)


def find_class(names: Sequence[str] | None, asked: str, count: int) -> int:
    """The label of a class by its name, whatever the case, or by its number.

    Args:
        names: of the classes; None: they have numbers only.
        asked: a name, or a number as text; a class whose name is a number goes by its name.
        count: how many classes there are.

    Raises:
        ValueError: no such class; the nearest names.
    """
    wanted = asked.strip().lower()
    known = [name.lower() for name in names or ()]
    if wanted in known:
        return known.index(wanted)
    if wanted.isdecimal() and int(wanted) < count:
        return int(wanted)
    if names is None:
        raise ValueError(f"no class {asked!r}: the model's classes have no names; give 0 to {count - 1}")
    near = [names[known.index(name)] for name in difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)]
    some = ", ".join(names[:8]) + (", ..." if count > 8 else "")
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {some}."
    raise ValueError(f"no class {asked!r}: {hint} A number from 0 to {count - 1} does too")
