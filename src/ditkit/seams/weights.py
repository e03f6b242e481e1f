"""Weights that belong to a method: other values of the model's own, and small modules of its own.

Both last as long as the methods are applied: they are in the module tree, so that they are saved, moved and
optimised with the model, and go without a trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ditkit.seams.errors import SeamError

if TYPE_CHECKING:
    from ditkit.seams.host import Host


def exchange(host: Host, values: Mapping[str, Tensor]) -> None:
    """Give parameters of the model other values, by their names; the old ones return with removal.

    Raises:
        SeamError: a name the model does not have, or another shape; nothing was changed.
    """
    parameters = dict(host.model.named_parameters())
    unknown = sorted(set(values) - set(parameters))
    if unknown:
        raise SeamError(
            f"{type(host.model).__name__} has no parameter {unknown[0]!r} ({len(unknown)} such names)"
        )
    for name, value in values.items():
        if value.shape != parameters[name].shape:
            here = tuple(parameters[name].shape)
            raise SeamError(f"{name}: the weights are {tuple(value.shape)}, the model's are {here}")
    before = {name: parameters[name].data for name in values}

    def restore() -> None:
        for name, value in before.items():
            parameters[name].data = value.to(parameters[name].device, parameters[name].dtype)

    host.on_remove(restore)
    for name, value in values.items():
        parameters[name].data = value.to(parameters[name].device, parameters[name].dtype)


def add(host: Host, path: str, name: str, module: nn.Module) -> None:
    """Register a module of the method as `path.name` of the model, until removal.

    Raises:
        SeamError: there is something of that name already.
    """
    owner = host.model.get_submodule(path)
    if hasattr(owner, name):
        raise SeamError(f"{path} of this {type(host.model).__name__} has a {name!r} already")
    owner.add_module(name, module)
    host.on_remove(lambda: delattr(owner, name))


def heads_of(module: nn.Module) -> tuple[int, int]:
    """Number of heads and width of a head of an attention module.

    Raises:
        SeamError: it does not tell.
    """
    heads = _first(module, ("heads", "num_heads", "num_attention_heads", "n_heads"))
    if heads:
        width = _first(module, ("head_dim", "dim_head", "attention_head_dim"))
        if width:
            return heads, width
        projections = {"to_q": 1, "q_proj": 1, "to_query": 1, "to_qkv": 3, "qkv": 3}
        for name, parts in projections.items():
            projection = getattr(module, name, None)
            if isinstance(projection, nn.Linear):
                return heads, projection.out_features // (parts * heads)
    raise SeamError(f"{type(module).__name__} does not tell how many heads it has and how wide they are")


def _first(module: nn.Module, names: tuple[str, ...]) -> int:
    """The first attribute that is a number above zero; 0 when there is none."""
    values = (getattr(module, name, 0) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
