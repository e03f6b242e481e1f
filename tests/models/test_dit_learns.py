"""A very small DiT and SiT learn a toy set on one thread: the whole chain from loss to guided samples.

`benchmarks/architectures/dit.py` measures the same on a larger one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditkit.models.dit import DiT, SiT
from ditkit.processes import GaussianDiffusion, Transport
from ditkit.processes.gaussian_sampling import trajectory
from ditkit.processes.transport_sampling import sample_ode

CLASSES = 4
CONFIG: dict[str, Any] = dict(
    input_size=4, in_channels=2, hidden_size=32, depth=2, num_heads=2, num_classes=CLASSES
)
COLOURS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])  # one for each class, (K, C)


def pictures(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Plain colours that scatter into the neighbouring classes', with some grain, (B, C, 4, 4)."""
    colour = COLOURS[labels] + 0.5 * torch.randn(len(labels), 2, generator=generator)
    return colour[:, :, None, None] + 0.2 * torch.randn(len(labels), 2, 4, 4, generator=generator)


def recognised(samples: Tensor, labels: Tensor) -> float:
    return ((samples.mean((2, 3)) @ COLOURS.T).argmax(1) == labels).float().mean().item()


def train(model: DiT, losses: Callable[[Tensor, Tensor, torch.Generator], dict[str, Tensor]]) -> list[float]:
    """The course of the prediction's error."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    course = []
    for _ in range(500):
        labels = torch.randint(CLASSES, (64,), generator=generator)
        values = losses(pictures(labels, generator), labels, generator)
        optimizer.zero_grad()
        values["loss"].mean().backward()
        optimizer.step()
        course.append(values.get("mse", values["loss"]).mean().item())
    model.eval()
    return course


def test_dit_learns_and_guidance_makes_the_class_clearer() -> None:
    torch.manual_seed(0)
    model, process = DiT(**CONFIG), GaussianDiffusion.create(1000)

    def losses(x0: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        t, noise = (
            torch.randint(1000, labels.shape, generator=generator),
            torch.randn(x0.shape, generator=generator),
        )
        return process.training_losses(lambda x, t: model(x, t, labels).sample, x0, t, noise)

    course = train(model, losses)
    assert sum(course[-50:]) / 50 < 0.5 * course[0]

    labels = torch.arange(400) % CLASSES
    pairs = torch.cat([labels, torch.full_like(labels, CLASSES)])
    start = torch.randn(400, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    shares = []
    for scale in (0.0, 1.0, 3.0):
        *_, samples = trajectory(
            GaussianDiffusion.create(1000, "ddim20"),
            lambda x, t, s=scale: model.forward_with_cfg(x, t, pairs, s, "all"),
            start.repeat(2, 1, 1, 1),
            method="ddim",
        )
        shares.append(recognised(samples[:400], labels))
    none, plain, guided = shares  # without a class, the best is one in four; standard errors are below 0.025
    assert none < 0.4 < 0.6 < plain < guided - 0.05


def test_sit_learns_and_more_steps_come_closer_to_the_flow() -> None:
    torch.manual_seed(0)
    model, transport = SiT(**CONFIG), Transport()

    def losses(x1: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        t, noise = torch.rand(labels.shape, generator=generator), torch.randn(x1.shape, generator=generator)
        return transport.training_losses(lambda x, t: model(x, t, labels).sample, x1, noise, t)

    course = train(model, losses)
    assert sum(course[-50:]) / 50 < 0.5 * course[0]

    labels = torch.arange(100) % CLASSES
    start = torch.randn(100, 2, 4, 4, generator=torch.Generator().manual_seed(2))

    def sample(method: str, points: int) -> Tensor:
        return sample_ode(
            transport, lambda x, t: model(x, t, labels).sample, start, method=method, points=points
        )[-1]

    exact = sample("dopri5", 2)
    assert recognised(exact, labels) > 0.6
    near, far = ((sample("euler", points) - exact).norm() for points in (51, 6))
    assert near < 0.5 * far
