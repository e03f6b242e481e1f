"""Architectures: one paper, one file; what they share is in `layers`."""

from __future__ import annotations

from typing import Any

from ditkit import registry


def create(name: str, **config: Any) -> Any:
    """A freshly initialised model by name.

    Args:
        name: a registered architecture, alone (`"dit"`: its defaults) or with a variant (`"dit-xl/2"`).
        **config: changes to the configuration, e.g. `input_size=64`.

    Returns:
        The diffusers `ModelMixin`.

    Raises:
        UnknownNameError: no such architecture; the message lists the nearest ones.
        ValueError: no such variant of it; the message lists the variants.
    """
    architecture, variant = split(name)
    return registry.get("model", architecture).target(variant, **config)


def split(name: str) -> tuple[str, str | None]:
    """Architecture and variant of a name: ("dit", "xl/2") of "DiT-XL/2"; an unknown name is left whole."""
    wanted = name.lower()
    # The longest name wins: an architecture's own name may hold a dash and begin with another's.
    known = sorted(registry.entries("model"), key=len, reverse=True)
    architecture = next((k for k in known if wanted == k or wanted.startswith(f"{k}-")), name)
    return architecture, wanted[len(architecture) + 1 :] or None
