"""Blocks computed again for the backward, and compiled blocks: the same numbers, under the same names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from ditkit.models.d2it import GrainTransformer
from ditkit.models.d2it_autoencoder import DualGrainAutoencoder
from ditkit.training import networks
from ditkit.training.config import ConfigError, load
from ditkit.training.trainer import train
from training_recipes import MODELS, PROCESSES, changes, open_task, options, records, weights


def backward(task: Any, noise: Any, rows: torch.Tensor) -> tuple[torch.Tensor, list[Any], int]:
    """The loss, the gradients, and the bytes that were held for the backward beside the parameters."""
    held: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task(rows, noise)["loss"]
    held_after_forward = sum(held.values())
    loss.backward()
    return loss.detach(), [p.grad for p in task.parameters() if p.requires_grad], held_after_forward


def same_with_less(path: Any) -> None:
    outcomes = []
    for again in (False, True):
        task, noise, rows = open_task(path)
        if again:
            networks.checkpoint_gradients(task, "gradient_checkpointing")
        outcomes.append(backward(task.train(), noise, rows))
    (loss, gradients, held), (other_loss, other_gradients, other_held) = outcomes
    assert torch.equal(loss, other_loss)
    for one, other in zip(gradients, other_gradients, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert other_held < 0.7 * held, (other_held, held)


@pytest.mark.parametrize("arch", MODELS)
def test_recomputing_changes_no_bit_and_holds_less(arch, training_file):
    same_with_less(training_file(task_options=options(arch, PROCESSES[arch][0])))


@pytest.mark.parametrize("name", ["haste", "sra", "distillation"])
def test_recomputing_goes_with_objectives_that_look_inside(name, training_file, teacher):
    outcomes = []
    for again in (False, True):
        task, noise, rows = open_task(training_file(**changes(name, teacher)))
        if again:
            networks.checkpoint_gradients(task, "gradient_checkpointing")
        outcomes.append(backward(task.train(), noise, rows))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for one, other in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


def test_the_map_of_grains_recomputes():
    torch.manual_seed(0)
    model = GrainTransformer(grid=4, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    grain, hidden = torch.rand(2, 4, 4) < 0.5, torch.rand(2, 4, 4) < 0.5
    labels, keep = torch.tensor([0, 2]), torch.zeros(2, dtype=torch.long)
    gradients = []
    for again in (False, True):
        model.zero_grad()
        if again:
            networks.checkpoint_gradients(model, "gradient_checkpointing")
        model.loss(grain, labels, keep, hidden).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_what_can_not_recompute_says_so():
    with pytest.raises(ConfigError, match=r"stage\.gradient_checkpointing: a DualGrainAutoencoder"):
        networks.checkpoint_gradients(
            DualGrainAutoencoder(ch=8, ch_mult=(1, 1), decoder_ch_mult=(1,), norm_num_groups=2),
            "stage.gradient_checkpointing",
        )
    with pytest.raises(ConfigError, match="trains no network"):
        networks.compile_networks(torch.nn.Linear(2, 2), "default", "compile")


def test_the_file_turns_it_on(training_file, tmp_path):
    train(training_file("plain", steps=3))
    train(training_file("again", steps=3, gradient_checkpointing=True))
    assert records(tmp_path / "plain") == records(tmp_path / "again")


def test_compile_takes_yes_or_a_mode(training_file):
    assert load(training_file(compile=True)).stages[0].compile == "default"
    assert load(training_file(compile=False)).stages[0].compile is None
    assert load(training_file(compile="max-autotune")).stages[0].compile == "max-autotune"
    with pytest.raises(ConfigError, match="compile"):
        load(training_file(compile="fastest"))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_and_keep_their_names(training_file, tmp_path):
    plain = train(training_file("plain", steps=4))
    counters.clear()
    train(training_file("compiled", steps=4, compile=True, heldout_every=4))
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    for one, other in zip(records(tmp_path / "plain"), records(tmp_path / "compiled"), strict=False):
        assert abs(one["loss"] - other["loss"]) <= 1e-4 * abs(one["loss"])
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert set(one) == set(other) == set(load_file(next(plain.glob("transformer/*.safetensors"))))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-4)
