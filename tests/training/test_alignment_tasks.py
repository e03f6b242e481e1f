"""Alignment where the conditions are texts: Flux, Wan and our networks that read captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.conftest import COLOURS, picture
from ditkit.models.teachers import Teacher
from ditkit.training import trainer as training
from ditkit.training.config import ConfigError, RunConfig
from ditkit.training.objectives.haste import attention_loss, projection_loss
from ditkit.training.order import BatchNoise, split_rows
from ditkit.training.tasks import find
from ditkit.training.trainer import run_stage
from tiny_pipelines import flux, sd3
from training.conftest import vision_transformer
from training.test_clip_tasks import AUTOENCODER, CLIPS, SHARED, TEXT_ENCODER
from training.test_text_conditional import COMMON, MODELS, TEXTS

TASKS = ("text-to-image", "text-conditional", "text-to-video")
SOFTMAX = ("text-to-image", "text-to-video")  # those whose attention maps can be read
LATER = {"text-to-image": 3, "text-conditional": 2, "text-to-video": 2}  # Flux': its first single block


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a vision transformer, a Flux pipeline, and the stages that come before."""
    home = tmp_path_factory.mktemp("alignment")
    for colour in COLOURS:
        (home / "pictures" / colour).mkdir(parents=True)
        for shade in range(4):
            picture(colour, shade).save(home / "pictures" / colour / f"{colour}_square-{shade}.png")
    vision_transformer(home / "vision")
    flux().save_pretrained(home / "flux")
    sd3().save_pretrained(home / "sd3")
    texts = {**COMMON, "name": "text_encoders", "task": "text-encoders", "data": pictures(home)}
    for stage in ({**texts, "task_options": TEXTS}, {**SHARED, **AUTOENCODER}, {**SHARED, **TEXT_ENCODER}):
        run = RunConfig.model_validate({**stage, "steps": 1})
        run_stage(run, home / run.name, {})
    return home


def pictures(home: Path) -> dict[str, Any]:
    return {"kind": "folder", "path": str(home / "pictures"), "size": 16, "split": "all"}


def stage(home: Path, task: str, **changes: Any) -> RunConfig:
    """A run of a task on what is at home."""
    run = {**COMMON, "name": "tiny", "task": task, "steps": 6, "optimizer": {"lr": 3e-3}}
    if task == "text-to-video":
        options = {**CLIPS["task_options"], "windows": {"lengths": {5: 1.0}}}
        run |= {"data": SHARED["data"], "batch_size": 15, "task_options": options}
    elif task == "text-to-image":
        options = {"start_from": str(home / "flux"), "storage": "float32", "train_text_encoders": False}
        run |= {"data": pictures(home), "task_options": options}
    else:
        model = {**MODELS["pt-dit"], "depth": 2}
        run |= {"data": pictures(home), "task_options": {"arch": "pt-dit", "model": model, "pixels": 8}}
    return RunConfig.model_validate({**run, **changes})


def opened(home: Path, run: RunConfig) -> Any:
    """The task with every trained parameter moved off its start."""
    torch.manual_seed(0)
    task: Any = find(run.task)(run, home / "unused", before(home))
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return task


def before(home: Path) -> dict[str, Path]:
    return {name: home / name for name in ("text_encoders", "autoencoder", "text_encoder")}


def batch(task: Any, step: int = 2) -> tuple[torch.Tensor, BatchNoise]:
    rows = torch.arange(task.run.batch_size)
    noise = BatchNoise(task.run.seed, step, len(rows), rows, torch.device("cpu"))
    return rows % task.sample_count, noise


def both(home: Path, task: str) -> dict[str, Any]:
    """Tokens that follow the teacher's and, further on, the run's own average."""
    repa = {"teacher": str(home / "vision"), "depth": 1, "projector": 16}
    return {"repa": repa, "sra": {"student_block": 1, "teacher_block": LATER[task]}}


def haste(home: Path, **changes: Any) -> dict[str, Any]:
    layers = {"attention_layers": [1, 2], "teacher_layers": [2, 1]}
    return {"haste": {"teacher": str(home / "vision"), "depth": 2, "projector": 16, **layers, **changes}}


def records(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows]


def kept_step(task: Any, name: str) -> list[Any]:
    """The steps that an objective of the task sees from now on."""
    made, seen = task.objectives.made[name], []
    terms = made.terms
    made.terms = lambda step: seen.append(step) or terms(step)
    return seen


