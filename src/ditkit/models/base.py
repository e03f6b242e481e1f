"""What every class-conditional network of ours answers alike: labels, guidance, checks, checkpointing.

Dimensions: B batch, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from torch import Tensor, nn

from ditkit.models.guidance import GuidedChannels, guide, guided_channels

ProcessName = Literal["gaussian", "flow"]


class Recomputing:
    """A network that may compute its blocks again in the backward pass: diffusers' gradient checkpointing."""

    _supports_gradient_checkpointing = True
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Any  # set by enable_gradient_checkpointing

    def run(self, block: nn.Module, *arguments: Any) -> Tensor:
        """The block's output; recomputed in the backward pass when checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)


class ClassConditionalModel(Recomputing, ModelMixin, ConfigMixin, CacheMixin):
    """A network `(latent (B, C, H, W), times (B,), labels (B,)) -> prediction (B, C_out, H, W)`.

    A subclass sets `in_channels`, `out_channels`, `latent_size`, `side_multiple` and `y_embedder`, and
    defines `forward(hidden_states, timestep, class_labels, force_drop_ids, return_dict)`.

    Attributes:
        latent_size: height and width that the model was built for.
        side_multiple: what both sides of a latent must be a multiple of.
        authors_guidance: the channels that the authors guide.
        objectives: what the trainer always trains it with, by name, with options.
    """

    authors_guidance: ClassVar[GuidedChannels] = 3
    objectives: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    in_channels: int
    out_channels: int
    latent_size: tuple[int, int]
    side_multiple: int
    y_embedder: Any

    @property
    def text_channels(self) -> int | None:
        """Width of the text states it reads; None: it reads no text."""
        return None

    @property
    def predicted_channels(self) -> int:
        """Channels of what `forward` returns."""
        return self.out_channels

    def unfit_for(self, process: ProcessName) -> str | None:
        """Why it can't be trained with a process, whole timesteps ("gaussian") or times from 0 to 1 ("flow");
        None when it can."""
        routing = getattr(self, "channel_routing", None)
        if routing is None or routing.unit_time == (process == "flow"):
            return None
        if routing.unit_time:
            return "its channels are routed by times from 0 to 1"
        return "its channels are routed by whole timesteps; route a SiT, whose times run from 0 to 1"

    def example_inputs(self) -> dict[str, Tensor]:
        """Arguments of a forward of one sample at the size the model was built for, all zero, on the current
        device."""
        whole = torch.zeros(1, dtype=torch.long)
        return {
            "hidden_states": torch.zeros(1, self.in_channels, *self.latent_size),
            "timestep": whole,
            "class_labels": whole,
        }

    def labels(self, class_labels: Tensor | None, batch: int) -> Tensor:
        """The labels (B,), the null class for all when there are none.

        Raises:
            ValueError: None on a model without null class.
        """
        if class_labels is None:
            return torch.full((batch,), self.y_embedder.null_label, dtype=torch.long, device=self.device)
        return class_labels

    def default_guidance(self) -> GuidedChannels:
        """The channels that the authors guide, all where there are fewer."""
        authors = self.authors_guidance
        return authors if isinstance(authors, str) else min(authors, self.in_channels)

    def forward_with_cfg(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        guidance_scale: float,
        guidance_channels: GuidedChannels | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """The guided prediction of a batch whose second half holds the null labels.

        Args:
            hidden_states: (B, C, H, W); the second half is ignored, the first one is used for both.
            timestep: times, (B,).
            class_labels: (B,), labels then null labels.
            guidance_scale: 1 is no guidance.
            guidance_channels: how many leading channels are guided, or "all" (of C); None: as the authors.
            **conditions: what else the model's forward takes, for both halves.

        Returns:
            (B, C_out, H, W); both halves hold the guided channels, the others are each half's own.

        Raises:
            ValueError: for an odd batch or a number of channels that the model does not have.
        """
        if hidden_states.shape[0] % 2:
            raise ValueError(
                f"guidance needs labels and null labels in equal number: batch {hidden_states.shape[0]}"
            )
        asked = self.default_guidance() if guidance_channels is None else guidance_channels
        channels = guided_channels(asked, self.in_channels)
        first_half = hidden_states[: hidden_states.shape[0] // 2]
        both = torch.cat([first_half, first_half])
        (prediction,) = self(both, timestep, class_labels, return_dict=False, **conditions)
        conditional, unconditional = prediction.chunk(2)
        return torch.cat(guide(conditional, unconditional, guidance_scale, channels))

    def check(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None) -> None:
        """Refuse inputs of the wrong shape.

        Raises:
            ValueError: naming the argument, its shape and the one expected.
        """
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.in_channels:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; "
                f"expected (B, {self.in_channels}, H, W)"
            )
        height, width = hidden_states.shape[-2:]
        if height % self.side_multiple or width % self.side_multiple:
            raise ValueError(
                f"a latent of {height}x{width} does not fit: pad or crop both sides to a multiple of "
                f"{self.side_multiple}"
            )
        for name, tensor in (("timestep", timestep), ("class_labels", class_labels)):
            if tensor is not None and tensor.shape != hidden_states.shape[:1]:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; expected one for each of the "
                    f"{hidden_states.shape[0]} samples"
                )


def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size given as one number or as two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def chosen(variants: dict[str, dict[str, Any]], name: str | None) -> dict[str, Any]:
    """The dimensions of a named variant; none for None.

    Raises:
        ValueError: no such variant; the message lists them.
    """
    if name is None:
        return {}
    if name not in variants:
        raise ValueError(f"no variant {name!r}; there are {', '.join(variants)}")
    return variants[name]
