"""Which layers of a model an adapter sits on, and where a model embeds its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ditkit.seams.anatomy import describe
from ditkit.seams.errors import UnsupportedModelError

TIME_EMBEDDERS = ("TimestepEmbedder", "TimestepEmbedding", "FourierEmbedder")
"""Classes, ours and diffusers', that turn features of a time into an embedding (B, D)."""
_OTHER_TIMES = ("guidance", "resolution", "aspect", "size", "frame", "fps")
_ROUTERS = {"f_gate", "gate", "router"}  # they choose experts: moved, they would be another model


def adaptable(module: nn.Module, convolutions: bool = True) -> bool:
    """Whether it is a linear map or, if these are asked for, a full convolution."""
    return isinstance(module, nn.Linear) or (
        convolutions and isinstance(module, nn.Conv2d) and module.groups == 1
    )


def block_layers(model: nn.Module, convolutions: bool = True) -> list[str]:
    """The linear maps and full convolutions of every block: attention's projections, those of the MLP and the
    modulation, but no embedders of time and no routers.

    Raises:
        ValueError: the model has no blocks, no list of modules, to look in.
    """
    blocks = _block_lists(model)
    times = tuple(f"{name}." for name in _time_embedders(model)) or ("\0",)
    inside = {name: part for name, part in _modules(model).items() if name.startswith(blocks)}
    found = [
        name for name, part in inside.items() if adaptable(part, convolutions) and not name.startswith(times)
    ]
    found = [name for name in found if not _ROUTERS & set(name.split("."))]
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks with linear maps: name the layers to adapt")
    return found


def named_layers(model: nn.Module, endings: Sequence[str], convolutions: bool = True) -> list[str]:
    """The layers with one of these names, or whose names end in one: "qkv", "norm1.linear".

    Raises:
        ValueError: a name that no layer has, or of something that cannot be adapted.
    """
    every = _modules(model)
    found: list[str] = []
    for ending in endings:
        matched = [name for name in every if name == ending or name.endswith(f".{ending}")]
        if not matched:
            linear = sorted({name.rpartition(".")[2] for name, module in every.items() if adaptable(module)})
            raise ValueError(f"layers: no layer {ending!r}; linear maps are called {', '.join(linear)}")
        if wrong := next((name for name in matched if not adaptable(every[name], convolutions)), None):
            kind = type(every[wrong]).__name__
            fit = "a linear map or a full convolution" if convolutions else "a linear map"
            raise ValueError(f"layers: {wrong} is a {kind}, not {fit}")
        found += matched
    return list(dict.fromkeys(found))


def time_embedder(model: nn.Module) -> str:
    """The name of the module whose output is the embedding of the running timestep.

    Raises:
        ValueError: there is none of a known class.
    """
    found = [name for name in _time_embedders(model) if not any(other in name for other in _OTHER_TIMES)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no {' or '.join(TIME_EMBEDDERS)}: name the module whose output is "
            "the timestep's embedding with time_embedder"
        )
    return min(found, key=lambda name: name.count("."))  # not one inside an embedder of texts


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, as if no adapter were there."""
    found: dict[str, nn.Module] = {}
    adapted: tuple[str, ...] = ("\0",)
    for name, module in model.named_modules():
        if name and not name.startswith(adapted):
            if isinstance(module, BaseTunerLayer):
                adapted += (f"{name}.",)
                module = module.get_base_layer()
            found[name] = module
    return found


def _time_embedders(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ in TIME_EMBEDDERS]


def _block_lists(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of modules inside the blocks."""
    try:
        return tuple(f"{stack.path}." for stack in describe(model).stacks)
    except UnsupportedModelError:
        return tuple(_outermost_lists(model))


def _outermost_lists(model: nn.Module) -> Iterator[str]:
    seen: tuple[str, ...] = ("\0",)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(seen):
            seen += (f"{name}.",)
            yield f"{name}."
