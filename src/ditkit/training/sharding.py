"""Parameters shared out over processes: torch's `fully_shard` (FSDP2), under `accelerate launch --use_fsdp`.

Every process keeps its part of each trained parameter, of its average and of its optimizer state; a block's
parameters are whole only while it runs. What is frozen stays whole everywhere. accelerate's own FSDP is
passed over: it exists on accelerators only, and on a CPU accelerate would quietly train unshared.

Tensors here are DTensors when they are shared out; files hold whole tensors, which any number of processes
reads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

ASKED = "ACCELERATE_USE_FSDP"


def asked_for() -> bool:
    """Whether this process was started by `accelerate launch --use_fsdp`."""
    return os.environ.get(ASKED, "false").lower() in ("1", "true", "yes")


@contextlib.contextmanager
def unseen_by_accelerate() -> Iterator[None]:
    """The wish is ours to fulfil."""
    if not asked_for():
        yield
        return
    with patch_environment(**{ASKED: "false"}):
        yield


def shard(module: nn.Module, device: torch.device, processes: int) -> Any:
    """Share out the trained parameters of a module in place, block by block.

    Args:
        module: on its device, the same in all processes; its networks name the classes of their blocks
            (`_no_split_modules`, as in diffusers and transformers); a part of a block names those of its
            modules that are called while the block does not run (`_called_outside_block`).
        device: of this process.
        processes: how many there are.

    Returns:
        The module, now an `FSDPModule`.
    """
    mesh = init_device_mesh(device.type, (processes,))
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    for parameter in module.parameters():  # `fully_shard` wants them so, not with channels last
        parameter.data = parameter.data.contiguous()
    blocks = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in reversed(list(module.modules())[1:]):  # the inner ones before those around them
        units = [part.get_submodule(name) for name in getattr(part, "_called_outside_block", ())]
        for unit in [*units, part] if type(part).__name__ in blocks else units:
            if any(parameter.requires_grad for parameter in unit.parameters()):
                fully_shard(unit, mesh=mesh, ignored_params=frozen)
    return fully_shard(module, mesh=mesh, ignored_params=frozen)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that is to lie as `like` does; `tensor` where that is whole."""
    if not isinstance(like, DTensor):
        return tensor
    place = like.device_mesh.device_type
    return distribute_tensor(tensor.to(place), like.device_mesh, like.placements, src_data_rank=None)
