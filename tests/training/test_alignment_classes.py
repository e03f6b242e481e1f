"""Alignment on each kind of transformer, those without a task too: whose tokens, and their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import CASES
from architectures import inputs as latents_times_labels
from ditkit.models.dit import DiT, SiT
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.noising import Process, drawn_times, noised, training_losses
from ditkit.processes.transport import Transport
from ditkit.seams.anatomy import readable
from ditkit.seams.taps import hidden_after, reading
from ditkit.training.objectives import Setting, TrainingStep, create
from ditkit.training.order import BatchNoise
from tiny_models import TINY, output
from training.conftest import vision_transformer


@dataclass
class Case:
    """A network and how it is called.

    Args:
        model: trained, in eval mode.
        arguments: of a forward of two samples.
        sample, timestep: the names of two of them.
        grid: of the tokens.
        patch: side of a token in the sample; None: samples are tokens already, (B, L, C).
    """

    model: Any
    arguments: dict[str, Any]
    sample: str
    timestep: str
    grid: tuple[int, int, int]
    patch: int | None
    maps: bool = True

    def network(self, state: Tensor, times: Tensor) -> list[Tensor]:
        called = self.model(**{**self.arguments, self.sample: state, self.timestep: times})
        return [output(called)[:, : state.shape[1]]]  # without a learned variance

    def __post_init__(self) -> None:
        self.model.requires_grad_(True)


def ours(model: Any, grid: tuple[int, int, int], patch: int, maps: bool = True) -> Case:
    latents, times, labels = latents_times_labels(model)
    arguments = {"hidden_states": latents, "timestep": times, "class_labels": labels}
    return Case(model, arguments, "hidden_states", "timestep", grid, patch, maps)


def theirs(name: str, grid: tuple[int, int, int], patch: int | None) -> Case:
    tiny = TINY[name]
    return Case(tiny.model(), tiny.inputs(batch=2), "hidden_states", tiny.timestep, grid, patch)


def drawn(model: nn.Module) -> nn.Module:
    """In eval mode, with nothing left at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


SMALL: dict[str, Any] = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
NETWORKS = {
    "DiT": lambda: ours(drawn(DiT(**SMALL)), (1, 4, 4), 2),
    "SiT": lambda: ours(drawn(SiT(**SMALL)), (1, 4, 4), 2),
    "DiCo": lambda: ours(CASES["dico"].model(depth=(1, 1, 2, 1, 1)), (1, 2, 2), 4, maps=False),
    "diffusers' DiT": lambda: theirs("DiTTransformer2DModel", (1, 4, 4), 2),
    "Flux": lambda: theirs("FluxTransformer2DModel", (1, 4, 4), None),
    "SD3": lambda: theirs("SD3Transformer2DModel", (1, 4, 4), 2),
    "PixArt": lambda: theirs("PixArtTransformer2DModel", (1, 4, 4), 2),
    "Wan": lambda: theirs("WanTransformer3DModel", (2, 4, 2), 2),
}


def patch_of(case: Case, sample: Tensor, place: int) -> Tensor:
    """1 in the numbers that the token at a place is made of, 0 elsewhere."""
    inside = torch.zeros_like(sample)
    if case.patch is None:
        inside[:, place] = 1
        return inside
    _, height, width = case.grid
    frame, row, column = place // (height * width), place // width % height, place % width
    rows, columns = (slice(at * case.patch, (at + 1) * case.patch) for at in (row, column))
    whole = inside if inside.ndim == 5 else inside.unsqueeze(2)
    whole[:, :, frame, rows, columns] = 1
    return inside


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(vision_transformer(Path(tmp_path_factory.mktemp("teacher")) / "vision"))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_tokens_lie_where_the_picture_is(name: str) -> None:
    """What changes most behind the first block is the token whose patch was changed."""
    case = NETWORKS[name]()
    sample = case.arguments[case.sample]
    _, height, width = case.grid

    def tokens(state: Tensor) -> Tensor:
        return hidden_after(case.model, 1, lambda: case.network(state, case.arguments[case.timestep]))

    before = tokens(sample)
    assert before.shape[1] == case.grid[0] * height * width
    for place in range(before.shape[1]):
        after = tokens(sample + 3 * patch_of(case, sample, place))
        assert (after - before).norm(dim=-1).argmax(1).tolist() == [place, place]


@pytest.mark.parametrize("process", [Transport(), GaussianDiffusion.create(1000, variance="fixed_small")])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_objective_of_alignment_reaches_the_early_blocks(
    name: str, process: Process, vision: str
) -> None:
    case = NETWORKS[name]()
    clean = case.arguments[case.sample]
    rows = torch.arange(2)
    chosen: dict[str, dict[str, Any]] = {"sra": {"student_block": 1, "teacher_block": 2}}
    follow = {"teacher": vision, "depth": 1, "projector": 8}
    layers = {"attention_layers": [1, 2], "teacher_layers": [1, 2]}
    chosen |= {"haste": {**follow, **layers}} if case.maps else {"repa": follow}
    setting = Setting(
        case.model,
        process,
        2,
        {"samples": 2},
        labels=False,
        example=lambda: case.network(clean[:2], case.arguments[case.timestep]),
    )
    made = create(chosen, setting)
    draws = BatchNoise(0, 0, 2, rows, torch.device("cpu"))
    epsilon, times = draws.normal(*clean.shape[1:]), drawn_times(process, draws.uniform())
    seen: list[Tensor] = []

    def network(state: Tensor, t: Tensor) -> Tensor:
        seen[:] = case.network(state, t)
        return seen[-1]

    with reading(case.model, made.reads(0, 0.0)) as inside:
        losses = training_losses(process, network, clean, epsilon, times)
    noisy, model_timestep = noised(process, clean, epsilon, times)
    frames = case.grid[0]
    pictures = torch.rand(2, 3, frames, 16, 16) * 2 - 1 if frames > 1 else torch.rand(2, 3, 16, 16) * 2 - 1
    step = TrainingStep(
        model=case.model, process=process, step=0, progress=0.0, clean=clean, noise=epsilon, noisy=noisy,
        timestep=times, model_timestep=model_timestep, output=seen[-1], outputs=seen, losses=losses,
        draws=draws, inside=inside, pictures=lambda: pictures, network=case.network,
    )  # fmt: skip
    assert inside.grid == case.grid
    named = made(step)
    alignments = [value for key, value in named.items() if "alignment" in key]
    assert len(alignments) == (3 if case.maps else 2) and all(bool(a.isfinite()) for a in alignments)
    torch.stack(alignments).sum().backward()
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    assert trained and all(p.grad is not None and p.grad.any() for p in trained)
    first = readable(case.model).blocks(case.model)[0][2]
    assert any(p.grad is not None and p.grad.any() for p in first.parameters())
    assert not any(hooks(case.model))


def hooks(model: nn.Module) -> list[Any]:
    """What a reading put on a model and did not take away."""
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_pictures_that_frames_can_t_share_are_refused() -> None:
    from ditkit.training.objectives.haste import one_for_each_frame

    clips = torch.arange(6.0).view(1, 1, 6, 1, 1)
    assert one_for_each_frame(clips, 3).flatten().tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="6 pictures of a clip can't be shared by 4 frames"):
        one_for_each_frame(clips, 4)
