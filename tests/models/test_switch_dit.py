"""Switch-DiT: what it has beyond the shared tests."""

from __future__ import annotations

import pytest
import torch

from architectures import CASES, inputs
from ditkit import models
from ditkit.models.dit import DiT
from ditkit.models.switch_dit import SwitchDiT, match, prior_table

TINY = dict(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)


def test_starts_as_a_dit() -> None:
    model, plain = SwitchDiT(**TINY).eval(), DiT(**TINY).eval()
    state = {name: torch.randn_like(value) * 0.1 for name, value in plain.state_dict().items()}
    plain.load_state_dict(state)
    assert not [n for n in model.load_state_dict(state, strict=False).missing_keys if ".router." not in n]
    torch.testing.assert_close(model(*inputs(model)).sample, plain(*inputs(model)).sample, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("depth", "active"), [(12, 24), (24, 48), (28, 56)])
def test_prior_windows(depth: int, active: int) -> None:
    assert (prior_table(1000, depth, 3, 2).sum(1) == active).all()


def test_matching_undoes_a_permutation() -> None:
    prior = prior_table(1000, 4, 3, 1)
    order = torch.randperm(12)
    for shuffle in (False, True):
        assert torch.equal(prior[:, match(prior[:, order], prior, shuffle)], prior[:, order])


def test_prior_loss_trains_the_gates_to_share_experts_between_neighbours() -> None:
    """Only the gates, on the prior loss alone: it falls, and near timesteps come to share experts."""
    torch.manual_seed(0)
    model = SwitchDiT(**{**TINY, "depth": 4, "num_timesteps": 200})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".f_gate." in name or name.startswith("t_embedder"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(120):
        loss = model.prior_loss(torch.randint(200, (32,)))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    chosen = torch.nn.functional.normalize(model.choices(), dim=1)
    similarity, distance = chosen @ chosen.T, (torch.arange(200)[:, None] - torch.arange(200)).abs()
    assert similarity[distance <= 10].mean() > similarity[distance >= 100].mean()


def test_one_mask_for_each_block() -> None:
    with pytest.raises(ValueError, match="choose one"):
        models.create("dtr-switch-dit-s/2", num_classes=3)
    with pytest.raises(ValueError, match="active_experts=4"):
        SwitchDiT(active_experts=4)
    model = CASES["switch-dit"].model()
    latent, times, labels = inputs(model)
    with pytest.raises(ValueError, match="timestep"):
        model.run_blocks(*model.embed(latent, times, labels))
