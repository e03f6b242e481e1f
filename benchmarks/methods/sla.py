"""SLA on a small SiT: fine-tuned beside full, sparse and linear attention, and what is left of a trained map.

Pictures of 16 x 16 tokens have one colour everywhere, that only many pixels together tell in the noise, and
sharp blobs, that few do. A SiT learns them with full attention; copies of it go on for equally many steps
with each attention in place, at the same share of critical blocks, and are compared by their loss on held-out
pictures. The stable rank of the attention weights is measured before and after their largest 8 % are taken
out; the time of a forward at 8,192 tokens is set beside its ideal.

    python -m benchmarks.methods.sla [--base 500] [--steps 150] [--seeds 3]

B batch, h heads, L tokens, d head dim.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import ditkit
from benchmarks.record import Claim, arguments, write
from ditkit.analysis.bench import machine
from ditkit.methods.sla import SLA, Attention
from ditkit.models.dit import SiT
from ditkit.seams.apply import Host
from ditkit.seams.layout import TokenLayout

SIDE, CHANNELS = 16, 4
CONFIG: dict[str, Any] = dict(
    input_size=SIDE, patch_size=1, in_channels=CHANNELS, hidden_size=64, depth=3, num_heads=2, num_classes=1
)
OPTIONS: dict[str, Any] = {"topk": 0.1, "block_q": 8, "block_kv": 8, "variant": "v1"}
console = Console()


def pictures(count: int, generator: torch.Generator) -> Tensor:
    """(B, C, H, W): a colour, and three small blobs of the opposite one."""
    colour = torch.randn(count, CHANNELS, 1, 1, generator=generator)
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    shape = torch.zeros(count, SIDE, SIDE)
    for _ in range(3):
        centre = SIDE * torch.rand(count, 2, 1, 1, generator=generator)
        shape = shape + torch.exp(-((row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2))
    return colour * (1 - 2 * shape[:, None].clamp(max=1))


def loss_of(model: nn.Module, clean: Tensor, generator: torch.Generator) -> Tensor:
    """Flow-matching loss, SiT's times: x_t = t x0 + (1 - t) noise, target x0 - noise."""
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.rand(len(clean), generator=generator)
    level = t[:, None, None, None]
    predicted = model(
        level * clean + (1 - level) * noise, t, torch.zeros(len(clean), dtype=torch.long)
    ).sample
    return F.mse_loss(predicted, clean - noise)


def train(model: nn.Module, steps: int, seed: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 3 * (1 - step / steps))
        optimizer.zero_grad()
        loss_of(model, pictures(16, generator), generator).backward()
        optimizer.step()


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    generator = torch.Generator().manual_seed(12345)
    return statistics.mean(float(loss_of(model, pictures(64, generator), generator)) for _ in range(4))


class _Without(Attention):
    """SLA without its sparse part, or without the learned map before the linear part is added."""

    def __init__(self, inner: Attention, what: str) -> None:
        super().__init__(inner.options, inner.projections)
        self.what = what

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, proj: Any, plan: Any, mask: Any = None, scale: Any = None
    ) -> Tensor:
        critical, marginal = self.classify(q, k, plan)
        if self.what == "linear only":
            return self.linear(q, k, v, None, plan, mask)
        return self.sparse(q, k, v, critical, plan, mask, scale) + self.linear(q, k, v, marginal, plan, mask)


@dataclass(frozen=True)
class Variant:
    """A method for the comparison: SLA, or a part of it."""

    claims: ClassVar[frozenset[str]] = frozenset({"attention"})

    what: str

    def attach(self, host: Host) -> None:
        SLA(**OPTIONS).attach(host)
        if self.what in ("linear only", "sum without Proj"):
            host.attention.strategy = _Without(host.attention.strategy, self.what)
        if self.what != "SLA":
            for name, parameter in host.model.named_parameters():
                if ".proj_l." in name:
                    parameter.requires_grad_(False)


VARIANTS = ("full", "SLA", "sparse only", "sum without Proj", "linear only")


def compare(base: nn.Module, steps: int, seed: int, rate: float) -> dict[str, float]:
    """Held-out losses after fine-tuning with each attention."""
    losses = {}
    for what in VARIANTS:
        model = copy.deepcopy(base)
        methods = () if what == "full" else (Variant(what),)
        with ditkit.apply(model, *methods, count_flops=False):
            train(model, steps, seed, rate)
            losses[what] = held_out(model)
        console.print(f"seed {seed}: {what} {losses[what]:.4f}")
    return losses


def stable_rank(matrix: Tensor) -> float:
    """Sum of the squared singular values over the largest."""
    return float(matrix.square().sum() / torch.linalg.matrix_norm(matrix, 2) ** 2)


