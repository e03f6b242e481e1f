"""How architectures of ours read text: their settings for it, and what their forward is given.

Dimensions: B texts, T tokens, E width of the text's states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ditkit import models

TEXT_SETTINGS: dict[str, Callable[[int], dict[str, Any]]] = {}
"""Architecture -> (width E -> its configuration for text in place of classes); each file adds its own."""


def text_settings(name: str, width: int) -> dict[str, Any]:
    """The configuration with which an architecture reads text.

    Args:
        name: as of `models.create`, with or without a variant.
        width: E.

    Raises:
        UnknownNameError: no such architecture.
        ValueError: it has no place for text.
    """
    from ditkit import registry

    entry = registry.get("model", models.split(name)[0])
    if entry.name not in TEXT_SETTINGS:
        raise ValueError(f"{entry.name} reads no text; {', '.join(sorted(TEXT_SETTINGS))} do")
    return TEXT_SETTINGS[entry.name](width)


def reads_mask(transformer: nn.Module) -> bool:
    """Whether a model's forward is told which text tokens count."""
    return "encoder_attention_mask" in inspect.signature(transformer.forward).parameters


def text_conditions(
    transformer: nn.Module, text_encoder: Any, tokens: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """What a model's forward is given of some texts.

    A model that takes a mask gets one, and so does the text encoder then. For one that takes none padding is
    a part of the text, as it is for Stable Diffusion's CLIP.

    Args:
        transformer: a model of ours that reads text.
        text_encoder: of transformers, with `last_hidden_state`.
        tokens: (B, T).
        mask: 1 where a token is no padding, (B, T).

    Returns:
        `encoder_hidden_states` (B, T, E), and perhaps `encoder_attention_mask` (B, T).
    """
    if not reads_mask(transformer):
        return {"encoder_hidden_states": text_encoder(tokens).last_hidden_state}
    states = text_encoder(tokens, attention_mask=mask).last_hidden_state
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}
