"""Does a small DiT, and a small SiT, learn? Coloured blobs, about four minutes of one CPU core.

A class is a colour; a picture is one blob of it at a random place, with its colour disturbed so that
neighbouring classes overlap. Three claims are measured:
(a) the noise prediction's error falls below half of its start; (b) with guidance the class of a sample is
recognised more often than without; (c) SiT: Euler with 50 steps is closer to dopri5 than with 5.

    python -m benchmarks.architectures.dit [--steps 2000]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import Claim, arguments, write
from ditkit.models.dit import DiT, SiT
from ditkit.models.guidance import guide
from ditkit.processes import GaussianDiffusion, Transport
from ditkit.processes.gaussian_sampling import trajectory
from ditkit.processes.transport_sampling import sample_ode

CLASSES, CHANNELS, SIDE = 8, 4, 8
CONFIG: dict[str, Any] = dict(
    input_size=SIDE, in_channels=CHANNELS, hidden_size=64, depth=4, num_heads=4, num_classes=CLASSES
)


def colours() -> Tensor:
    """One direction of unit length for each class, (K, C)."""
    directions = torch.randn(CLASSES, CHANNELS, generator=torch.Generator().manual_seed(0))
    return directions / directions.norm(dim=1, keepdim=True)


def blobs(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, C, H, W) of labels (B,), of deviation near 1."""
    count = len(labels)
    centre = 1.5 + 4 * torch.rand(count, 2, 1, 1, generator=generator)
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    distance = (row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2  # (B, H, W)
    shape = torch.exp(-distance / 4)
    colour = colours()[labels] + 0.35 * torch.randn(count, CHANNELS, generator=generator)
    return 4 * colour[:, :, None, None] * shape[:, None]


def recognised(pictures: Tensor, labels: Tensor) -> float:
    """Share of pictures whose class is the one with the nearest colour."""
    found = (pictures.sum((2, 3)) @ colours().T).argmax(1)
    return (found == labels).float().mean().item()


def train(
    model: DiT, losses: Callable[[Tensor, Tensor, torch.Generator], dict[str, Tensor]], steps: int, key: str
) -> list[float]:
    """The course of `losses(pictures, labels, generator)[key]` over AdamW steps on fresh batches."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    course = []
    for _ in range(steps):
        labels = torch.randint(CLASSES, (64,), generator=generator)
        values = losses(blobs(labels, generator), labels, generator)
        optimizer.zero_grad()
        values["loss"].mean().backward()
        optimizer.step()
        course.append(values[key].mean().item())
    model.eval()
    return course


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def guided(model: DiT, labels: Tensor, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The network with guidance on all channels."""
    null = torch.full_like(labels, CLASSES)

    def predict(state: Tensor, t: Tensor) -> Tensor:
        if scale == 1:
            return model(state, t, labels).sample
        prediction = model(state.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, null])).sample
        conditional, unconditional = prediction.chunk(2)
        return guide(conditional, unconditional, scale, CHANNELS)[0]

    return predict


def measure_dit(steps: int) -> dict[str, float]:
    """Claims (a) and (b)."""
    torch.manual_seed(0)
    model, process = DiT(**CONFIG), GaussianDiffusion.create(1000)

    def losses(pictures: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        t = torch.randint(1000, labels.shape, generator=generator)
        noise = torch.randn(pictures.shape, generator=generator)
        return process.training_losses(lambda x, t: model(x, t, labels).sample, pictures, t, noise)

    course = train(model, losses, steps, "mse")
    labels = torch.arange(256) % CLASSES
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(256, CHANNELS, SIDE, SIDE, generator=generator)
    few = GaussianDiffusion.create(1000, "ddim50")
    result = {"mse_first_20": mean(course[:20]), "mse_last_200": mean(course[-200:])}
    for scale in (1.0, 1.5, 3.0):
        *_, samples = trajectory(few, guided(model, labels, scale), start, method="ddim", generator=generator)
        result[f"recognised_guidance_{scale:g}"] = recognised(samples, labels)
    result["recognised_data"] = recognised(blobs(labels, generator), labels)
    return result


def measure_sit(steps: int) -> dict[str, float]:
    """Claim (c)."""
    torch.manual_seed(0)
    model, transport = SiT(**CONFIG), Transport()

    def losses(pictures: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        t, noise = (
            torch.rand(labels.shape, generator=generator),
            torch.randn(pictures.shape, generator=generator),
        )
        return transport.training_losses(lambda x, t: model(x, t, labels).sample, pictures, noise, t)

    course = train(model, losses, steps, "loss")
    labels = torch.arange(64) % CLASSES
    start = torch.randn(64, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    network = guided(model, labels, 1.0)
    exact = sample_ode(transport, network, start, points=2, atol=1e-5, rtol=1e-5)[-1]
    result = {"loss_first_20": mean(course[:20]), "loss_last_200": mean(course[-200:])}
    for euler in (5, 50):
        samples = sample_ode(transport, network, start, method="euler", points=euler + 1)[-1]
        result[f"euler_{euler}_from_dopri5"] = ((samples - exact).norm() / exact.norm()).item()
    return result


def claims(result: dict[str, Any]) -> list[Claim]:
    """The three claims beside the figures."""
    dit, sit, size = result["dit"], result["sit"], f"{result['steps']} steps, width 64, depth 4, 8x8 latents"
    fall = dit["mse_last_200"] / dit["mse_first_20"]
    plain, clear = dit["recognised_guidance_1"], dit["recognised_guidance_3"]
    few, many = sit["euler_5_from_dopri5"], sit["euler_50_from_dopri5"]
    return [
        Claim(
            "dit",
            "the noise error falls below half of its start",
            "ours, at a small scale",
            f"{dit['mse_first_20']:.3f} to {dit['mse_last_200']:.3f}, {fall:.1%} of the start",
            fall < 0.5,
            size,
        ),
        Claim(
            "dit",
            "with guidance the class of a sample is recognised more often than without",
            "arXiv 2207.12598, at a small scale",
            f"{plain:.1%} without, {dit['recognised_guidance_1.5']:.1%} at scale 1.5, {clear:.1%} at 3 "
            f"(the data itself: {dit['recognised_data']:.1%})",
            clear > plain,
            "256 samples, DDIM with 50 steps, guidance on all channels",
        ),
        Claim(
            "sit",
            "Euler with 50 steps comes closer to dopri5 than with 5",
            "ours, at a small scale",
            f"relative distance {many:.4f} with 50 steps, {few:.4f} with 5",
            many < few,
            size,
        ),
    ]


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--steps", type=int, default=2000, help="of training, for each of the two")
    options = parser.parse_args()
    result = {
        "steps": options.steps,
        "dit": measure_dit(options.steps),
        "sit": measure_sit(options.steps),
    }
    write(options.json, claims(result), {"torch": torch.__version__}, **result)


if __name__ == "__main__":
    main()
