"""`ditkit fit sla`: what is trained, that it goes on bit for bit, that the method finds it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import ditkit
import tiny_pipelines
from ditkit import artifact
from ditkit.fitting import run
from ditkit.fitting.run import FitData
from ditkit.fitting.sla import FitSLA
from ditkit.methods.sla import SLA

DATA = FitData(("red apple", "green rocket", "blue fish"))
SMALL: dict[str, Any] = {
    "steps": 4, "batch": 2, "samples": 3, "sampling_steps": 2, "lr": 1e-2,
    "block_q": 4, "block_kv": 4, "topk": 0.5,
}  # fmt: skip


def draw(pipe: Any, *methods: Any) -> torch.Tensor:
    with ditkit.apply(pipe, *methods, count_flops=False):
        return pipe(
            ["red apple"], num_inference_steps=2, generator=torch.Generator().manual_seed(0),
            output_type="latent", max_sequence_length=8,
        ).images  # fmt: skip


@pytest.mark.parametrize("train", ["all", "attention", "proj"])
def test_fit_and_use(tmp_path: Path, train: Any) -> None:
    pipe = tiny_pipelines.flux()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    dense = draw(pipe)
    folder = run.run(pipe, "sla", FitSLA(**SMALL, train=train), DATA, tmp_path / "sla")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights.safetensors"]
    after = pipe.transformer.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(draw(pipe), dense)
    found = artifact.load(folder, "sla")
    kinds = {
        "proj": lambda name: ".proj_l." in name,
        "attention": lambda name: ".attn." in name,
        "all": lambda name: True,
    }
    assert any(".proj_l.weight" in name for name in found.tensors)
    assert all(kinds[train](name) for name in found.tensors)
    assert any("x_embedder" in name for name in found.tensors) == (train == "all")
    learned = draw(pipe, SLA(weights=str(folder)))
    assert not torch.equal(learned, draw(pipe, SLA(block_q=4, block_kv=4, topk=0.5)))
    assert torch.equal(learned, draw(pipe, ditkit.registry.parse_method(f"sla:weights={folder}")))


@pytest.mark.usefixtures("interruptible")
def test_a_stopped_fit_goes_on_bit_for_bit(tmp_path: Path) -> None:
    fitter = FitSLA(**SMALL)
    whole = run.run(tiny_pipelines.flux(), "sla", fitter, DATA, tmp_path / "a")
    work: list[str] = []

    def stop(what: str, done: int, total: int) -> None:
        if "loss" in what and done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.run(tiny_pipelines.flux(), "sla", fitter, DATA, tmp_path / "b", stop)
    pipe = tiny_pipelines.flux()
    run.run(pipe, "sla", fitter, DATA, tmp_path / "b", lambda what, done, total: work.append(what))
    assert (tmp_path / "b" / artifact.WEIGHTS).read_bytes() == (whole / artifact.WEIGHTS).read_bytes()
    assert len(work) == 1 and "loss" in work[0]


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses: list[float] = []

    def watch(what: str, done: int, total: int) -> None:
        if "loss" in what:
            losses.append(float(what.rsplit(" ", 1)[1]))

    fitter = FitSLA(**{**SMALL, "steps": 40, "lr": 3e-3, "batch": 3})
    run.run(tiny_pipelines.flux(), "sla", fitter, DATA, tmp_path / "a", watch)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"steps": 0}, {"topk": 2.0}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FitSLA(**options)
