"""`ditkit fit clear`: the terms of the loss, what is trained, what it gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ditkit
import tiny_pipelines
from ditkit import artifact
from ditkit.fitting import run
from ditkit.fitting.clear import FitLocalWindow, distilling, projections, tapped_layers
from ditkit.fitting.objective import Objective, predict
from ditkit.fitting.run import FitData
from ditkit.fitting.samples import Samples, prepare
from ditkit.methods.clear import LocalWindow
from ditkit.seams.attention import attention_modules
from ditkit.training.order import BatchNoise
from tiny_models import TINY

DATA = FitData(("red apple", "green rocket", "blue fish"))
SMALL: dict[str, Any] = {"radius": 1.5, "steps": 3, "batch": 2, "samples": 3, "sampling_steps": 2}


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Any, Samples]:
    pipe = tiny_pipelines.flux()
    return pipe, prepare(pipe, DATA, 3, tmp_path, lambda what, done, total: None, steps=2)


def noise() -> BatchNoise:
    return BatchNoise(0, 0, 3, torch.arange(3), torch.device("cpu"))


def test_what_is_trained_is_what_the_authors_train() -> None:
    model = tiny_pipelines.flux().transformer
    heads = {f"{block}.{part}.{kind}" for block in ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
             for part in ("to_q", "to_k", "to_v", "to_out.0") for kind in ("weight", "bias")}  # fmt: skip
    heads |= {f"single_transformer_blocks.{i}.attn.{part}.{kind}" for i in range(2)
              for part in ("to_q", "to_k", "to_v") for kind in ("weight", "bias")}  # fmt: skip
    assert set(projections(model)) == heads


@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())
def test_every_class_has_projections_and_taps(tiny: Any) -> None:
    model = tiny.model()
    names = projections(model)
    own = [name for name, kind, _ in attention_modules(model) if kind != "cross"]
    assert all(any(name.startswith(f"{path}.") for name in names) for path in own)
    assert not any("norm" in name or ".add_" in name for name in names)
    assert set(tapped_layers(model, 4)) <= set(range(len(own)))


def test_layers_of_flux() -> None:
    """19 double and 38 single blocks: those of the single blocks that four divides."""
    model = tiny_pipelines.flux(double=3, single=7).transformer
    assert tapped_layers(model, 4) == [4, 8] and tapped_layers(model, 3) == [3, 6, 9]
    assert tapped_layers(tiny_pipelines.flux(double=1, single=1).transformer, 4) == [1]


def test_losses_are_what_hooks_see(prepared: tuple[Any, Samples]) -> None:
    """The three terms from two plain models: module outputs of single blocks are the taps."""
    pipe, samples = prepared
    options = FitLocalWindow(**SMALL, every=3)
    objective, batch = Objective(pipe.scheduler), torch.arange(3)
    with distilling(options, pipe.transformer, samples, objective) as work:
        found = work.losses(batch, noise())
    problem = objective.pose(samples.latents, noise())
    outputs: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    velocity = {}
    module = pipe.transformer.single_transformer_blocks[1].attn  # layer 3 of 4
    arguments = samples.arguments(batch) | {"hidden_states": problem.noisy, "timestep": problem.time / 1000}
    for who, methods in (("teacher", ()), ("student", (LocalWindow(radius=1.5),))):
        handle = module.register_forward_hook(lambda m, a, out, who=who: outputs[who].append(out))
        with torch.no_grad(), ditkit.apply(pipe.transformer, *methods, count_flops=False):
            velocity[who] = pipe.transformer(**arguments).sample
        handle.remove()
    flow = F.mse_loss(velocity["student"], problem.target)
    teacher = F.mse_loss(velocity["student"], velocity["teacher"])
    attention = F.mse_loss(outputs["student"][0], outputs["teacher"][0])
    expected = {"flow": flow, "teacher": teacher, "attention": attention,
                "loss": flow + 0.5 * teacher + 0.5 * attention}  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value, atol=1e-6, rtol=1e-5)
    assert float(teacher) > 1e-4 and float(attention) > 1e-4


def test_without_teacher_it_is_the_flow_loss(prepared: tuple[Any, Samples]) -> None:
    pipe, samples = prepared
    options = FitLocalWindow(**SMALL, teacher=0.0, attention=0.0)
    with distilling(options, pipe.transformer, samples, Objective(pipe.scheduler)) as work:
        assert set(work.losses(torch.arange(3), noise())) == {"loss", "flow"}


@pytest.mark.parametrize("down_factor", [1, 2])
def test_fit_and_use(tmp_path: Path, down_factor: int) -> None:
    pipe = tiny_pipelines.flux()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    fitter = FitLocalWindow(**SMALL, down_factor=down_factor, optimizer="adamw", lr=1e-2)
    folder = run.run(pipe, "clear", fitter, DATA, tmp_path / "clear")
    after = pipe.transformer.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    found = artifact.load(folder, "local-window")
    pooled = [name for name in found.tensors if name.endswith(".processor.spatial_weight")]
    assert len(pooled) == (4 if down_factor > 1 else 0)
    assert all(not torch.allclose(found.tensors[name], torch.full((2, 2), 0.25)) for name in pooled)
    assert set(found.tensors) - set(pooled) == set(projections(pipe.transformer))
    model, ids = pipe.transformer, torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    arguments = {
        "hidden_states": torch.randn(1, 16, 16), "encoder_hidden_states": torch.randn(1, 8, 24),
        "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([0.5]),
        "img_ids": ids, "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip
    with torch.no_grad():
        with ditkit.apply(model, ditkit.registry.parse_method(f"clear:weights={folder}")):
            learned = model(**arguments).sample
            if down_factor > 1:
                weight = model.transformer_blocks[0].attn.pooling.spatial_weight
                name = "transformer_blocks.0.attn.processor.spatial_weight"
                assert torch.equal(weight, found.tensors[name])
        model.load_state_dict({**before, **{n: v for n, v in found.tensors.items() if n not in pooled}})
        given = {name: found.tensors[name] for name in pooled} or None
        options = LocalWindow(radius=1.5, down_factor=down_factor, spatial_weight=given)
        with ditkit.apply(model, options):
            assert torch.equal(model(**arguments).sample, learned)


def test_distillation_brings_the_student_nearer(tmp_path: Path) -> None:
    pipe = tiny_pipelines.flux()
    samples = prepare(pipe, DATA, 3, tmp_path / "samples", lambda what, done, total: None, steps=2)
    problem = Objective(pipe.scheduler).pose(samples.latents, noise())
    # This model is random: what it should predict of the data is not what its teacher predicts.
    options = {**SMALL, "steps": 40, "batch": 3, "teacher": 50.0, "optimizer": "adamw", "lr": 3e-3}
    folder = run.run(pipe, "clear", FitLocalWindow(**options), DATA, tmp_path / "fit")
    velocity = []
    for methods in ((), (LocalWindow(radius=1.5),), (LocalWindow(weights=str(folder)),)):
        with torch.no_grad(), ditkit.apply(pipe.transformer, *methods, count_flops=False):
            velocity.append(predict(pipe.transformer, samples, torch.arange(3), problem))
    teacher, plain, learned = velocity
    assert F.mse_loss(learned, teacher) < 0.8 * F.mse_loss(plain, teacher)
