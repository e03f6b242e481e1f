"""SRA against the authors' code: the student's and the teacher's tokens, distances, losses, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.models.dit import DiT, SiT
from ditkit.processes.gaussian import GaussianDiffusion
from ditkit.processes.noising import noised
from ditkit.processes.transport import Transport
from ditkit.seams.taps import Reading, hidden_after, reading
from ditkit.training.objectives.sra import distances, falling_weight, head, less_noise
from golden import cases, compare, part, read

SYSTEM = "sra"
PATHS: dict[str, Any] = {"linear": "linear", "cosine": "gvp"}  # their names and ours
Tensors = dict[str, Tensor]


def network(case: dict[str, Any], weights: Tensors) -> tuple[DiT, Any]:
    """The network, without null class where the table has no row for it, and its head."""
    flow = "path" in case
    options = {k: v for k, v in case["args"].items() if k not in ("decoder_hidden_size", "qk_norm")}
    rows = len(weights["y_embedder.embedding_table.weight"])
    dropout = 0.1 * (rows > options["num_classes"])
    model = (SiT if flow else DiT)(**options, learn_sigma=not flow, class_dropout_prob=dropout)
    model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("ap_head.")})
    made = head(options["hidden_size"])
    names = {"linear1": "0", "linear2": "2"}
    made.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v
                          for k, v in part(weights, "ap_head").items()})  # fmt: skip
    return model, made


def outputs(case: dict[str, Any], tensors: Tensors) -> Tensors:
    inputs, weights = part(tensors, "inputs"), part(tensors, "weights")
    student, made = network(case, part(weights, "student"))
    teacher, _ = network(case, part(weights, "teacher"))
    student.train(), teacher.eval()
    flow = "path" in case
    clean, noise, labels, t = (inputs[name] for name in ("images", "noise", "labels", "t"))
    times, earlier = (1 - t, 1 - inputs["t_teacher"]) if flow else (t, inputs["t_teacher"])
    process: Any = Transport(path=PATHS[case["path"]]) if flow else GaussianDiffusion.create(1000)
    computed: Tensors = {}

    def ours(x: Tensor, time: Tensor) -> Tensor:
        """Of a flow their time runs from data to noise, and their velocity with it."""
        computed["student_input"] = x
        computed["student_sample"] = student(x, 1 - time if flow else time, labels).sample
        return -computed["student_sample"] if flow else computed["student_sample"]

    with reading(student, Reading(frozenset({case["block_out_s"]}))) as inside:
        losses = (
            process.training_losses(ours, clean, noise, times)
            if flow
            else process.training_losses(ours, clean, times, noise)
        )
    features = made(inside.hidden[case["block_out_s"]])
    noisy, seen = noised(process, clean, noise, earlier)
    seen = 1 - seen if flow else seen
    target = hidden_after(teacher, case["block_out_t"], lambda: teacher(noisy, seen, labels))
    computed |= {"teacher_input": noisy, "student_features": features, "teacher_features": target}
    if not flow:
        return {**computed, **losses, "align": distances(features, target, "smooth-l1", "features").mean()}
    return {
        **computed,
        "denoising_loss": losses["loss"],
        "align.cos": distances(features, target, "cosine", "tokens"),
        "align.sml1": distances(features, target, "smooth-l1", "features").mean(),
        "align.l2": distances(features, target, "l2", "features").mean(),
        "align.l1": distances(features, target, "l1", "features").mean(),
    }


@pytest.mark.parametrize("path", cases(SYSTEM))
@torch.no_grad()
def test_golden(path: Path) -> None:
    case, tensors = read(path)
    assert case["system"] == SYSTEM
    compare(outputs(case, tensors), part(tensors, "outputs"), atol=1e-5)


@pytest.mark.parametrize(("width", "parameters"), [(768, 2_361_600), (1024, 4_197_376), (1152, 5_311_872)])
def test_heads_have_the_published_size(width: int, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in head(width).parameters()) == parameters


@pytest.mark.parametrize(("epoch", "weight"), [(0, 0.2), (149, 0.2), (650, 2 * 0.1**1.501)])
def test_weights_fall_as_published(epoch: int, weight: float) -> None:
    assert falling_weight(2.0, epoch) == pytest.approx(weight, rel=1e-9)


def test_the_teacher_looks_at_less_noise() -> None:
    steps, uniform = torch.tensor([0, 3, 500, 999]), torch.tensor([0.0, 0.99, 0.5, 0.0])
    process = GaussianDiffusion.create(1000)
    assert less_noise(process, steps, uniform, 0.2).tolist() == [1, 1, 400, 999]
    times = torch.tensor([0.0, 0.5, 0.95, 1.0])  # from noise to data
    assert less_noise(Transport(), times, uniform, 0.2).tolist() == pytest.approx([0.0, 0.698, 1.0, 1.0])
