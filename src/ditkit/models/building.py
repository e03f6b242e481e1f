"""Models for a data set: which settings of an architecture follow from the data, and where it starts.

An architecture whose settings are not the usual ones registers its own in `SETTINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditkit import models, registry
from ditkit.models.base import ClassConditionalModel
from ditkit.models.layouts import way_from


@dataclass(frozen=True)
class DataShape:
    """What a data set and a process ask of a model.

    Args:
        size: height and width of the samples.
        channels: of the samples.
        classes: how many there are.
        variance: whether a variance can be learned, in as many channels again.
    """

    size: tuple[int, int]
    channels: int
    classes: int
    variance: bool


SettingsFor = Callable[[DataShape, str | None], dict[str, Any]]
"""`(shape, variant) -> configuration`, of one architecture."""

SETTINGS: dict[str, SettingsFor] = {}


def usual_settings(shape: DataShape, variant: str | None = None) -> dict[str, Any]:
    """The names that most architectures have for them."""
    return {
        "input_size": shape.size,
        "in_channels": shape.channels,
        "num_classes": shape.classes,
        "learn_sigma": shape.variance,
    }


def settings_for(name: str, shape: DataShape) -> dict[str, Any]:
    """The configuration that follows from the data, for an architecture with or without a variant."""
    architecture, variant = models.split(name)
    return SETTINGS.get(architecture, usual_settings)(shape, variant)


def build(
    name: str, shape: DataShape, config: Mapping[str, Any] | None = None, start: Path | None = None
) -> ClassConditionalModel:
    """A model for a data set.

    Args:
        name: as of `models.create`.
        shape: of the data.
        config: changes to the configuration.
        start: the folder of a trained model of another architecture, whose weights it takes over; the sizes
            are then that model's.

    Raises:
        UnknownNameError: no such architecture.
        ValueError: a configuration that does not exist or fit, an architecture that is no class-conditional
            network, or that starts from no such model.
    """
    settings = {**settings_for(name, shape), **(config or {})}
    try:
        model = models.create(name, **settings) if start is None else _inherited(name, start, settings)
    except TypeError as error:
        raise ValueError(f"{name} can't be built with {settings}: {error}") from error
    if not isinstance(model, ClassConditionalModel) or model.y_embedder is None:
        raise ValueError(f"{name} ({type(model).__name__}) is no class-conditional network")
    if model.latent_size != shape.size or model.in_channels != shape.channels:
        raise ValueError(
            f"{name} is built for {model.in_channels} x {model.latent_size[0]} x {model.latent_size[1]}, the "
            f"samples are {shape.channels} x {shape.size[0]} x {shape.size[1]}: change its configuration"
        )
    if any(side % model.side_multiple for side in shape.size):
        raise ValueError(
            f"{name} needs sides that are multiples of {model.side_multiple}; the samples are "
            f"{shape.size[0]} x {shape.size[1]}"
        )
    return model


def _inherited(name: str, start: Path, settings: Mapping[str, Any]) -> Any:
    architecture, variant = models.split(name)
    registry.get("model", architecture)
    old = models.load(start)
    return way_from(architecture, variant, old)(old, **settings)
