"""A pipeline made cheaper: the run that does it, what comes of it, what that spends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ditkit
from ditkit.cli import app
from ditkit.models.dydit import DyDiT
from ditkit.models.dydit_flux import DyFluxTransformer2DModel
from ditkit.models.dynamic import choosing
from ditkit.training.compress import compress, run_for, spent
from ditkit.training.config import ConfigError, RunConfig
from ditkit.training.trainer import train
from training_recipes import options, stopped_after

DATA = {"kind": "emoji", "groups": ["keycap", "flag"]}
QUICK = {"steps": 3, "batch_size": 8, "tracker": None, "ema": None, "log_every": 1, "checkpoint_every": 2}


@pytest.fixture
def trained(training_file) -> str:
    """A pipeline of a DiT of two classes."""
    return str(train(training_file("start", steps=1, task_options=options("dit"))))


def settings(model: str, flops: float = 0.5, data: dict[str, Any] = DATA, **more: Any) -> dict[str, Any]:
    return run_for(model, ditkit.load(model), "dydit", flops, data, {**QUICK, **more})


def test_settings_are_the_authors(trained: str) -> None:
    run = settings(trained, steps=8000)
    assert run["objective"]["dydit"] == {"flops": 0.5, "warmup": 1000, "hold": 100, "complete_until": 0.15}
    assert (run["optimizer"]["lr"], run["optimizer"]["skip_grad_norm"]) == (1e-4, 200)
    run = settings(trained, 0.7, optimizer={"lr": 1e-3})
    assert "complete_until" not in run["objective"]["dydit"]
    assert (run["optimizer"]["lr"], run["optimizer"]["skip_grad_norm"]) == (1e-3, 50)


def test_a_class_pipeline(trained: str, tmp_path: Path) -> None:
    run = RunConfig.model_validate(settings(trained))
    out = compress(run, tmp_path / "out")
    before, pipe = ditkit.load(trained), ditkit.load(out)
    assert isinstance(pipe.transformer, DyDiT) and pipe.class_names == before.class_names
    with choosing(pipe.transformer) as chosen:
        drawn: Any = pipe([0, 1], num_inference_steps=2, guidance_scale=1.0, output_type="pt")
    assert drawn.images.isfinite().all() and chosen.made
    with pytest.raises(FileExistsError, match="--resume"):
        compress(run, out)
    assert compress(run, out, resume=True) == out


def test_it_goes_on_after_a_stop(trained, tmp_path) -> None:
    run = RunConfig.model_validate(settings(trained, steps=4, checkpoint_every=1))
    compress(run, tmp_path / "whole")
    with stopped_after(2), pytest.raises(KeyboardInterrupt):
        compress(run, tmp_path / "broken")
    compress(run, tmp_path / "broken", resume=True)
    one, other = (ditkit.load(tmp_path / name).transformer.state_dict() for name in ("whole", "broken"))
    unlike = [name for name in one if not torch.equal(one[name], other[name])]
    assert not unlike


def test_flux(tmp_path: Path) -> None:
    """The bundled pipeline: it starts as it was, its tokens can be left out, and it loads again."""
    run = RunConfig.model_validate(
        settings("micro-flux", 0.6, {**DATA, "every": {"flag": 8}}, steps=2, batch_size=4)
    )
    out = compress(run, tmp_path / "out")
    pipe, before = ditkit.load(out), ditkit.load("micro-flux")
    assert isinstance(pipe.transformer, DyFluxTransformer2DModel)
    assert pipe.transformer.config["token_bias"] == 5.0
    with torch.no_grad():
        for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
            block.token_selection.router.bias.fill_(-50.0)
    told = spent(pipe, ["red apple"], steps=2)
    with choosing(pipe.transformer) as chosen:
        pipe.set_progress_bar_config(disable=True)
        drawn: Any = pipe("red apple", num_inference_steps=1, output_type="pt")
    assert drawn.images.isfinite().all()
    assert told.blocks == pytest.approx(chosen.least(), abs=1e-6) and told.flops < 0.8
    assert type(before.transformer).__name__ == "FluxTransformer2DModel"


def test_the_loss_of_flux_has_the_budget_in_it(tmp_path: Path) -> None:
    data = {**DATA, "every": {"flag": 8}}
    run = RunConfig.model_validate(settings("micro-flux", 0.7, data, steps=2, batch_size=4, heldout_every=0))
    compress(run, tmp_path / "out")
    lines = (tmp_path / "out" / "run" / "metrics.jsonl").read_text()
    assert all(f'"{name}"' in lines for name in ("budget", "flops", "complete", "loss", "skipped"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "micro-flux", "--flops", "1.5"], "less than or equal to 1"),
        (["--model", "micro-flux", "--method", "prune"], "'prune' is unknown; there is dydit"),
        (["--model", "micro-wan"], "WanPipeline"),
        (["--model", "micro-flux", "objective.dydit.flop=1"], "dydit.flop: no such key"),
    ],
)
def test_wrong_use(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["compress", "--data", "emoji", "--out", str(tmp_path / "x"), *arguments]
    )
    assert result.exit_code == 2 and words in " ".join(result.output.split()).replace("│ ", "")
    assert not (tmp_path / "x").exists()


def test_other_objectives_are_refused_by_text_to_image() -> None:
    run = settings("micro-flux", 0.6) | {"objective": {"min-snr": {}}}
    from ditkit.training.tasks import find

    with pytest.raises(ConfigError, match="objective"):
        find("text-to-image")(RunConfig.model_validate(run), Path("."), {})


def test_a_network_without_dynamic_form_is_refused(training_file) -> None:
    lit = str(train(training_file("lit", steps=1, task_options=options("lit"))))
    from ditkit.training.tasks import find

    run = RunConfig.model_validate(settings(lit))
    with pytest.raises(ConfigError, match="a LiT has no dynamic form"):
        find(run.task)(run, Path("."), {})