class _Maps:
    """A dense strategy that keeps the attention weights."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def plan(self, *arguments: Any) -> None:
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any, call: Any, plan: Any) -> Tensor:
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        self.found += list(weights.flatten(0, 1))
        return weights @ v


@dataclass(frozen=True)
class _Keeping:
    claims: ClassVar[frozenset[str]] = frozenset({"attention"})
    maps: _Maps

    def attach(self, host: Host) -> None:
        host.attention.use(self.maps)


@torch.no_grad()
def ranks(base: nn.Module) -> dict[str, float]:
    """Means over heads, layers and four pictures at several noise levels."""
    maps, generator = _Maps(), torch.Generator().manual_seed(7)
    with ditkit.apply(base, _Keeping(maps), count_flops=False):
        loss_of(base, pictures(4, generator), generator)
    names = ("whole", "top 8%", "rest", "above 1/N", "below 1/100N")
    found: dict[str, list[float]] = {name: [] for name in names}
    for weights in maps.found:
        border = weights.flatten().quantile(0.92)
        top = weights * (weights >= border)
        found["whole"].append(stable_rank(weights))
        found["top 8%"].append(stable_rank(top))
        found["rest"].append(stable_rank(weights - top))
        found["above 1/N"].append(float((weights > 1 / weights.shape[-1]).float().mean()))
        found["below 1/100N"].append(float((weights < 0.01 / weights.shape[-1]).float().mean()))
    return {name: statistics.mean(values) for name, values in found.items()}


@torch.no_grad()
def forward_time(rounds: int) -> dict[str, float]:
    """At 8,192 tokens, blocks of 64, 12.5 % critical: medians of interleaved runs, in seconds."""
    torch.manual_seed(0)
    options = SLA(topk=0.125, variant="v1")
    strategy, proj = options.strategy(), nn.Linear(64, 64)
    plan = strategy.plan(TokenLayout((1, 64, 128)), 2, torch.device("cpu"))
    q, k, v = (torch.randn(1, 2, 8192, 64) for _ in range(3))
    _, marginal = strategy.classify(q, k, plan)
    runs = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "SLA": lambda: strategy.compute(q, k, v, proj, plan),
        "linear": lambda: strategy.linear(q, k, v, marginal, plan),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()} | {"kept": plan.share}


def claims(
    start: float, losses: list[dict[str, float]], rank: dict[str, float], times: dict[str, float]
) -> list[Claim]:
    mean = {what: statistics.mean(one[what] for one in losses) for what in VARIANTS}
    words = ", ".join(f"{what} {mean[what]:.4f}" for what in VARIANTS)
    paper, where = "arXiv 2509.24006", f"SiT of 256 tokens, 3 of 32 blocks critical, {len(losses)} seed(s)"
    ideal = times["kept"] * times["dense"]
    limit = "held-out loss after equal fine-tuning; equal start, data and steps"
    return [
        Claim(
            "sla",
            f"{where}: fine-tuned, no worse than sparse attention alone, which is better than linear alone",
            paper,
            f"{words}; before: {start:.4f}",
            all(one["SLA"] <= one["sparse only"] < one["linear only"] for one in losses),
            limit,
        ),
        Claim(
            "sla",
            f"{where}: within 5 % of full attention's loss",
            paper,
            f"{100 * (mean['SLA'] / mean['full'] - 1):+.1f} %, sparse alone "
            f"{100 * (mean['sparse only'] / mean['full'] - 1):+.1f} %",
            mean["SLA"] <= 1.05 * mean["full"],
            limit,
        ),
        Claim(
            "sla",
            f"{where}: better than the sum of both parts without Proj",
            paper,
            f"SLA {mean['SLA']:.4f}, sum {mean['sum without Proj']:.4f}",
            all(one["SLA"] < one["sum without Proj"] for one in losses),
            limit,
        ),
        Claim(
            "sla",
            "what is left of trained attention weights without their largest 8 % has a far lower stable rank",
            paper,
            f"{rank['rest']:.2f} against {rank['whole']:.2f} of the whole, {rank['top 8%']:.2f} of the 8 %; "
            f"{rank['above 1/N']:.1%} of the weights are above 1/N, {rank['below 1/100N']:.1%} below 1/100N",
            rank["rest"] < 0.5 * rank["whole"],
            "mean over heads and layers of the trained SiT",
        ),
        Claim(
            "sla",
            "8,192 tokens, blocks of 64, 12.5 % critical: forward within 1.6 of density x dense, plus the "
            "linear part",
            "ditkit",
            f"{(times['SLA'] - times['linear']) / ideal:.2f} of density x dense; the linear part takes "
            f"{times['linear'] / times['dense']:.2f} of dense; {times['dense'] / times['SLA']:.2f} x as fast",
            times["SLA"] <= 1.6 * ideal + times["linear"],
        ),
    ]


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--base", type=int, default=500, help="steps with full attention")
    parser.add_argument("--steps", type=int, default=150, help="steps of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    base = SiT(**CONFIG)
    train(base, options.base, 0, 2e-3)
    start, rank = held_out(base), ranks(base)
    console.print(f"after {options.base} steps with full attention {start:.4f}; stable ranks {rank}")
    losses = [compare(base, options.steps, 1 + seed, options.rate) for seed in range(options.seeds)]
    times = forward_time(options.rounds)
    console.print(times)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    found = claims(start, losses, rank, times)
    write(options.json, found, machine(), settings=settings, losses=losses, ranks=rank, seconds=times)


if __name__ == "__main__":
    main()
