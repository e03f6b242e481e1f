"""Pictures of a text, from any architecture of `ditkit.models` that reads one.

One text encoder, CLIP's or T5's, gives a state for each token. What guidance leaves out is the text: the
second pass reads the empty one, or `negative_prompt`.

Dimensions: B pictures, C latent channels, H and W latent height and width, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from ditkit.models.base import ClassConditionalModel
from ditkit.models.guidance import GuidedChannels
from ditkit.models.text import text_conditions
from ditkit.pipelines.denoising import Callback, DenoisingPipeline, Generators, OutputType, Sampler


class TextConditionalPipeline(DenoisingPipeline):
    """Draws pictures of given texts.

    Args:
        tokenizer: of transformers; texts are padded to its `model_max_length`.
        text_encoder: a `CLIPTextModel` or `T5EncoderModel` whose states are as wide as the model's text.
        transformer: a model of ours that reads text: a `PTDiT`, or a `DiCo` with `text_width`.
        scheduler: as of `ClassConditionalPipeline`.
        vae: likewise.

    Raises:
        ValueError: a model that reads no text, or states of another width.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        transformer: ClassConditionalModel,
        scheduler: Any,
        vae: Any = None,
    ) -> None:
        super().__init__()
        width, reads = text_encoder.config.hidden_size, transformer.text_channels
        if reads != width:
            raise ValueError(
                f"text_encoder: its states are {width} wide, the {type(transformer).__name__} reads "
                + ("no text" if reads is None else f"{reads}")
            )
        self._hold(transformer, scheduler, vae, tokenizer=tokenizer, text_encoder=text_encoder)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        guidance_scale: float = 4.0,
        guidance_channels: GuidedChannels | None = None,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        sampler: Sampler | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures.

        Args:
            prompt: one text or several; tokens beyond the tokenizer's length are cut.
            negative_prompt: what guidance leads away from, one text or one for each prompt.
            guidance_scale: 1 is no guidance, and costs half.
            guidance_channels: how many leading channels are guided, or "all". None: as the model's authors.
            num_inference_steps: steps of the scheduler; a sampler has its own.
            num_images_per_prompt: pictures of each text.
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
            ValueError: for texts, sizes, channels or a scheduler that do not fit the model.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_images_per_prompt < 1:
            raise ValueError(
                f"prompt={prompt!r}, num_images_per_prompt={num_images_per_prompt}: nothing to draw"
            )
        self._check(output_type, None if sampler else self.scheduler)
        noise = self._noise(len(prompts) * num_images_per_prompt, height, width, generator, latents)
        without = None
        if guidance_scale != 1:
            negative = (
                [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
            )
            if len(negative) != len(prompts):
                raise ValueError(f"negative_prompt: {len(negative)} texts for {len(prompts)} prompts")
            without = self.encode_prompt(negative, num_images_per_prompt)
        conditions = self.encode_prompt(prompts, num_images_per_prompt)
        network = self._guided(conditions, without, guidance_scale, guidance_channels)
        drawn = self._draw(network, noise, sampler, num_inference_steps, generator, callback_on_step_end)
        return self._output(drawn, output_type, return_dict)

    def encode_prompt(self, prompts: Sequence[str], repeats: int = 1) -> dict[str, Tensor]:
        """What the model's forward is given of texts, each `repeats` times."""
        read = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        device = self._execution_device
        given = text_conditions(
            self.transformer, self.text_encoder, read.input_ids.to(device), read.attention_mask.to(device)
        )
        return {name: value.repeat_interleave(repeats, dim=0) for name, value in given.items()}
