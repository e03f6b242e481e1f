"""The small comparisons of architectures: every variant learns a few steps, every claim can be written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.architectures import (
    dico,
    dimr,
    dtr,
    lamamba_diff,
    lit,
    multiply_adds,
    pt_dit,
    switch_dit,
    toy,
)
from benchmarks.training import dydit
from ditkit.training.objectives.dydit import DyDiTOptions

PLAN = toy.Plan(steps=2, seeds=(0, 1), batch=2, points=2)


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Errors on a handful of the held-out pictures; the numbers mean nothing here."""
    whole = toy.held_out()
    few = toy.Batch(whole.pictures[:4], whole.labels[:4], whole.t[:4], whole.noise[:4])
    monkeypatch.setattr(toy, "held_out", lambda: few)
    torch.manual_seed(0)
    yield


def told(claims: list[Any], system: str, count: int) -> None:
    assert [claim.system for claim in claims] == [system] * count
    assert all(
        "2 seeds" in claim.limit or "steps on the gates" in claim.limit for claim in claims if claim.limit
    )
    assert all(isinstance(claim.holds, bool) for claim in claims)


def test_the_held_out_set_is_held_out_and_fixed() -> None:
    kept, tested = toy.pictures("train")[0], toy.pictures("heldout")[0]
    assert kept.shape[1:] == tested.shape[1:] == (3, 16, 16)
    assert len(kept) > 15 * len(tested)
    first, again = (list(toy.batches(PLAN, 3)) for _ in range(2))
    assert all(torch.equal(a.state, b.state) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].noise, next(toy.batches(PLAN, 4)).noise)


def test_a_training_repeats_and_learns() -> None:
    def run(steps: int) -> toy.Trained:
        torch.manual_seed(1)
        return toy.train(dtr.model("plain"), toy.Plan(steps, (1,), batch=8), 1)

    first, again = run(30), run(30)
    assert first.loss == again.loss
    assert list(first.curve) == [15, 30]
    assert first.curve[30] < first.curve[15] < 1.1


def test_seed_noise_is_told() -> None:
    below = toy.compare(("a", [1.0, 2.0, 3.0]), ("b", [1.5, 2.51, 3.49]))
    assert below == (True, "a 2.0000 ± 1.0000, b 2.5000 ± 0.9950; difference 0.5000 ± 0.0100, 3 seeds")
    holds, measured = toy.compare(("a", [1.0, 2.0, 3.0]), ("b", [3.0, 1.0, 1.0]))
    assert not holds
    assert measured.endswith("within seed noise")


def test_routing() -> None:
    found = toy.study({name: lambda name=name: dtr.model(name) for name in dtr.ROUTING}, PLAN)
    told(dtr.claims(found, str(PLAN)), "dtr", 3)


def test_experts(tmp_path: Path) -> None:
    gates = [switch_dit.train_gates(seed, 20) for seed in PLAN.seeds]
    assert all(found.end < found.start for found in gates)
    found = toy.study({"Switch-DiT": switch_dit.model}, PLAN, switch_dit.with_prior)
    peers = toy.study({name: lambda name=name: dtr.model(name) for name in ("plain", "DTR")}, PLAN)
    toy.write(tmp_path / "dtr.json", [], PLAN, peers)
    errors = switch_dit.peers(tmp_path / "dtr.json", PLAN)
    assert errors["DTR"] == toy.losses(peers["DTR"])
    with pytest.raises(ValueError, match=r"run benchmarks\.architectures\.dtr with the same"):
        switch_dit.peers(tmp_path / "dtr.json", toy.Plan(3, (0, 1)))
    errors["Switch-DiT"] = toy.losses(found["Switch-DiT"])
    told(switch_dit.claims(gates, errors, 20, str(PLAN)), "switch-dit", 5)


def test_similarity_of_choices() -> None:
    choices = torch.zeros(1000, 2)
    choices[:500, 0] = choices[500:, 1] = 1
    near, far = switch_dit.similarity(choices)
    assert near > 0.9
    assert far == 0


def test_linear_attention() -> None:
    found = toy.study(lit.FRESH, PLAN, lit.hybrid)
    for run in found["ReLU"]:
        assert all(not block.attn.dwc.weight.any() for block in run.model.blocks)
    found |= lit.students(found["softmax"], PLAN)
    told(lit.claims(found, PLAN), "lit", 5)
    assert lit.reached(toy.Trained(None, 0.1, {5: 0.3, 10: 0.1}), 0.2) == 10
    assert lit.reached(toy.Trained(None, 0.1, {5: 0.3, 10: 0.1}), 0.05) is None


