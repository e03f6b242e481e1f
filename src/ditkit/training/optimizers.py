"""Optimizers by name, for `optimizer.kind` of a training file.

`muon` orthogonalises the momentum of weight matrices (torch's `Muon`, scaled so that its learning rate means
what AdamW's does) and leaves embeddings, vectors and convolutions to AdamW.
"""

from __future__ import annotations

import torch
from torch import nn

from ditkit.training.config import OptimizerConfig


def create(config: OptimizerConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; each trainable parameter belongs to exactly one."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices: set[int] = set()
    if config.kind == "muon":
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                matrices.add(id(module.weight))
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
    return optimizers
