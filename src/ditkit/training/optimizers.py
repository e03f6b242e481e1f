"""Optimizers by name, for `optimizer.kind` of a training file.

`muon` orthogonalises the momentum of weight matrices (torch's `Muon`, scaled so that its learning rate means
what AdamW's does) and leaves embeddings, vectors and convolutions to AdamW. A matrix that is shared out over
processes is orthogonalised as a whole. torch does so in bf16, which makes much of a gradient's last bits: two
processes end up further from one than with AdamW, at 1 to 2 % of the way after twenty steps (in float32 at
5e-6 of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ditkit.training.config import OptimizerConfig
from ditkit.training.sharding import part_like


@dataclass(frozen=True)
class OwnRate:
    """Parameters with a learning rate of their own (the schedule's factor applies) under plain AdamW."""

    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


def create(
    config: OptimizerConfig, model: nn.Module, own: Sequence[OwnRate] = ()
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; each trainable parameter belongs to exactly one.

    Args:
        model: what is trained.
        own: parameters of it that do not follow the run's learning rate and weight decay.
    """
    apart = {id(p) for rate in own for p in rate.parameters}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    matrices: set[int] = set()
    if config.kind == "muon":
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                matrices.add(id(module.weight))
    matrices -= apart
    rest = [p for p in trainable if id(p) not in matrices]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        adamw = torch.optim.AdamW(
            rest,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over the memory; on a CPU `foreach` is a loop of a dozen
        )
        optimizers.append(adamw)
    if matrices:
        muon = torch.optim.Muon(
            [p for p in trainable if id(p) in matrices],
            lr=config.lr,
            momentum=0.95,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
    for rate in own:
        adamw = torch.optim.AdamW(
            rate.parameters, lr=rate.lr, betas=rate.betas, weight_decay=rate.weight_decay, foreach=True
        )
        optimizers.append(adamw)
    return optimizers


def share_out(state: dict[str, Any], optimizer: Any) -> None:
    """Turn the whole tensors of an optimizer's `state_dict()` into parts where its parameters are parts."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape:
                entries[name] = part_like(value, parameters[index])


def lay_out_alike(optimizer: Any) -> None:
    """Lay loaded state out in memory as the parameters are (channels last, say): a fused step reads both in
    the order in which they lie there, and files keep no layout."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