@pytest.mark.parametrize("task", TASKS)
def test_tokens_come_to_follow_both_teachers(home: Path, tmp_path: Path, task: str) -> None:
    run = stage(home, task, steps=12, objective=both(home, task), optimizer={"lr": 1e-2})
    run_stage(run, tmp_path, before(home))
    rows = records(tmp_path)
    for name in ("alignment", "self_alignment"):
        first, last = (sum(row[name] for row in part) / 3 for part in (rows[:3], rows[-3:]))
        assert last < first - 0.05, (name, first, last)


@pytest.mark.parametrize("task", SOFTMAX)
def test_attention_follows_the_teacher_s(home: Path, task: str) -> None:
    opened_task = opened(home, stage(home, task, objective=haste(home)))
    losses = opened_task(*batch(opened_task))
    losses["attention_alignment"].backward()
    reached = {name for name, p in opened_task.transformer.named_parameters() if p.grad is not None}
    assert any("to_q" in name for name in reached) and any("to_k" in name for name in reached)


@pytest.mark.parametrize("task", SOFTMAX)
def test_each_frame_follows_its_own_picture(home: Path, task: str) -> None:
    """By the functions of the objective, frame by frame; of the picture's own tokens alone."""
    opened_task = opened(home, stage(home, task, objective=haste(home)))
    made, seen = opened_task.objectives.made["haste"], kept_step(opened_task, "haste")
    losses = opened_task(*batch(opened_task))
    step, clips = seen[0], seen[0].pictures()
    frames, height, width = step.inside.grid
    assert (height, width) == (4, 4) and frames in ((2, 3) if task == "text-to-video" else (1,))
    clips = clips if clips.ndim == 5 else clips.unsqueeze(2)
    alignments, attentions = [], []
    for frame in range(frames):
        here = slice(16 * frame, 16 * frame + 16)
        view = made.teachers[0](clips[:, :, frame], (4, 4), [1, 2])
        alignments.append(projection_loss(made.projectors[0](step.inside.hidden[2][:, here]), view.tokens))
        ours = [step.inside.attention[layer].logits()[:, :, here, here] for layer in (1, 2)]
        attentions.append(attention_loss(ours, [view.attention[2], view.attention[1]]))
    torch.testing.assert_close(losses["alignment"], torch.stack(alignments).mean())
    torch.testing.assert_close(losses["attention_alignment"], torch.stack(attentions).mean())


def test_stable_diffusion_3_follows_too(home: Path) -> None:
    options = {"start_from": str(home / "sd3"), "train_text_encoders": False}
    chosen = {**haste(home, depth=1), "sra": {"student_block": 1, "teacher_block": 2}}
    task = opened(home, stage(home, "text-to-image", task_options=options, objective=chosen))
    losses = task(*batch(task))
    losses["loss"].backward()
    assert {"alignment", "attention_alignment", "self_alignment"} <= set(losses)
    trained = [p for p in task.objectives.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.any() for p in trained)


def test_a_latent_frame_stands_for_the_first_that_it_covers(home: Path) -> None:
    run = stage(home, "text-to-video")
    task = opened(home, run)
    clip = task.clips.clip(1).video  # (3, 5, H, W): three latent frames, of frames 0, 1 and 2, 3 and 4
    found = task._pictures(torch.tensor([1]), [0, 1, 2])
    assert torch.equal(found[0], clip[:, [0, 1, 3]])
    assert torch.equal(task._pictures(torch.tensor([1]), [2])[0], clip[:, [3]])


@pytest.mark.parametrize("task", SOFTMAX)
@pytest.mark.parametrize("stop_at", [0.5, 2])
def test_after_the_stop_the_gradient_is_the_plain_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, task: str, stop_at: float
) -> None:
    stopped = opened(home, stage(home, task, steps=4, objective=haste(home, stop_at=stop_at)))
    alone = opened(home, stage(home, task, steps=4))
    state = {k: v for k, v in stopped.state_dict().items() if not k.startswith("objectives.")}
    alone.load_state_dict(state)
    monkeypatch.setattr(Teacher, "forward", None)  # neither is the teacher asked
    gradients = []
    for one in (stopped, alone):
        one(*batch(one))["loss"].backward()
        named = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        gradients.append({n: grad for n, grad in named.items() if not n.startswith("objectives.")})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[1]) > 20
    assert all(torch.equal(gradients[0][name], grad) for name, grad in gradients[1].items())
    projectors = stopped.objectives.made["haste"].projectors
    assert all(p.grad is not None and not p.grad.any() for p in projectors.parameters())


