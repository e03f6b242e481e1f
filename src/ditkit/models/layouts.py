"""How the authors' checkpoints of each architecture are read: what shapes tell, which names differ.

An architecture's file registers its `Layout`; `convert` knows none of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """The authors' checkpoints of one architecture.

    Args:
        infer: (tensors, the training script's options and what the user gives) -> what the shapes tell of the
            configuration; what they do not tell is left out. None: no checkpoint of the authors is known.
        needs: settings -> (a setting that must be known, why it can't be told), in the order of asking.
        variants: the named configurations.
        rename: the authors' names to ours; tensors that are no weights (tables, masks) are dropped.
        inherits: other architectures that a model can start from, by `origin`, and how: (model, **config) ->
            model.
        null_class: whether the label table's last row is the null class, so that a note says so.
    """

    infer: Callable[[State, Mapping[str, Any]], Settings] | None = None
    needs: Callable[[Settings], Iterable[tuple[str, str]]] = lambda settings: ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    inherits: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    null_class: bool = True


LAYOUTS: dict[str, Layout] = {}


def origin(model: Any) -> str:
    """What an architecture that starts from a model calls it: "dit", "pixart"."""
    return type(model).__name__.lower().removesuffix("transformer2dmodel")


def way_from(architecture: str, variant: str | None, model: Any) -> Callable[..., Any]:
    """How an architecture starts from a trained model: (model, **config) -> model.

    Raises:
        ValueError: it starts from no such model, or a size was asked for.
    """
    ways = LAYOUTS[architecture].inherits if architecture in LAYOUTS else {}
    if variant or origin(model) not in ways:
        raise ValueError(
            f"{architecture} can't start from a {type(model).__name__}: {architecture} starts from "
            f"{' or '.join(sorted(ways)) or 'no other architecture'}, without a size of its own"
        )
    return ways[origin(model)]


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def count(state: State, prefix: str) -> int:
    """How many modules `prefix.0`, `prefix.1`, ... there are; a stray large number is no module."""
    found = {
        int(match[1])
        for name in state
        if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)) is not None
    }
    return max(found) + 1 if found and max(found) < 2 * len(found) else len(found)


def label_rows(rows: int, options: Mapping[str, Any]) -> Settings:
    """Classes of a label table: its last row is the null class unless the options say otherwise."""
    if not rows:
        return {}
    without_null = options.get("num_classes") == rows
    return {
        "num_classes": rows if without_null else rows - 1,
        "class_dropout_prob": 0.0 if without_null else 0.1,
    }


def infer_dit(state: State, options: Mapping[str, Any], heads: Mapping[int, int]) -> Settings:
    """What the shapes of a DiT's tensors tell; `heads` by width, of the named sizes."""
    settings: Settings = {}
    shapes = shapes_of(state)
    if depth := count(state, "blocks"):
        settings["depth"] = depth
    patches = shapes.get("x_embedder.proj.weight", ())
    if len(patches) == 4 and all(patches):
        settings |= {"hidden_size": patches[0], "in_channels": patches[1], "patch_size": patches[2]}
        head = shapes.get("final_layer.linear.weight", (0,))[0]
        settings["learn_sigma"] = head == 2 * patches[1] * patches[2] * patches[3]
        mlp = shapes.get("blocks.0.mlp.fc1.weight", (0,))[0]
        if mlp:
            settings["mlp_ratio"] = mlp / patches[0]
        tokens = shapes.get("pos_embed", ())
        if len(tokens) == 3 and math.isqrt(tokens[1]) ** 2 == tokens[1]:
            settings["input_size"] = math.isqrt(tokens[1]) * patches[2]
    settings |= label_rows(shapes.get("y_embedder.embedding_table.weight", (0,))[0], options)
    if settings.get("hidden_size") in heads:
        settings["num_heads"] = heads[settings["hidden_size"]]
    return settings


def dit_needs(settings: Settings) -> Iterable[tuple[str, str]]:
    yield "hidden_size", "there is no x_embedder.proj.weight of four dimensions"
    yield "depth", "there are no blocks.N.* keys"
    yield "num_classes", "there is no y_embedder.embedding_table.weight"
    yield (
        "input_size",
        "the position table pos_embed is missing or not square: give config={'input_size': (H, W)}",
    )
    yield (
        "num_heads",
        f"a width of {settings.get('hidden_size')} is no named size's: give config={{'num_heads': N}}",
    )
