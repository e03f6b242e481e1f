import json

import pytest
import torch

from ditkit.training import checkpoint as ckpt


def some(step: int) -> ckpt.Checkpoint:
    tensors = {"model": {"w": torch.full((3,), float(step))}, "rng": {"torch": torch.get_rng_state()}}
    return ckpt.Checkpoint(step, tensors, {"note": step})


def test_round_trip_and_retention(tmp_path):
    for step in (1, 2, 3):
        ckpt.write(tmp_path, some(step), keep=2)
    assert [path.name for path in ckpt.found(tmp_path)] == ["step-00000002", "step-00000003"]
    newest = ckpt.newest(tmp_path)
    assert newest is not None and newest.step == 3 and newest.state == {"note": 3}
    assert torch.equal(newest.tensors["model"]["w"], torch.full((3,), 3.0))


def test_half_written_folder_is_never_chosen(tmp_path):
    ckpt.write(tmp_path, some(1), keep=2)
    half = tmp_path / ".step-00000002.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    unfinished = tmp_path / "step-00000003"
    unfinished.mkdir()
    newest = ckpt.newest(tmp_path)
    assert newest is not None and newest.step == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "json"])
def test_damage_falls_back_to_the_one_before(tmp_path, damage):
    ckpt.write(tmp_path, some(1), keep=2)
    path = ckpt.write(tmp_path, some(2), keep=2)
    weights, record = path / "model.safetensors", path / "state.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
    elif damage == "missing":
        weights.unlink()
    else:
        record.write_text(json.dumps({"step": 2}))
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        newest = ckpt.newest(tmp_path)
    assert newest is not None and newest.step == 1


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_optimizer_state_round_trips(make):
    weight = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = make([weight], lr=0.1)
    for _ in range(2):
        weight.grad = torch.randn(4, 4)
        optimizer.step()
    tensors, facts = ckpt.pack_optimizer(optimizer.state_dict())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # as files would hold them
    restored = ckpt.unpack_optimizer(tensors, json.loads(json.dumps(facts)))
    twin = torch.nn.Parameter(weight.detach().clone())
    other = make([twin], lr=0.3)
    other.load_state_dict(restored)
    weight.grad = twin.grad = torch.ones(4, 4)
    optimizer.step()
    other.step()
    assert torch.equal(weight, twin)
