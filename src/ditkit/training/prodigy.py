"""Prodigy: Adam whose step size is estimated from how far the parameters have moved.

"Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv 2306.06101, in its Adam form, with bias
correction and decoupled weight decay. The estimate d never falls; learning rate 1 means d itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Prodigy(torch.optim.Optimizer):
    """Prodigy.

    Args:
        lr: factor on the estimated step size.
        d0: first estimate of the distance to the solution, > 0.
        safeguard_warmup: keep `lr` out of the estimate's denominator, so that a warm-up does not raise it.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        bias_correction: bool = True,
        safeguard_warmup: bool = True,
    ) -> None:
        if not d0 > 0 or not lr > 0:
            raise ValueError(f"d0 and lr must be above 0; got {d0} and {lr}")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "d0": d0,
            "bias_correction": bias_correction, "safeguard_warmup": safeguard_warmup,
            "d": d0, "numerator": 0.0, "step": 0,
        }  # fmt: skip
        super().__init__(list(params), defaults)
        if len(self.param_groups) > 1:
            raise ValueError("Prodigy estimates one distance: give one group of parameters")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step with the gradients there are."""
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        beta3, d, lr, eps = math.sqrt(beta2), group["d"], group["lr"], group["eps"]
        group["step"] += 1
        if group["bias_correction"]:
            lr *= math.sqrt(1 - beta2 ** group["step"]) / (1 - beta1 ** group["step"])
        parameters = [p for p in group["params"] if p.grad is not None]
        numerator, denominator = beta3 * group["numerator"], 0.0
        for p in parameters:
            state, grad = self.state[p], p.grad.float()
            if not state:
                state["start"] = p.detach().clone()
                for name in ("m", "v", "s"):
                    state[name] = torch.zeros_like(p, dtype=torch.float32)
            # d / d0 scales both sums alike: the first gradients would vanish in float32 otherwise.
            weight = d / group["d0"] * d
            numerator += weight * lr * float((grad * (state["start"] - p).float()).sum())
            state["s"].mul_(beta3).add_(grad, alpha=weight if group["safeguard_warmup"] else weight * lr)
            denominator += float(state["s"].abs().sum())
            state["m"].mul_(beta1).add_(grad, alpha=d * (1 - beta1))
            state["v"].mul_(beta2).addcmul_(grad, grad, value=d * d * (1 - beta2))
        if denominator > 0:
            group["d"] = max(d, numerator / denominator)
        group["numerator"] = numerator
        d = group["d"]
        for p in parameters:
            state = self.state[p]
            if group["weight_decay"]:
                p.mul_(1 - group["weight_decay"] * d * lr)
            p.sub_((d * lr * state["m"] / (state["v"].sqrt() + d * eps)).to(p.dtype))
