"""The parts of the timing scripts, on sizes of seconds; no time is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import rounds
from benchmarks.architectures import speed
from benchmarks.training import throughput


@pytest.fixture(autouse=True)
def _no_precision_is_left_behind():
    yield
    AcceleratorState._reset_state()


def test_the_quotient_is_taken_within_a_round() -> None:
    seconds = {"ours": [1.0, 10.0, 2.0], "other": [2.0, 20.0, 8.0]}
    assert rounds.times_as_fast(seconds, "ours", "other") == 2.0
    assert rounds.milliseconds(seconds) == {"ours": 2000.0, "other": 8000.0}


def test_runs_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = rounds.interleaved(runs, 2, "cpu")
    assert order == list("ab" * 3)  # a warm-up, then two rounds
    assert [len(times) for times in seconds.values()] == [2, 2]


@pytest.mark.parametrize(
    ("ratios", "tokens"),
    [([0.5, 2.0, 4.0], 512.0), ([2.0, 3.0, 4.0], 256.0), ([0.5, 0.6, 0.9], None), ([2.0, 0.5, 2.0], 2048.0)],
)
def test_where_it_becomes_faster(ratios: list[float], tokens: float | None) -> None:
    found = speed.crossing([256, 1024, 4096], ratios)
    assert found == (tokens if tokens is None else pytest.approx(tokens))


@torch.no_grad()
@pytest.mark.parametrize("runs", [speed.lamamba_runs, speed.lit_runs, speed.pt_dit_runs])
def test_contenders_run(runs) -> None:
    contenders = runs(8, 32, 2)
    for run in contenders.values():
        assert run().isfinite().all()
    assert all(speed.flops(run) > 0 for run in contenders.values())


def row(faster: dict[str, float], growth: float = 4.0) -> dict[str, speed.Row]:
    """Rows of 256, 1024 and 4096 tokens whose last has these quotients."""
    times = {"256": 1.0, "1024": 4.0, "4096": 4.0 * growth}
    names = [*faster, "DiT", "softmax", "layer"]
    return {
        case: {
            "milliseconds": dict.fromkeys(names, time),
            "times_as_fast": faster if case == "4096" else dict.fromkeys([*faster, "layer"], 0.5),
            "flops": dict.fromkeys(names, 1),
        }
        for case, time in times.items()
    }


def test_claims_follow_the_figures() -> None:
    fast, slow = row({"state 1": 1.5, "state 16": 0.9}), row({"state 1": 1.5, "state 16": 1.5}, growth=5.0)
    assert [claim.holds for claim in speed.lamamba_claims(fast)] == [True, True, False, False]
    assert [claim.holds for claim in speed.lamamba_claims(slow)] == [False, True, False, True]
    assert [claim.holds for claim in speed.pt_dit_claims(row({"ours": 1.7}))] == [True, False]
    assert [claim.holds for claim in speed.lit_claims(row({"ours": 9.0, "layer": 3.0}))] == [False]


def test_both_sides_train_on_the_same_curve() -> None:
    mine, theirs = throughput.curves("float32", steps=4, batch=4, side=4)
    assert throughput.apart((mine, theirs)) < 1e-4
    assert len(set(mine)) == 4
    assert throughput.apart(([1.0, 1.1], [1.0, 1.0])) == pytest.approx(0.1)


def test_a_step_of_both_and_what_is_written_of_it(tmp_path: Path) -> None:
    ours = throughput.trainer(throughput.TINY, 4, 4, "bf16", tmp_path)
    usual = throughput.script(ours, throughput.TINY, 4, bf16=True)
    before = {name: value.clone() for name, value in usual.average.state_dict().items()}
    assert throughput.usual_step(usual, *throughput.latents(8, 4), 4) > 0
    assert any((before[name] != value).any() for name, value in usual.average.state_dict().items())
    shares = throughput.share_of_matrices(ours)
    assert 0 < shares["matrices"] < 1
    rates = {"ours": 4.0, "usual script": 2.0}
    rows = {"s bf16": {"times_as_fast": 2.0, "images_a_second": rates, **shares}}
    (good,) = throughput.claims(rows, {"bf16": ([1.0], [1.0])})
    (bad,) = throughput.claims(rows, {"bf16": ([1.1], [1.0])})
    assert good.holds
    assert not bad.holds
