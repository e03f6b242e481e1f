"""Muon on parameters shared out over two processes, and on whole ones, on the same batches.

Run by `torch.distributed.run`, prints how far the two end up apart and how far they moved. torch's
Newton-Schulz iteration computes in bf16; here it computes in float32, so that rounding hides nothing.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
import torch.optim._muon as muon
from torch import Tensor, nn

from ditkit.training import optimizers, sharding
from ditkit.training.config import OptimizerConfig


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """In place of torch's, for a (wide or tall) matrix."""
    a, b, c = coefficients
    wide = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if matrix.size(0) > matrix.size(1) else wide


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24))


def trained(model: Any, rows: slice) -> list[Tensor]:
    """The parameters, whole, after twenty steps on those rows of each batch."""
    generator = torch.Generator().manual_seed(1)
    used = optimizers.create(OptimizerConfig(kind="muon", lr=1e-3), model)
    for _ in range(20):
        data, wanted = torch.randn(2, 8, 24, generator=generator)
        (model(data[rows]) - wanted[rows]).square().mean().backward()
        for optimizer in used:
            optimizer.step()
            optimizer.zero_grad()
    return [sharding.whole(parameter.detach()).clone() for parameter in model.parameters()]


def farthest(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def main() -> None:
    muon._zeropower_via_newtonschulz = newton_schulz
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    whole = trained(network(), slice(None))
    shared = sharding.shard(network(), torch.device("cpu"), 2)
    shared = trained(shared, slice(4 * rank, 4 * rank + 4))
    if rank == 0:
        moved = farthest(whole, [parameter.detach() for parameter in network().parameters()])
        print(json.dumps({"apart": farthest(whole, shared), "moved": moved}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
