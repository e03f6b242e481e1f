"""The decoder of a representation autoencoder through the trainer, and the stages around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import ditkit
from ditkit.data.pictures import open_pictures
from ditkit.models.rae import EPS, RepresentationAutoencoder
from ditkit.models.teachers import load_teacher
from ditkit.processes.times import dimension_shift
from ditkit.training.adversary import (
    Discriminator,
    adaptive_weight,
    augment,
    feature_distance,
    hinge,
)
from ditkit.training.config import ConfigError, load
from ditkit.training.lpips import STAGES, load_lpips
from ditkit.training.tasks import find
from ditkit.training.tasks.representation_autoencoder import measure, noise_levels
from ditkit.training.trainer import train
from training_recipes import interrupted, open_task, records

GRID = 4
DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}  # fmt: skip


def recipe(vision: str, **changes: Any) -> dict[str, Any]:
    """A run on pictures of 64 x 64, seen as 4 x 4 patches, with all losses from its second half on."""
    network = {"network": vision, "layers": [1, 2]}
    options = {
        "encoder": vision,
        "grid": GRID,
        "model": DECODER,
        "perceptual": network,
        "adversary": {**network, "learns_from": 0.25, "start": 0.5, "kernel": 3},
    }
    return {"task": "representation-autoencoder", "task_options": {**options, **changes}}


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "tiny" / "export" / "diffusion_pytorch_model.safetensors")


def test_resumes_bit_exact_and_leaves_an_autoencoder(training_file, tmp_path, monkeypatch, vision) -> None:
    run = {**recipe(vision), "steps": 8, "heldout_every": 8, "sample_every": 8}
    export = train(training_file("whole", **run))
    interrupted(training_file("broken", **run), monkeypatch, at=5)
    rows = records(tmp_path / "whole")
    assert records(tmp_path / "broken") == rows
    one, other = exported(tmp_path / "whole"), exported(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert ["discriminator" in row for row in rows[:8]] == [False] * 2 + [True] * 6
    assert ["adversarial" in row for row in rows[:8]] == [False] * 4 + [True] * 4
    assert "heldout_psnr" in rows[-1] and list((tmp_path / "whole/tiny/samples").glob("*.png"))
    assert not [file for file in export.rglob("*.json") if str(tmp_path) in file.read_text()]
    model: Any = RepresentationAutoencoder.from_pretrained(export)
    pictures = open_pictures(load(tmp_path / "whole.yaml").stages[0].data).images()
    latents = model.encode(pictures).latent
    assert latents.shape[1:] == (16, GRID, GRID)
    torch.testing.assert_close(latents.mean(0), torch.zeros(16, GRID, GRID), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.var(0, correction=0), model.latents_var / (model.latents_var + EPS),
                               atol=1e-3, rtol=0)  # fmt: skip
    tokens = torch.nn.functional.layer_norm(_last_hidden(vision, pictures[:2]), (16,), eps=1e-12)
    torch.testing.assert_close(model.tokens(pictures[:2]), tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode(latents[:2]).sample, model(pictures[:2]), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="expected \\(B, 16, 4, 4\\)"):
        model.decode(latents[:, :, :2])


def _last_hidden(vision: str, pictures: torch.Tensor) -> torch.Tensor:
    """Tokens behind the last layer, before its norm, without the class token."""
    teacher = load_teacher(vision)
    teacher.network.layernorm = torch.nn.Identity()
    return teacher(pictures, (GRID, GRID)).tokens


def test_the_decoder_learns(training_file, tmp_path, vision) -> None:
    quiet = {"perceptual": None, "adversary": None, "tau": 0.2}
    changes = {"optimizer": {"lr": 5e-3}, "schedule": {"kind": "constant"}, "checkpoint_every": 1000}
    train(training_file(**recipe(vision, **quiet), **changes, steps=60))
    curve = [row["l1"] for row in records(tmp_path / "run")]
    assert sum(curve[-5:]) < 0.6 * sum(curve[:5])


def test_parts_of_a_batch_see_the_same_noise(training_file, tmp_path, vision) -> None:
    run = {**recipe(vision, adversary=None, noise="half-normal"), "steps": 2}
    for name, accumulation in (("one", 1), ("two", 2)):
        train(training_file(name, **run, accumulation=accumulation))
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_each_loss_reaches_its_own_side(training_file, vision) -> None:
    """The discriminator learns from its hinge loss alone, the decoder from all else."""
    task, noise, rows = open_task(training_file(**recipe(vision), steps=6))  # the fifth step: all set in
    losses = task(rows, noise)
    heads = list(task.discriminator.heads.parameters())
    alone = torch.autograd.grad(losses["discriminator"], heads, retain_graph=True)
    together = torch.autograd.grad(losses["loss"], heads, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    last = task.autoencoder.decoder.decoder_pred.weight
    assert torch.autograd.grad(losses["discriminator"], last, retain_graph=True, allow_unused=True) == (None,)
    restoring = losses["l1"] + losses["features"]
    (toward,) = torch.autograd.grad(restoring, last, retain_graph=True)
    (away,) = torch.autograd.grad(losses["adversarial"], last, retain_graph=True)
    torch.testing.assert_close(losses["adaptive"] * away.norm(), toward.norm(), rtol=1e-3, atol=0)
    (whole,) = torch.autograd.grad(losses["loss"], last)
    torch.testing.assert_close(whole, toward + 0.75 * losses["adaptive"] * away)
    (rate,) = task.own_rates()
    assert {id(p) for p in rate.parameters} == {id(p) for p in heads} and rate.lr == 2e-4
    assert not [
        n
        for n, p in task.named_parameters()
        if p.requires_grad and ("eyes" in n or n.startswith("autoencoder.encoder"))
    ]


def test_measures_and_noise() -> None:
    tokens = torch.randn(10, 3, 2) * 2 + 1
    mean, variance = measure(iter(tokens.split(4)))
    torch.testing.assert_close(mean.float(), tokens.mean(0))
    torch.testing.assert_close(variance.float(), tokens.var(0, correction=0))
    draws = torch.tensor([-1.0, 0.5])
    assert noise_levels(draws, 0.8, "half-normal").tolist() == pytest.approx([0.8, 0.4])
    assert noise_levels(draws.abs(), 0.8, "uniform").tolist() == pytest.approx([0.8, 0.4])


def test_losses_in_the_eyes_of_a_teacher(vision) -> None:
    eyes, pictures = load_teacher(vision), torch.rand(2, 3, 16, 16) * 2 - 1
    assert float(feature_distance(eyes, pictures, pictures, (4, 4), [1, 2])) == pytest.approx(0, abs=1e-6)
    other = pictures.flip(-1).requires_grad_()
    feature_distance(eyes, other, pictures, (4, 4), [1, 2]).backward()
    assert other.grad is not None and other.grad.abs().max() > 0
    judge = Discriminator(eyes, [1, 2], kernel=3)
    features = judge.features(pictures, (4, 4))
    assert judge.judge(features).shape == (2, 32)
    torch.testing.assert_close(judge.judge(features), judge.judge_as_it_is(features))
    for name, module in judge.heads.named_modules():
        if isinstance(module, torch.nn.Conv1d):
            largest = torch.linalg.svdvals(module.weight.flatten(1))[0]
            assert float(largest) == pytest.approx(1, abs=1e-5), name
    with pytest.raises(ValueError, match=r"layers=\[3\]: expected some of the 2 layers"):
        Discriminator(eyes, [3])
    assert float(hinge(torch.full((4,), 2.0), torch.full((4,), -0.5))) == pytest.approx(0.25)
    weight = torch.ones(2, requires_grad=True)
    assert float(adaptive_weight(6 * weight.sum(), 2 * weight.sum(), weight)) == pytest.approx(3, rel=1e-5)
    assert float(adaptive_weight(6 * weight.sum(), 0 * weight.sum(), weight)) == 1e4


def lpips_weights(folder: Path) -> Path:
    """Random weights under the names of torchvision and LPIPS."""
    torch.manual_seed(0)
    folder.mkdir()
    network, channels, place = {}, 3, 0
    for widths in STAGES:
        for width in widths:
            network[f"features.{place}.weight"] = torch.randn(width, channels, 3, 3) / (3 * channels**0.5)
            network[f"features.{place}.bias"] = torch.randn(width) / 10
            channels, place = width, place + 2
        place += 1
    fitted = {f"lin{i}.model.1.weight": torch.rand(1, w[-1], 1, 1) for i, w in enumerate(STAGES)}
    save_file(network, folder / "vgg16.safetensors")
    torch.save(fitted, folder / "lpips.pth")
    return folder


def test_lpips_by_its_formula(tmp_path) -> None:
    folder = lpips_weights(tmp_path / "lpips")
    distance, network = load_lpips(folder), load_file(folder / "vgg16.safetensors")
    fitted = torch.load(folder / "lpips.pth", weights_only=True)
    pictures = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    shift, scale = torch.tensor([-0.03, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.45])
    maps = (pictures.flatten(0, 1) - shift[:, None, None]) / scale[:, None, None]
    expected, behind, taken = torch.zeros(2), 0, {3: 0, 8: 1, 15: 2, 22: 3, 29: 4}  # rectifiers of VGG-16
    for place in range(30):
        if place in (4, 9, 16, 23):
            maps = torch.nn.functional.max_pool2d(maps, 2)
        elif f"features.{place}.weight" in network:
            weight, bias = (network[f"features.{place}.{kind}"] for kind in ("weight", "bias"))
            maps = torch.nn.functional.conv2d(maps, weight, bias, padding=1)
        else:
            maps, behind = maps.relu(), behind + 1
        if place in taken:
            one, other = torch.nn.functional.normalize(maps, dim=1).unflatten(0, (2, 2))
            weighed = torch.nn.functional.conv2d(
                (one - other) ** 2, fitted[f"lin{taken[place]}.model.1.weight"]
            )
            expected = expected + weighed.mean((1, 2, 3))
    assert behind == 13
    torch.testing.assert_close(distance(*pictures), expected.mean(), rtol=1e-4, atol=1e-5)
    assert float(distance(pictures[0], pictures[0])) == 0
    (folder / "lpips.pth").unlink()
    with pytest.raises(ValueError, match="no lpips"):
        load_lpips(folder)


def test_trains_with_lpips(training_file, tmp_path, vision) -> None:
    folder = str(lpips_weights(tmp_path / "lpips"))
    train(
        training_file(**recipe(vision, perceptual={"lpips": folder}, adversary=None), steps=1, batch_size=2)
    )
    assert records(tmp_path / "run")[0]["lpips"] > 0


def test_augmented_pictures() -> None:
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    middle = torch.full((2, 5), 0.5)
    torch.testing.assert_close(augment(pictures, middle), pictures)
    moved = augment(pictures, torch.tensor([[0.5, 0.5, 0.5, 1.0, 0.5]]).expand(2, 5))
    torch.testing.assert_close(moved[:, :, :-2], pictures[:, :, 2:])
    assert moved[:, :, -2:].abs().max() == 0
    brighter = augment(pictures, torch.tensor([[0.75, 0.5, 0.5, 0.5, 0.5]]).expand(2, 5))
    torch.testing.assert_close(brighter, pictures + 0.25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "nowhere"}, ["task_options.encoder", "nowhere"]),
        ({"perceptual": {"weight": 1.0}}, ["perceptual", "lpips, a folder of its weights, or network"]),
        ({"grid": 5}, ["task_options.grid", "5 patches of 12 pixels are not the 64"]),
        ({"perceptual": {"network": "VISION", "layers": [9]}}, ["perceptual", "2 layers, counted from 1"]),
        ({"adversary": {"network": "VISION", "layers": [1], "kernel": 4}}, ["adversary", "odd"]),
        ({"adversary": {"network": "VISION", "layers": [1], "learns_from": 0.9}}, ["learns_from", "0.9"]),
        ({"model": {**DECODER, "decoder_hidden_size": 18}}, ["task_options.model", "width=18"]),
    ],
)
def test_what_does_not_fit_is_refused(training_file, vision, changes, words) -> None:
    changes = json.loads(json.dumps(changes).replace("VISION", vision))
    run = load(training_file(**recipe(vision, **changes))).stages[0]
    with pytest.raises(ConfigError) as refused:
        find(run.task)(run, Path("nowhere"), {})
    assert all(word in str(refused.value) for word in words), refused.value


SHARED = {
    "precision": "no",
    "data": {"kind": "emoji", "split": "heldout", "groups": ["flag", "keycap"]},
    "batch_size": 4,
    "steps": 2,
    "tracker": None,
}


def test_three_stages_leave_a_pipeline(tmp_path) -> None:
    teacher = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": 16,
    }  # fmt: skip
    transformer = {
        "arch": "dit-dh",
        "autoencoder": "decoder",
        "process": "flow",
        "time_distribution": "logit-normal",
        "shift": "auto",
        "model": {"hidden_size": [16, 32], "depth": [1, 1], "num_heads": [2, 2]},
        "preview_steps": 2,
    }
    stages = [
        {"name": "teacher", "task": "teacher", "task_options": {"least": 1, "model": teacher}},
        {"name": "decoder", **recipe("teacher", grid=None)},
        {"name": "transformer", "task": "class-to-image", "sample_every": 2, "heldout_every": 2,
         "task_options": transformer},
    ]  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump({"output": str(tmp_path / "run"), "stages": [{**SHARED, **stage} for stage in stages]})
    )
    export = train(file)
    assert list((tmp_path / "run/transformer/samples").glob("*.png"))
    pipe = ditkit.load(export)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.vae, RepresentationAutoencoder)
    assert pipe.scheduler.config["shift"] == pytest.approx(dimension_shift(16 * 4 * 4))
    drawn = [
        pipe("flag", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
        for _ in range(2)
    ]
    assert drawn[0].size == (64, 64) and drawn[0].tobytes() == drawn[1].tobytes()
    assert json.loads((export / "process.json").read_text())["autoencoder"] == "decoder"