def test_cascade() -> None:
    found = toy.study(
        {"TD-LN": dimr.cascade, "adaLN": dimr.adaptive, "no time": dimr.Timeless}, PLAN, dimr.objective
    )
    ratio = dimr.equal_ratio()
    assert abs(dimr.multiply_adds(dimr.transformer(ratio)) / dimr.multiply_adds(dimr.cascade()) - 1) < 0.01
    found |= toy.study({"transformer": lambda: dimr.transformer(ratio)}, PLAN)
    high = {name: [dimr.spectrum(toy.errors(run.model))[1] for run in runs] for name, runs in found.items()}
    told(dimr.claims(found, high, PLAN), "dimr", 3)


def test_spectrum() -> None:
    flat, checks = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    checks[..., 1::2] = -1
    low, high = dimr.spectrum(flat)
    assert low == pytest.approx(2)
    assert high == pytest.approx(0)
    low, high = dimr.spectrum(checks)
    assert low == pytest.approx(0)
    assert high == pytest.approx(2)
    noise = torch.randn(2, 3, 8, 8)
    assert sum(dimr.spectrum(noise)) / 2 == pytest.approx(noise.square().mean().item(), rel=1e-4)


def test_no_time_is_no_time() -> None:
    state, labels = torch.randn(2, 3, 16, 16), torch.zeros(2).long()
    timeless, timed = dimr.Timeless(), dimr.adaptive()
    for module in timed.modules():
        if isinstance(module, dimr.AdaptiveNorm):
            torch.nn.init.normal_(module.modulation.weight)
    early, late = torch.tensor([1, 1]), torch.tensor([999, 999])
    assert torch.equal(timeless(state, early, labels).sample, timeless(state, late, labels).sample)
    assert not torch.allclose(timed(state, early, labels).sample, timed(state, late, labels).sample)


def test_channel_attention() -> None:
    found = toy.study({"CCA": lambda: dico.model(True), "no CCA": lambda: dico.model(False)}, PLAN)
    idle = {name: [dico.idle_share(dico.activity(run.model)) for run in runs] for name, runs in found.items()}
    told(dico.claims(found, idle, PLAN), "dico", 2)
    assert dico.idle_share(torch.tensor([10.0, 0.5, 0.9, 5.0])) == 0.5


def test_mixers() -> None:
    ratios = {name: lamamba_diff.matched_ratio(mixers) for name, mixers in lamamba_diff.MIXERS.items()}
    variants = {
        name: lambda name=name: lamamba_diff.built(lamamba_diff.MIXERS[name], ratios[name]) for name in ratios
    }
    counts = [toy.parameters(make()) for make in variants.values()]
    assert max(counts) / min(counts) < 1.02
    found = toy.study(variants, PLAN)
    told(lamamba_diff.claims(found, ratios, PLAN), "lamamba-diff", 2)


def test_proxies() -> None:
    found = toy.study(pt_dit.VARIANTS, PLAN)
    told(pt_dit.claims(found, PLAN), "pt-dit", 6)
    state = torch.randn(1, 3, 16, 16)
    blind = pt_dit.without_proxies(shift_window=False).eval()
    for parameter in blind.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    changed = state.clone()
    changed[..., 8:, 8:] += 1  # another window
    before, after = (blind(x, torch.zeros(1), torch.zeros(1).long()).sample for x in (state, changed))
    assert torch.allclose(before[..., :8, :8], after[..., :8, :8], atol=1e-5)


def test_work_of_blocks() -> None:
    linear, square = (
        {s: count(s) for s in (16, 32, 64)} for count in (multiply_adds.lamamba, multiply_adds.dit)
    )
    shares = {side: multiply_adds.proxy_share(side) for side in multiply_adds.SIDES}
    assert all(claim.holds for claim in multiply_adds.claims(linear, square, shares))


def test_dynamic_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "depth": 1, "num_heads": 4}
    monkeypatch.setattr(dydit, "CONFIG", dydit.CONFIG | small)
    budget = DyDiTOptions(flops=0.5, warmup=1, hold=0, complete_until=0.5)
    found = dydit.run(PLAN, 2, budget)
    told(dydit.claims(PLAN, 2, found, budget, turns=1), "dydit", 3)
    assert [list(trained.curve) for trained in found["halved"]] == [[1, 2, 3]] * 2
    assert [dydit.spent(trained.model) for trained in found["halved"]] == [0.5, 0.5]
    assert dydit.spent(dydit.dynamic(found["whole"][0].model)) == 1.0
