"""Two claims of DiMR, small: time in the norms instead of adaptive norms or none at all, and a cascade of two
resolutions instead of one transformer over patches, with as many multiply-adds.

    python -m benchmarks.architectures.dimr [--steps 150] [--seeds 0 1 2]

Dimensions: B batch, C channels, H x W picture, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.architectures import toy
from benchmarks.record import Claim
from ditkit.models.dimr import DiMR, TimeLayerNorm, multi_scale_loss
from ditkit.models.dit import DiT
from ditkit.models.layers import TimestepEmbedder
from ditkit.seams.stats import flop_counter

PLAN = toy.Plan(steps=150, seeds=(0, 1, 2), batch=16)
TRANSFORMER: dict[str, Any] = {
    "block_type": "TransformerBlock",
    "dim": 32,
    "hidden_dim": 64,
    "num_attention_heads": 2,
    "num_blocks": 3,
    "max_height": toy.SIDE // 2,
    "max_width": toy.SIDE // 2,
    "input_feature_ratio": 2,
}
CONVNEXT: dict[str, Any] = {
    "block_type": "ConvNeXtBlock",
    "dim": 16,
    "hidden_dim": 32,
    "kernel_size": 7,
    "num_blocks": 1,
    "max_height": toy.SIDE,
    "max_width": toy.SIDE,
}


def cascade() -> DiMR:
    """Two resolutions, time-dependent layer norms."""
    return DiMR(stages=(TRANSFORMER, CONVNEXT), norm_type="LN", **toy.CONFIG)


# --- other ways for the time to come in ---------------------------------------------------------------


class AdaptiveNorm(nn.Module):
    """Layer norm shifted and scaled by an embedding of the time: (B, ..., D), time (B,) in [-1, 1]."""

    def __init__(self, width: int, embedder: TimestepEmbedder) -> None:
        super().__init__()
        self.embedder = embedder
        self.modulation = nn.Linear(embedder.mlp[2].out_features, 2 * width)  # type: ignore[union-attr]
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, hidden_states: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        vectors = self.modulation(F.silu(self.embedder((time + 1) * 500)))  # (B, 2 D)
        vectors = vectors.reshape(len(time), *[1] * (hidden_states.ndim - 2), -1)
        shift, scale = vectors.chunk(2, dim=-1)
        return F.layer_norm(hidden_states, hidden_states.shape[-1:]) * (1 + scale) + shift


def adaptive() -> DiMR:
    """The same cascade with adaptive norms on one time embedding."""
    model = cascade()
    embedder = TimestepEmbedder(TRANSFORMER["dim"])
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TimeLayerNorm):
                setattr(module, name, AdaptiveNorm(len(child.weight.param0), embedder))
    return model


class Timeless(nn.Module):
    """The same cascade, told the same time always."""

    def __init__(self) -> None:
        super().__init__()
        self.network = cascade()
        self.loss_weights = self.network.loss_weights

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        return self.network(hidden_states, torch.full_like(timestep, 500), class_labels)


# --- one resolution -----------------------------------------------------------------------------------


def transformer(mlp_ratio: float) -> DiT:
    """One transformer over patches of two."""
    changes: dict[str, Any] = {"hidden_size": 36, "mlp_ratio": mlp_ratio}
    return DiT(**{**toy.TRANSFORMER, **changes})


def multiply_adds(model: Any) -> int:
    """Of one forward of one picture."""
    with torch.no_grad(), flop_counter() as counter:
        model(torch.zeros(1, toy.CHANNELS, toy.SIDE, toy.SIDE), torch.zeros(1), torch.zeros(1).long())
    return counter.get_total_flops() // 2


def equal_ratio() -> float:
    """The hidden width of the transformer's MLPs, over its width, for the cascade's multiply-adds."""
    four, five = (multiply_adds(transformer(ratio)) for ratio in (4.0, 5.0))
    return 4 + (multiply_adds(cascade()) - four) / (five - four)


def spectrum(errors: Tensor) -> tuple[float, float]:
    """Mean square of errors (N, C, H, W) in the lower and in the higher half of the frequencies.

    A frequency is its distance from zero in the plane of both axes; each half holds as many.
    """
    power = torch.fft.fft2(errors, norm="ortho").abs().square().mean((0, 1))  # (H, W)
    rows, columns = (torch.fft.fftfreq(side) for side in power.shape)
    order = torch.hypot(rows[:, None], columns[None]).flatten().argsort(stable=True)
    low, high = power.flatten()[order].chunk(2)
    return low.mean().item(), high.mean().item()


def objective(model: Any, batch: toy.Batch) -> Tensor:
    """The multi-scale loss."""
    stages = model(batch.state, batch.t, batch.labels).stages
    return multi_scale_loss(stages, batch.noise, model.loss_weights).mean()


def claims(found: dict[str, list[toy.Trained]], high: dict[str, list[float]], plan: toy.Plan) -> list[Claim]:
    errors = {name: toy.losses(runs) for name, runs in found.items()}
    limit = f"{plan}, transformer of width 32 on 8x8, ConvNeXt of width 16 on 16x16"
    timed = toy.compare(("TD-LN", errors["TD-LN"]), ("no time", errors["no time"]))
    beside = toy.compare(("TD-LN", errors["TD-LN"]), ("adaLN", errors["adaLN"]))
    sharp = toy.compare(("DiMR", high["TD-LN"]), ("transformer", high["transformer"]))
    whole = toy.compare(("DiMR", errors["TD-LN"]), ("transformer", errors["transformer"]))
    ratio = sum(errors["TD-LN"]) / sum(errors["adaLN"])
    ours, theirs = cascade(), transformer(equal_ratio())
    counts = toy.parameters(ours), toy.parameters(adaptive())
    work = multiply_adds(ours), multiply_adds(theirs)
    paper = "arXiv 2406.09416, by FID"
    against = f"{limit}; {work[0] / 1e6:.2f} M multiply-adds, the transformer {work[1] / 1e6:.2f} M"
    return [
        Claim(
            "dimr", "time-dependent norms: lower error than without time", paper, timed[1], timed[0], limit
        ),
        Claim(
            "dimr",
            "time-dependent norms: an error at most 5 % above adaptive norms', with fewer parameters",
            paper,
            f"{ratio:.3f} of it: {beside[1]}; {counts[0]:,} and {counts[1]:,} parameters",
            ratio <= 1.05 and counts[0] < counts[1],
            limit,
        ),
        Claim(
            "dimr",
            "two resolutions: lower error in the higher half of the frequencies than one transformer over "
            "patches, with as many multiply-adds",
            paper,
            f"{sharp[1]}; over all frequencies {whole[1]}",
            sharp[0],
            against,
        ),
    ]


def main() -> None:
    options = toy.arguments(__file__, __doc__, PLAN).parse_args()
    plan = toy.plan_of(options)
    ratio = equal_ratio()
    found = toy.study({"TD-LN": cascade, "adaLN": adaptive, "no time": Timeless}, plan, objective)
    found |= toy.study({"transformer": lambda: transformer(ratio)}, plan)
    high = {
        name: [spectrum(toy.errors(run.model))[1] for run in found[name]] for name in ("TD-LN", "transformer")
    }
    toy.write(options.json, claims(found, high, plan), plan, found, high_frequencies=high)


if __name__ == "__main__":
    main()