@pytest.mark.parametrize("task", ["text-to-image", "text-conditional"])
def test_parts_of_a_batch_make_up_the_whole(home: Path, task: str) -> None:
    made = opened(home, stage(home, task, objective=both(home, task)))
    indices, noise = batch(made)
    whole = made(indices, noise)
    parts = [
        made(indices[rows], BatchNoise(made.run.seed, noise.step, len(indices), rows, torch.device("cpu")))
        for rows in split_rows(len(indices), 4)
    ]
    for key, value in whole.items():
        together = torch.stack([part[key] for part in parts]).mean()
        torch.testing.assert_close(together, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_resume_is_bit_exact(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """With HASTE stopped on the way where attention can be read."""
    chosen = both(home, task)
    if task in SOFTMAX:
        chosen = {"sra": chosen["sra"], **haste(home, stop_at=0.5)}
    run = stage(home, task, steps=4, objective=chosen)
    run_stage(run, tmp_path / "whole", before(home))

    class Killed(BaseException):
        pass

    take_step, killed = training.Trainer._train_step, []

    def dies(self: Any) -> Any:
        if self.step == 3 and not killed:
            killed.append(True)
            raise Killed
        return take_step(self)

    monkeypatch.setattr(training.Trainer, "_train_step", dies)
    with pytest.raises(Killed):
        run_stage(run, tmp_path / "broken", before(home))
    torch.rand(7)
    run_stage(run, tmp_path / "broken", before(home))
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    whole = list((tmp_path / "whole" / "export").rglob("*.safetensors"))
    assert whole
    for file in whole:
        mine, theirs = (
            load_file(tmp_path / name / file.relative_to(tmp_path / "whole")) for name in ("whole", "broken")
        )
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file


def test_the_average_is_asked_under_the_step_s_own_conditions(home: Path) -> None:
    """At the student's own times and with its own weights, the teacher's tokens are the student's."""
    run = stage(
        home, "text-to-image", objective={"sra": {"student_block": 3, "teacher_block": 4, "t_max": 0}}
    )
    task = opened(home, run)
    made, seen = task.objectives.made["sra"], kept_step(task, "sra")
    made.options = made.options.model_copy(update={"teacher_block": 3})
    task(*batch(task))
    found = made.teacher_tokens(seen[0])
    torch.testing.assert_close(found, seen[0].inside.hidden[3], rtol=1e-4, atol=1e-5)
    double = {name: 2 * value for name, value in task.transformer.named_parameters()}
    task.averaged = lambda: {f"transformer.{name}": value for name, value in double.items()}
    assert not torch.allclose(made.teacher_tokens(seen[0]), found, atol=1e-2)


@pytest.mark.parametrize("arch", ["pt-dit", "dico"])
def test_networks_that_read_text_and_have_no_attention_maps(home: Path, arch: str) -> None:
    options = {"arch": arch, "model": MODELS[arch], "pixels": 8, "process": "gaussian"}
    repa = {"repa": both(home, "text-conditional")["repa"], "min-snr": {}}
    task = opened(home, stage(home, "text-conditional", task_options=options, objective=repa))
    losses = task(*batch(task))
    losses["loss"].backward()
    assert losses["alignment"].isfinite() and losses["min-snr"] < losses["mse"]
    assert all(p.grad.any() for p in task.objectives.made["repa"].projectors.parameters())
    with pytest.raises(ConfigError, match=r"haste: .*(in windows|it has none)"):
        opened(home, stage(home, "text-conditional", task_options=options, objective=haste(home, depth=1)))


@pytest.mark.parametrize(
    ("task", "objective", "words"),
    [
        ("text-to-image", {"distillation": {"teacher": "x"}}, "distillation: it is for networks of classes"),
        ("text-to-video", {"min-snr": {}}, "min-snr: its timesteps are those of Gaussian diffusion"),
        ("text-conditional", {"switch-prior": {}}, "switch-prior: it is for networks of classes"),
        ("text-to-video", {"dydit": {}}, "dydit: the blocks of a WanTransformer3DModel choose nothing"),
        ("text-to-image", {"sra": {"student_block": 1, "teacher_block": 9}}, "block 9 of a Flux.*it has 4"),
    ],
)
def test_what_does_not_fit_is_refused(home: Path, task: str, objective: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        opened(home, stage(home, task, objective=objective))


def test_heldout_losses_are_without_objectives(home: Path) -> None:
    for objective in ({}, both(home, "text-conditional")):
        task = opened(home, stage(home, "text-conditional", objective=objective))
        with torch.no_grad():
            assert set(task.heldout_loss()) == {"loss"}
